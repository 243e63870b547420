"""KV-cache policies as transformers cache layers, and the published selections and decompositions as functions."""

from regard.cache.grouped import GroupedLayer, LayerGroup, MergedPair, SharedBasis
from regard.cache.h2o import HeavyHitterLayer, HeavyHitterMask, accumulate, heavy_hitters
from regard.cache.layer import Slots, TrackedLayer
from regard.cache.size import nbytes
from regard.cache.spans import SpanLayer
from regard.cache.streaming_llm import SinkLayer, evict, evict_for_space, evict_range
from regard.cache.xkv import cross_layer_svd, group_layers, minicache_merge, subspace_overlap

__all__ = [
    "GroupedLayer",
    "HeavyHitterLayer",
    "HeavyHitterMask",
    "LayerGroup",
    "MergedPair",
    "SharedBasis",
    "SinkLayer",
    "Slots",
    "SpanLayer",
    "TrackedLayer",
    "accumulate",
    "cross_layer_svd",
    "evict",
    "evict_for_space",
    "evict_range",
    "group_layers",
    "heavy_hitters",
    "minicache_merge",
    "nbytes",
    "subspace_overlap",
]
