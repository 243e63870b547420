"""LongHeads (arXiv:2402.10685): every head attends to a few chunks it chooses, at positions the model knows."""

from regard.methods.language.longheads.attention import LongHeadsConfig, chunk_features, longheads_attention
from regard.methods.language.longheads.method import ChunkedLayer, LongHeads

__all__ = ["ChunkedLayer", "LongHeads", "LongHeadsConfig", "chunk_features", "longheads_attention"]
