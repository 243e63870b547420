"""BAM's attention experts, with their own and with shared keys."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "num_experts": 3}

CASES = [
    Case("causal", {**SMALL, "rope_theta": 100.0}, compiles=True),
    Case("gqa-shared", {**SMALL, "num_kv_heads": 2, "share_kv": True, "rope_theta": 100.0}, compiles=True),
    Case("noncausal", {**SMALL, "num_kv_heads": 2, "head_dim": 6, "causal": False}, compiles=True),
    Case("top-1", {**SMALL, "top_k": 1}, bf16_atol=None),
]
