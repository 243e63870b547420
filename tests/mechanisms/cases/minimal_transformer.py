"""Attention with fewer matrices."""

from tests.mechanisms.case import Case

CASES = [
    Case("separate", {"dim": 16, "num_heads": 4, "bias": True, "causal": True}, compiles=True),
    Case("merged", {"dim": 16, "qk": "merged", "vo": "merged", "bias": True, "causal": True}, compiles=True),
    Case("symmetric", {"dim": 16, "num_heads": 2, "qk": "symmetric", "vo": "none", "causal": True}),
    Case("cholesky", {"dim": 16, "qk": "cholesky", "bias": True, "causal": False}, compiles=True),
    Case("least", {"dim": 16, "qk": "merged", "vo": "none", "causal": False}, compiles=True),
]
