"""Aaren is always causal."""

from tests.mechanisms.case import Case

CASES = [
    Case("causal", {"dim": 16, "num_heads": 2}, compiles=True),
    Case("plain", {"dim": 16, "num_heads": 4, "bias": False}),
]
