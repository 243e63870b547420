"""Building blocks that mechanisms and models share."""

from regard.layers.heads import merge_heads, per_head, split_heads
from regard.layers.mlp import MLP, SwiGLU
from regard.layers.weights import load_strictly, split_rows

__all__ = ["MLP", "SwiGLU", "load_strictly", "merge_heads", "per_head", "split_heads", "split_rows"]
