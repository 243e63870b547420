"""`BlockStructure`: which blocks of a score matrix a mask visits."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NONE, SOME, ALL = 0, 1, 2
"""Kinds of blocks: nothing visible, the pointwise mask is needed, everything visible."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Per query block row the key blocks it visits, in ascending order, padded to the longest row."""

    index: Tensor
    """(batch, heads, query blocks, L) int32, key block; 0 where padded."""
    kind: Tensor
    """(batch, heads, query blocks, L) uint8, `SOME` or `ALL`; `NONE` where padded."""
    count: Tensor
    """(batch, heads, query blocks) int32, entries that are not padding."""


@dataclass(frozen=True, eq=False)
class BlockStructure:
    """Runs of key blocks per query block row, in compressed row form; blocks in no run are not visited.

    Row ``(b * heads + h) * num_query_blocks + i`` holds runs ``row_ptr[row] : row_ptr[row + 1]``; run ``r`` covers key
    blocks ``start[r] : stop[r]``, all of kind ``kind[r]``. Runs of a row are ascending and disjoint, and neighbours of
    the same kind are joined. ``batch`` and ``heads`` are 1 where the mask does not depend on them.
    """

    row_ptr: Tensor  # (rows + 1,) int64
    start: Tensor  # (runs,) int32
    stop: Tensor  # (runs,) int32
    kind: Tensor  # (runs,) uint8
    n: int
    m: int
    block_size: tuple[int, int]
    batch: int = 1
    heads: int = 1

    @property
    def num_query_blocks(self) -> int:
        return -(-self.n // self.block_size[0])

    @property
    def num_key_blocks(self) -> int:
        return -(-self.m // self.block_size[1])

    @property
    def num_runs(self) -> int:
        return len(self.start)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that make up the structure."""
        return sum(x.nbytes for x in (self.row_ptr, self.start, self.stop, self.kind))

    @property
    def density(self) -> float:
        """Share of the n x m pairs that lie in visited blocks: never less than the mask's own density."""
        return self.pairs() / (self.n * self.m * self.batch * self.heads)

    def pairs(self, kind: int | None = None) -> int:
        """Number of pairs that lie in visited blocks, or only in those of one kind, over all batch items and heads."""
        (bq, bk), start, stop = self.block_size, self.start.long(), self.stop.long()
        i = self.rows() % self.num_query_blocks
        counted = ((i + 1) * bq).clamp(max=self.n) - i * bq
        counted *= (stop * bk).clamp(max=self.m) - start * bk
        return int((counted if kind is None else counted[self.kind == kind]).sum())

    def row(self, i: int, b: int = 0, h: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """``(start, stop, kind)`` of the runs of query block ``i``."""
        row = ((b if self.batch > 1 else 0) * self.heads + (h if self.heads > 1 else 0)) * self.num_query_blocks + i
        runs = slice(int(self.row_ptr[row]), int(self.row_ptr[row + 1]))
        return self.start[runs], self.stop[runs], self.kind[runs]

    def rows(self) -> Tensor:
        """(runs,) int64: the row each run belongs to."""
        return torch.repeat_interleave(self.row_ptr.diff())

    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(row, key block, kind)`` of every visited block, rows ascending and key blocks ascending inside a row."""
        length = (self.stop - self.start).long()
        run = torch.repeat_interleave(length)
        first = length.cumsum(0) - length
        column = torch.arange(len(run), device=run.device) - first[run] + self.start[run]
        return self.rows()[run], column, self.kind[run]

    def grid(self) -> Tensor:
        """(batch, heads, query blocks, key blocks) uint8 of `NONE`, `SOME`, `ALL`."""
        shape = (self.batch, self.heads, self.num_query_blocks, self.num_key_blocks)
        row, column, kind = self.cells()
        grid = torch.zeros(len(self.row_ptr) - 1, self.num_key_blocks, dtype=torch.uint8, device=kind.device)
        grid[row, column] = kind
        return grid.view(shape)

    def lists(self, kind: int | None = None, width: int | None = None) -> BlockLists:
        """The visited key blocks as padded lists.

        Args:
            kind: only blocks of this kind (`SOME` or `ALL`); both if None.
            width: length to pad to; the longest list if None.
        """
        row, column, kinds = self.cells()
        if kind is not None:
            keep = kinds == kind
            row, column, kinds = row[keep], column[keep], kinds[keep]
        return self.pad(row, column, kinds, width)

    def pad(self, row: Tensor, column: Tensor, kind: Tensor, width: int | None = None) -> BlockLists:
        """Padded lists of some cells of this structure, given as by `cells`."""
        rows = len(self.row_ptr) - 1
        count = torch.bincount(row, minlength=rows)
        width = int(count.max()) if width is None else width
        slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        index = torch.zeros(rows, width, dtype=torch.int32, device=row.device)
        padded = torch.zeros(rows, width, dtype=torch.uint8, device=row.device)
        index[row, slot] = column.int()
        padded[row, slot] = kind
        shape = (self.batch, self.heads, self.num_query_blocks)
        return BlockLists(index.view(*shape, width), padded.view(*shape, width), count.int().view(shape))

    def to(self, device: torch.device | str) -> BlockStructure:
        """The same structure with its tensors on ``device``."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self)[:4]}
        return replace(self, **tensors)

    def __repr__(self) -> str:
        return (
            f"BlockStructure(n={self.n}, m={self.m}, block_size={self.block_size}, batch={self.batch}, "
            f"heads={self.heads}, runs={self.num_runs}, density={self.density:.4g})"
        )
