"""Key-driven GQA. What adapts to the keys looks at the whole batch, so padding beside it is not what it is alone."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "num_kv_heads": 2}

CASES = [
    Case("equal-causal", {**SMALL, "scheme": "gqa", "causal": True}),
    Case("fixed-causal", {**SMALL, "allocation": [3, 1], "causal": True, "qkv_bias": True}),
    Case("keys", SMALL, pads=False, bf16_atol=None),  # rounding may turn the allocation
]
