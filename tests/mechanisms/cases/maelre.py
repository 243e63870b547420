"""MAELRE's attention in its three regimes."""

from tests.mechanisms.case import Case

CASES = [
    Case("softmax", {"dim": 16, "num_heads": 2, "threshold": 64}, compiles=True),
    Case("linear", {"dim": 16, "num_heads": 2, "threshold": 6}, compiles=True),
    Case("xca", {"dim": 16, "num_heads": 2, "threshold": "head_dim", "approximation": "xca"}, compiles=True),
]
