"""The methods that are compared when none are named, with budgets that can be compared."""

from regard.methods import create
from regard.sites import Method

_SINKS = 4


def default_methods(context: int) -> list[Method]:
    """Seven methods, each left with about a quarter of the context, in keys attended to or in bytes held."""
    quarter = max(8, context // 4)
    block = max(4, context // 64)
    chunk = max(4, context // 32)
    return [
        create("sliding-window", window_size=quarter),
        create("streaming-llm", start_size=_SINKS, recent_size=quarter - _SINKS),
        create("h2o", budget=0.25),
        create("xkv", rank_k=0.15, rank_v=0.2, group_size=4),
        create("power-attention", block_size=block, window_blocks=5, sink_blocks=1),
        create("longheads", window_size=chunk, atten_length=8 * chunk),
        create("dhsa", budget=0.25),
    ]
