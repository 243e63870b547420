"""Linear attention, recurrences and prefix scans: engines with explicit state."""

from regard.linear.features import elu1, taylor
from regard.linear.prefix import PrefixState, prefix_softmax
from regard.linear.scan import LinearResult, linear_attention, normalized_linear_attention

__all__ = [
    "LinearResult",
    "PrefixState",
    "elu1",
    "linear_attention",
    "normalized_linear_attention",
    "prefix_softmax",
    "taylor",
]
