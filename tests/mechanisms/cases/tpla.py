"""Sharded latent attention."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}

CASES = [
    Case("causal", {**SMALL, "shards": 2}, compiles=True),
    Case("three-shards", {**SMALL, "shards": 3, "q_lora_rank": 8, "v_head_dim": 5, "bias": True}),
    Case("noncausal", {**SMALL, "shards": 4, "causal": False, "rope_theta": None}, compiles=True),
]
