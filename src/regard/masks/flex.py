"""Masks as FlexAttention's ``BlockMask``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from regard.masks.base import Mask
from regard.masks.blocks import ALL


def to_flex(
    mask: Mask, n: int, m: int, block_size: int | tuple[int, int], device: torch.device | str | None
) -> BlockMask:
    """See `Mask.to_flex`."""
    structure = mask.blocks(n, m, block_size)
    if device is not None:
        structure = structure.to(device)
    row, column, kind = structure.cells()
    # FlexAttention takes a full block to have block_size pairs, so those that the lengths cut off need the mask
    (bq, bk), rows, columns = structure.block_size, structure.num_query_blocks, structure.num_key_blocks
    cut = (row % rows >= n // bq) | (column >= m // bk)
    full = (kind == ALL) & ~cut
    some = structure.pad(row[~full], column[~full], kind[~full], columns)
    every = structure.pad(row[full], column[full], kind[full], columns)
    placed = mask if device is None else mask.to(device)

    # a plain function, because FlexAttention inspects and traces it as one
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return placed(b, h, q_idx, k_idx)

    return BlockMask.from_kv_blocks(
        kv_num_blocks=some.count,
        kv_indices=some.index,
        full_kv_num_blocks=every.count,
        full_kv_indices=every.index,
        BLOCK_SIZE=structure.block_size,
        mask_mod=mask_mod,
        seq_lengths=(n, m),
    )
