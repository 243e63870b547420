"""RCMHA, causal and not."""

from tests.mechanisms.case import Case

CASES = [
    Case("causal", {"dim": 16, "num_heads": 2, "max_length": 40}, compiles=True),
    Case("noncausal", {"dim": 16, "num_heads": 4, "kernel_size": 1, "max_length": 40, "causal": False}, compiles=True),
]
