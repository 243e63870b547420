"""KV-cache policies as transformers cache layers."""

from regard.cache.layer import Slots, TrackedLayer
from regard.cache.size import nbytes

__all__ = ["Slots", "TrackedLayer", "nbytes"]
