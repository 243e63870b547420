"""Linear attention, recurrences and prefix scans: engines with explicit state."""

from regard.linear.features import elu1, taylor
from regard.linear.prefix import PrefixState, prefix_softmax
from regard.linear.scan import LinearResult, linear_attention, normalized_linear_attention
from regard.linear.selective import ScanResult, linear_scan, selective_scan

__all__ = [
    "LinearResult",
    "PrefixState",
    "ScanResult",
    "elu1",
    "linear_attention",
    "linear_scan",
    "normalized_linear_attention",
    "prefix_softmax",
    "selective_scan",
    "taylor",
]
