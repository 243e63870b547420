"""The variants of attention that give something up."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4}

CASES = [
    Case("taylor", {**SMALL, "rope_theta": 100.0}, compiles=True),
    Case("taylor-noncausal", {**SMALL, "bias": False, "causal": False}, compiles=True),
    Case("key-gated", SMALL, part="key-gated", compiles=True),
    Case("mlp", {"dim": 16}, part="mlp", compiles=True),
    Case("decoupled", {**SMALL, "rope_theta": 100.0, "num_kv_heads": 2}, part="decoupled", compiles=True),
]
