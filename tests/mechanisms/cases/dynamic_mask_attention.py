"""Dynamic mask attention: fewer keys than tokens, more, both forms of the bias, all tokens."""

from tests.mechanisms.case import Case

SMALL = {"dim": 16, "num_heads": 4}

CASES = [  # the choice of keys flips in bfloat16 where fewer than all are kept
    Case("narrow", {**SMALL, "num_kv_heads": 2, "window_size": 5}, bf16_atol=None, compiles=True),
    Case("wide", {**SMALL, "bias": True, "window_size": 64}),
    Case("linear", {**SMALL, "bias_form": "linear", "qk_norm": False, "window_size": 9}, bf16_atol=None),
    Case("noncausal", {**SMALL, "num_kv_heads": 1, "causal": False, "window_size": 9}, bf16_atol=None),
]
