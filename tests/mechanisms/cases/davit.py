"""Attention between channels, with both scales."""

from tests.mechanisms.case import Case

CASES = [
    Case("published", {"dim": 16, "num_heads": 4}, part="channel", compiles=True),
    Case("dynamic", {"dim": 16, "num_heads": 2, "qkv_bias": False, "dynamic_scale": True}, part="channel"),
]
