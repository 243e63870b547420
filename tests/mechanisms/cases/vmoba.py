"""VMoBA with each kind of block; the length is that of its grid."""

from tests.mechanisms.case import Case

GRID = {"dim": 16, "num_heads": 2, "grid": (2, 3, 4), "chunks": (1, (3, 2), (1, 3, 2))}

CASES = [
    Case("frames", {**GRID, "layer_idx": 0}, lengths=(24,), pads=False, bf16_atol=None),
    Case("tiles", {**GRID, "layer_idx": 1, "select": "topk", "topk": 1}, lengths=(24,), pads=False, bf16_atol=None),
    Case("boxes", {**GRID, "layer_idx": 2, "scope": "query_head"}, lengths=(24,), pads=False, bf16_atol=None),
]
