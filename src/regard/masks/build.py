"""Builds a `BlockStructure` from a mask's answers about rectangles, coarse ones first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from regard.errors import Unsupported
from regard.masks.base import Mask
from regard.masks.blocks import NONE, BlockStructure
from regard.masks.table import block_pair

_ROOTS = 1 << 14  # at most so many rectangles are asked about before any refinement
_FAN = 4  # a mixed rectangle is refined into _FAN x _FAN
_CHUNK = 1 << 16  # answers (rectangles x batch x heads) held at a time
_STRIPES = 64  # rows whose runs are shorter than this, in blocks, are cheaper to read off than to refine
_CELLS = 1 << 20  # blocks read off at a time
_PAIRS = 1 << 22  # pairs evaluated at a time where blocks are decided pointwise


def build(mask: Mask, n: int, m: int, block_size: int | tuple[int, int], *, exact: bool = False) -> BlockStructure:
    """See `Mask.blocks`."""
    return _Builder(mask.to("cpu"), n, m, block_pair(block_size), exact).build()


class _Builder:
    def __init__(self, mask: Mask, n: int, m: int, block: tuple[int, int], exact: bool):
        self.mask, self.n, self.m = mask, n, m
        self.bq, self.bk = block
        self.rows, self.columns = -(-n // self.bq), -(-m // self.bk)
        self.batch, self.heads = mask.batch or 1, mask.heads or 1
        self.pointwise = exact and not mask.exact
        # a settled answer speaks about what `rect` would say, which is not enough if blocks are decided pointwise
        self.settles = mask.settles and not self.pointwise
        if self.batch * self.heads * self.rows * self.columns * (self.columns + 1) * 2 > 1 << 62:
            raise Unsupported(f"blocks of {block} are too small for a {n} x {m} mask: run positions overflow 64 bits")

    def build(self) -> BlockStructure:
        if self.mask.relative and self.bq == self.bk:
            diagonals = self._diagonals()
            if int((diagonals.diff() != 0).sum()) > self.columns // _STRIPES:
                return self._read_off(diagonals)
        return self._refine()

    def _refine(self) -> BlockStructure:
        """Ask about rectangles of blocks, and again about the parts of mixed ones."""
        side = 1
        while -(-self.rows // side) * -(-self.columns // side) > _ROOTS:
            side *= _FAN
        i, j = _mesh(-(-self.rows // side), -(-self.columns // side))
        found: list[Tensor] = []
        while side > 1:
            mixed = []
            for part_i, part_j in self._chunks(i, j):
                kind, closed = self._rectangles(part_i, part_j, side)
                found.append(self._segments(kind * closed, part_i * side, part_j * side, side))
                mixed.append((part_i[~closed], part_j[~closed]))
            side //= _FAN
            i, j = self._children(torch.cat([x for x, _ in mixed]), torch.cat([x for _, x in mixed]), side)
        found += [self._segments(self._blocks(*part), *part, 1) for part in self._chunks(i, j)]
        return self._join(torch.cat(found))

    def _chunks(self, i: Tensor, j: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = max(1, _CHUNK // (self.batch * self.heads))
        return zip(i.split(size), j.split(size), strict=True)

    def _ask(self, i: Tensor, j: Tensor, side: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``some`` and ``all``, (batch, heads, R), of the rectangles of ``side`` x ``side`` blocks, and their sides."""
        q0, q1 = i * (side * self.bq), ((i + 1) * (side * self.bq)).clamp(max=self.n)
        k0, k1 = j * (side * self.bk), ((j + 1) * (side * self.bk)).clamp(max=self.m)
        some, every = (x.broadcast_to(self.batch, self.heads, len(i)) for x in self.mask.rect(q0, q1, k0, k1))
        return some, every, [q0, q1, k0, k1]

    def _rectangles(self, i: Tensor, j: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Kinds (batch * heads, R), and which rectangles (R,) have one kind throughout in every batch item and head."""
        some, every, (q0, q1, k0, k1) = self._ask(i, j, side)
        decided = every | ~some
        if self.settles:
            height, width = _least_part(q1 - q0, self.bq), _least_part(k1 - k0, self.bk)
            decided = decided | self.mask.settled(q0, q1, k0, k1, height, width)
        return _kind(some, every), decided.all(1).all(0)

    def _blocks(self, i: Tensor, j: Tensor) -> Tensor:
        """Kinds (batch * heads, R) of single blocks."""
        some, every, _ = self._ask(i, j, 1)
        if self.pointwise:
            some, every = self._decide(some, every, i, j)
        return _kind(some, every)

    def _children(self, i: Tensor, j: Tensor, side: int) -> tuple[Tensor, Tensor]:
        di, dj = _mesh(_FAN, _FAN)
        i, j = (i[:, None] * _FAN + di).flatten(), (j[:, None] * _FAN + dj).flatten()
        inside = (i * side < self.rows) & (j * side < self.columns)
        return i[inside], j[inside]

    def _segments(self, kind: Tensor, i: Tensor, j: Tensor, side: int) -> Tensor:
        """One sortable number (row, start, stop, kind) per row of each rectangle that has a kind."""
        layer, cell = kind.nonzero(as_tuple=True)
        kind, i, j = kind[layer, cell], i[cell], j[cell]
        stop = (j + side).clamp(max=self.columns)
        row = layer * self.rows + i
        packed = ((row * self.columns + j) * (self.columns + 1) + stop) * 2 + (kind.long() - 1)
        if side == 1:
            return packed
        below = torch.arange(side)
        in_matrix = i[:, None] + below < self.rows
        return (packed[:, None] + below * (self.columns * (self.columns + 1) * 2))[in_matrix]

    def _join(self, packed: Tensor) -> BlockStructure:
        """Sort the segments and join neighbours of the same kind into runs."""
        packed.numpy().sort()
        kind = (packed & 1).to(torch.uint8) + 1
        packed >>= 1
        stop = (packed % (self.columns + 1)).int()
        packed //= self.columns + 1
        start = (packed % self.columns).int()
        packed //= self.columns
        row = packed
        joined = torch.zeros(len(row) + 1, dtype=torch.bool)  # entry s: segment s continues segment s - 1
        joined[1:-1] = (row[1:] == row[:-1]) & (start[1:] == stop[:-1]) & (kind[1:] == kind[:-1])
        first, last = ~joined[:-1], ~joined[1:]
        row_ptr = torch.zeros(self.batch * self.heads * self.rows + 1, dtype=torch.int64)
        row_ptr[1:] = torch.bincount(row[first], minlength=len(row_ptr) - 1).cumsum(0)
        return BlockStructure(
            row_ptr, start[first], stop[last], kind[first], self.n, self.m, (self.bq, self.bk), self.batch, self.heads
        )

    def _diagonals(self) -> Tensor:
        """Kinds by ``j - i``, ascending, of a mask on ``q - k``: the first column from below, then the first row."""
        i = torch.cat([torch.arange(self.rows - 1, 0, -1), torch.zeros(self.columns, dtype=torch.int64)])
        j = torch.cat([torch.zeros(self.rows - 1, dtype=torch.int64), torch.arange(self.columns)])
        return torch.cat([self._blocks(*part)[0] for part in self._chunks(i, j)])

    def _read_off(self, diagonals: Tensor) -> BlockStructure:
        """Every row is a window on the diagonals, except for the last row and column, whose blocks may be cut off."""
        below, right = torch.arange(self.rows), torch.arange(self.columns)
        last_column = self._blocks(below, torch.full_like(below, self.columns - 1))[0]
        last_row = self._blocks(torch.full_like(right, self.rows - 1), right)[0]
        windows = diagonals.unfold(0, self.columns, 1)  # window w is row rows - 1 - w
        count = torch.zeros(self.rows + 1, dtype=torch.int64)
        runs = []
        height = max(1, _CELLS // self.columns)
        for top in range(0, self.rows, height):
            bottom = min(top + height, self.rows)
            grid = windows[self.rows - bottom : self.rows - top].flip(0)
            grid[:, -1] = last_column[top:bottom]
            if bottom == self.rows:
                grid[-1] = last_row
            row, *run = _runs(grid)
            count[top + 1 : bottom + 1] = torch.bincount(row, minlength=bottom - top)
            runs.append(run)
        start, stop, kind = (torch.cat(part) for part in zip(*runs, strict=True))
        return BlockStructure(count.cumsum(0), start, stop, kind, self.n, self.m, (self.bq, self.bk))

    def _decide(self, some: Tensor, every: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Replace "some, not all" by what the pairs of the block say."""
        some, every = some.clone(), every.clone()
        unsure = (some & ~every).any(1).any(0).nonzero().flatten()
        per_chunk = max(1, _PAIRS // (self.batch * self.heads * self.bq * self.bk))
        for cells in unsure.split(per_chunk):
            allowed, inside = block_pairs(self.mask, self.n, self.m, self.bq, self.bk, i[cells], j[cells])
            some[..., cells] = (allowed & inside).flatten(-2).any(-1)
            every[..., cells] = (allowed | ~inside).flatten(-2).all(-1)
        return some, every


def block_pairs(mask: Mask, n: int, m: int, bq: int, bk: int, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of the blocks (i, j): ``allowed`` (batch or 1, heads or 1, C, bq, bk), and ``inside`` (C, bq, bk).

    Pairs beyond the last query or key are clamped onto it, and marked by ``inside`` being False.
    """
    b = torch.arange(mask.batch or 1)[:, None, None, None, None]
    h = torch.arange(mask.heads or 1)[:, None, None, None]
    q = (i[:, None] * bq + torch.arange(bq))[:, :, None]
    k = (j[:, None] * bk + torch.arange(bk))[:, None, :]
    allowed = mask(b, h, q.clamp(max=n - 1), k.clamp(max=m - 1))
    return allowed.broadcast_to(mask.batch or 1, mask.heads or 1, len(i), bq, bk), (q < n) & (k < m)


def _kind(some: Tensor, every: Tensor) -> Tensor:
    """``NONE``, ``SOME`` or ``ALL`` as uint8, batch and heads in one axis."""
    return (some.to(torch.uint8) + every.to(torch.uint8)).flatten(0, 1)


def _runs(grid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(row, start, stop, kind)`` of the runs of equal kind in a grid of blocks, those of `NONE` left out."""
    first = torch.ones_like(grid, dtype=torch.bool)
    first[:, 1:] = grid[:, 1:] != grid[:, :-1]
    row, start = first.nonzero(as_tuple=True)
    stop = torch.cat([start[1:], torch.zeros_like(start[:1])])
    kind = grid[row, start]
    stop = torch.where(stop == 0, grid.shape[1], stop)  # the next run begins a new row
    there = kind != NONE
    return row[there], start[there].int(), stop[there].int(), kind[there]


def _mesh(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return i.flatten(), j.flatten()


def _least_part(length: Tensor, block: int) -> Tensor:
    """The shortest part when ``length`` is cut into blocks."""
    rest = length % block
    return torch.where(rest == 0, block, rest)
