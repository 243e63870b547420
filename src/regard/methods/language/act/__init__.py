"""ACT (arXiv:2406.15765): attention calibration."""

from regard.methods.language.act.calibration import calibrate_attention, column_average, find_sinks
from regard.methods.language.act.method import ACT
from regard.methods.language.act.search import by_layer, head_gains, search_heads

__all__ = ["ACT", "by_layer", "calibrate_attention", "column_average", "find_sinks", "head_gains", "search_heads"]
