"""Masks: which keys a query may see, as values that combine with ``&``, ``|``, ``~`` and know their blocks.

    causal() & (sliding_window(4096) | sinks(64))

`Mask` is what they all are; `BlockStructure` is what `Mask.blocks` returns.
"""

from regard.masks.base import Mask
from regard.masks.blocks import ALL, NONE, SOME, BlockLists, BlockStructure
from regard.masks.combine import per_head
from regard.masks.sequence import band, blockwise_causal, causal, empty, full, prefix, sinks, sliding_window
from regard.masks.table import from_blocks, from_dense, from_lists, random_blocks

__all__ = [
    "ALL",
    "NONE",
    "SOME",
    "BlockLists",
    "BlockStructure",
    "Mask",
    "band",
    "blockwise_causal",
    "causal",
    "empty",
    "from_blocks",
    "from_dense",
    "from_lists",
    "full",
    "per_head",
    "prefix",
    "random_blocks",
    "sinks",
    "sliding_window",
]
