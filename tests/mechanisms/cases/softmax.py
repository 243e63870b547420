"""Softmax attention, the baseline."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "num_kv_heads": 2}

CASES = [
    Case("causal", {**SMALL, "rope_theta": 100.0}, compiles=True),
    Case("window", {**SMALL, "window_size": 3, "qk_norm": True}),
    Case("noncausal", {**SMALL, "causal": False, "bias": True}, compiles=True),
]
