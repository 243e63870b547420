"""ComplexFormer, causal and not."""

from tests.mechanisms.case import Case

# bfloat16 turns phases near ±pi around, where the score jumps
CASES = [
    Case("causal", {"dim": 16, "num_heads": 2}, compiles=True, bf16_atol=None),
    Case("noncausal", {"dim": 16, "num_heads": 4, "causal": False, "rope_theta": None}, compiles=True, bf16_atol=None),
]
