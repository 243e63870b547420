"""Masks: which keys a query may see, as values that combine with ``&``, ``|``, ``~`` and know their blocks.

    causal() & (sliding_window(4096) | sinks(64))

`Mask` is what they all are; `BlockStructure` is what `Mask.blocks` returns.
"""

from regard.masks.base import Mask
from regard.masks.blocks import ALL, NONE, SOME, BlockLists, BlockStructure
from regard.masks.combine import per_head
from regard.masks.function import from_function
from regard.masks.grid import halo, product, shifted_windows, windows
from regard.masks.groups import documents, groups, padding
from regard.masks.neighborhood import neighborhood
from regard.masks.relative import dilated, power, strided
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
    "dilated",
    "documents",
    "empty",
    "from_blocks",
    "from_dense",
    "from_function",
    "from_lists",
    "full",
    "groups",
    "halo",
    "neighborhood",
    "padding",
    "per_head",
    "power",
    "prefix",
    "product",
    "random_blocks",
    "shifted_windows",
    "sinks",
    "sliding_window",
    "strided",
    "windows",
]
