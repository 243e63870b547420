"""Experts routed by similar tokens; experts are chosen, so bfloat16 may choose others."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_experts": 4, "hidden_dim": 8}

CASES = [
    Case("causal", SMALL, bf16_atol=None),
    Case("rank-top-1", {**SMALL, "rank": 3, "top_k": 1, "temperature": 0.5}, bf16_atol=None),
    Case("noncausal", {**SMALL, "causal": False}, bf16_atol=None),
]
