"""L2ViT's linear attention, with the clamp at work and without."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 2}

CASES = [
    Case("clamped", {**SMALL}, compiles=True),
    Case("normalised", {**SMALL, "bias": False, "min_denominator": 1e-3}, compiles=True),
]
