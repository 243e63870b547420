"""HyperAttention below and above its exact length; near codes may swap in bfloat16."""

from tests.mechanisms.case import Case

ROUGH = {"dim": 16, "num_heads": 2, "block_size": 4, "sample_size": 3, "min_seq_len": 6, "num_projections": 3}

CASES = [
    Case("exact", {"dim": 16, "num_heads": 2, "rope_theta": 50.0}, pads=False),
    Case("rough", {**ROUGH, "bias": True}, pads=False, bf16_atol=None),
]
