"""Sigmoid attention with each kind of position."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4}

CASES = [
    Case("alibi", {**SMALL, "num_kv_heads": 2, "alibi": True, "bias": True}, compiles=True),
    Case("rope", {**SMALL, "rope_theta": 100.0, "qk_norm": False, "max_length": 32}, compiles=True),
    Case("row-normalised", {**SMALL, "normalise": "sqrt_n", "v_norm": True}),
    Case("noncausal", {**SMALL, "causal": False, "logit_bias": -3.0}, compiles=True),
]
