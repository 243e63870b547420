"""Latent attention, which TPLA shards."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}

CASES = [
    Case("defaults", {"dim": 16, "num_heads": 2}, compiles=True),
    Case("queries-of-low-rank", {**SMALL, "q_lora_rank": 8, "v_head_dim": 5, "bias": True}),
    Case("expanded", {**SMALL, "absorbed": False, "rope_theta": None}),
    Case("noncausal", {**SMALL, "causal": False}, compiles=True),
]
