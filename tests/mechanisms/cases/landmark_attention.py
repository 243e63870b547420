"""Landmark attention with short blocks, so that there are several."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "block_size": 4}

CASES = [
    Case("plain", SMALL),
    Case("grouped", {**SMALL, "num_kv_heads": 2, "rope_theta": None, "bias": True, "block_size": 1}),
]
