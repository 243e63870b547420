"""MALA, causal and not, with and without its extras."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 2}

CASES = [
    Case("causal", {**SMALL}, compiles=True),
    Case("plain", {**SMALL, "rope_theta": None, "lepe_kernel": 0, "output_gate": False}, compiles=True),
    Case("noncausal", {**SMALL, "causal": False, "head_dim": 4}, compiles=True),
]
