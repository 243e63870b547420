"""What a mask amounts to: its density, and what it lets through in several layers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.errors import ArgumentError
from regard.masks.base import Mask
from regard.masks.blocks import ALL, SOME
from regard.masks.build import block_pairs
from regard.masks.combine import PerHead

_BLOCK = 128
_PAIRS = 1 << 22  # pairs evaluated at a time
_BYTES = 1 << 25  # reach rows gathered at a time


def density(mask: Mask, n: int, m: int) -> float:
    """See `Mask.density`. Closed forms where there are some, else full blocks are counted and mixed ones evaluated."""
    if isinstance(mask, PerHead):
        return sum(density(each, n, m) for each in mask.masks) / len(mask.masks)
    mask = mask.to("cpu")
    allowed = mask.count(n, m)
    if allowed is None:
        allowed = _count_differences(mask, n, m) if mask.relative else _count_blocks(mask, n, m)
    return allowed / (n * m * (mask.batch or 1) * (mask.heads or 1))


def receptive_field(mask: Mask, layers: int, n: int) -> Tensor:
    """See `Mask.receptive_field`."""
    if layers < 0:
        raise ArgumentError(f"layers must not be negative, got {layers}")
    fields = []
    for links in _links(mask, n):
        reach = _own_position(n)
        for _ in range(layers):
            reach, before = _compose(links, reach), reach
            if np.array_equal(reach, before):
                break
        fields.append(torch.from_numpy(np.unpackbits(reach.view(np.uint8), axis=1, count=n).astype(bool)))
    return torch.stack(fields) if mask.batch else fields[0]


def min_layers(mask: Mask, n: int) -> int | None:
    """See `Mask.min_layers`."""
    most = 0
    for links in _links(mask, n):
        wanted = _pack(np.tri(n, dtype=bool) if not np.triu(links, 1).any() else np.ones((n, n), dtype=bool))
        reach, layers = _own_position(n), 0
        while not np.array_equal(reach, wanted):
            reach, before = _compose(links, reach), reach
            if np.array_equal(reach, before):
                return None
            layers += 1
        most = max(most, layers)
    return most


def _count_differences(mask: Mask, n: int, m: int) -> int:
    """Allowed pairs of a mask on ``q - k``: every difference once, weighted by how many pairs have it."""
    difference = torch.arange(1 - m, n)
    pairs = (difference + m).clamp(max=n) - difference.clamp(min=0)
    return int((mask(0, 0, difference.clamp(min=0), -difference.clamp(max=0)) * pairs).sum())


def _count_blocks(mask: Mask, n: int, m: int) -> int:
    structure = mask.blocks(n, m, _BLOCK)
    layers = structure.batch * structure.heads
    total = structure.pairs(ALL)
    row, j, kind = structure.cells()
    row, j = row[kind == SOME], j[kind == SOME]
    layer, i = row // structure.num_query_blocks, row % structure.num_query_blocks
    cell, where = torch.unique(i * structure.num_key_blocks + j, return_inverse=True)
    mixed = torch.zeros(layers, len(cell), dtype=torch.bool)
    mixed[layer, where] = True
    at = 0
    for part in cell.split(max(1, _PAIRS // (layers * _BLOCK * _BLOCK))):
        i, j = part // structure.num_key_blocks, part % structure.num_key_blocks
        allowed, inside = block_pairs(mask, n, m, _BLOCK, _BLOCK, i, j)
        counted = (allowed & inside).flatten(0, 1).sum((-1, -2))
        total += int((counted * mixed[:, at : at + len(part)]).sum())
        at += len(part)
    return total


def _links(mask: Mask, n: int) -> list[NDArray[np.bool_]]:
    """Per batch item, who hears whom in one layer: through any head, or by the residual connection."""
    dense = mask.dense(n, device="cpu")
    if mask.heads or mask.batch:
        dense = dense.any(-3)
    dense = dense.reshape(-1, n, n) | torch.eye(n, dtype=torch.bool)
    return [each.numpy() for each in dense]


def _pack(reach: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Rows of bits, 64 to a word."""
    packed = np.packbits(reach, axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


def _own_position(n: int) -> NDArray[np.uint64]:
    return _pack(np.eye(n, dtype=bool))


def _compose(links: NDArray[np.bool_], reach: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One more layer: a position hears everything that the positions it hears have heard."""
    heard = links.sum(1)
    out = np.empty_like(reach)
    most = max(1, _BYTES // (reach.shape[1] * 8))
    start = 0
    while start < len(links):
        # as many rows as fit; a row always has at least its own position
        rows = max(1, int(np.searchsorted(np.cumsum(heard[start:]), most, side="right")))
        keys = np.nonzero(links[start : start + rows])[1]
        first = np.cumsum(heard[start : start + rows]) - heard[start : start + rows]
        out[start : start + rows] = np.bitwise_or.reduceat(reach[keys], first, axis=0)
        start += rows
    return out
