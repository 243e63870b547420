"""Sparsifiner: N is fixed by the predictor's basis, and none of an image's tokens is padding."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 2, "num_tokens": 17, "reduce_n": 4}

CASES = [
    Case("budget", {**SMALL, "coef_topk": 2}, lengths=(17,), pads=False, compiles=True, bf16_atol=None),
    Case("threshold", {**SMALL, "attn_keep_rate": None, "score_threshold": 0.2}, (17,), pads=False, bf16_atol=None),
    Case("all", {**SMALL, "attn_keep_rate": 1.0, "share_inout_proj": True}, (17,), pads=False, compiles=True),
]
