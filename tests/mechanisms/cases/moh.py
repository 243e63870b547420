"""MoH with shared, routed and both kinds of heads. Which heads are active may turn in bfloat16."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4}

CASES = [
    Case(
        "causal", {**SMALL, "num_kv_heads": 2, "shared_heads": 2, "routed_heads": 1, "rope_theta": 50.0}, bf16_atol=None
    ),
    Case("query-norm", {**SMALL, "shared_heads": 1, "routed_heads": 2, "router": "query_norm"}, bf16_atol=None),
    Case("shared-only", {**SMALL, "shared_heads": 4, "causal": False, "qk_norm": True}),
    Case("routed-only", {**SMALL, "shared_heads": 0, "routed_heads": 3, "qkv_bias": True}, bf16_atol=None),
]
