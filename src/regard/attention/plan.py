"""How a mask is cut into dense tiles: which queries meet which keys, in few kernel calls.

The mask's block structure is read in *units* of a few consecutive tokens. A *tile* is a group of query units together
with all key units that any of them sees; where not all of it is visible it carries a mask. The query units of a tile
need not be neighbours: on a grid of tokens, pieces of neighbouring grid lines share most of their keys, so grouping
them makes tiles compact. Tiles with equally many keys run as one batch.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from regard.masks import ALL, NONE, SOME, BlockStructure, Mask
from regard.masks.table import Table

_PAIRS = 1 << 20  # scores per kernel call and thread: fits the caches, and hides the cost of the call
_SLACK = 1.07  # key lists are padded by at most this factor to share a batch
_WORTH_SPLITTING = 1024  # fully visible keys of a tile from which doing the rest apart pays off
_DENSE_ENOUGH = 0.8  # share of fully visible blocks from which finer units cannot gain much
_PATTERN_BYTES = 1 << 26  # evaluated mask blocks that a plan may hold
_TERM_BYTES = 1 << 25  # the same as float terms of the scores, which saves building them in each call


@dataclass(frozen=True, eq=False)
class Batch:
    """T tiles of R query units and C key units each. Units are numbered within a sequence, `layer` says in which.

    Tiles that are masked alike, as most are in patterns that repeat along the sequence, share one description of their
    mask: U is 1 then, and T otherwise.
    """

    layer: Tensor  # (T,) int64, (batch, head) layer of the mask: b * heads + h
    queries: Tensor  # (T, R) int64, query units; one past the last unit where padded
    keys: Tensor  # (T, C) int64, key units; 0 where padded
    kind: Tensor | None  # (U, R, C) uint8, NONE, SOME or ALL per block; None if all are ALL
    partial: Tensor  # (3, S) int64, tile, query slot and key slot of the blocks of kind SOME
    pattern: Tensor | None  # (S, query side, key side) bool, the mask there; None: evaluate it in each call
    query_run: "Run | None"  # where `queries` and `keys` are regular enough to be read without gathering
    key_run: "Run | None"
    joins: bool  # whether an earlier batch has seen other keys of these queries: the results are merged then
    pairs: int  # scores computed per lane


class Run(NamedTuple):
    """Tile t holds the consecutive units from ``first + t * step`` on, and all tiles are in one layer."""

    first: int
    step: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Tiles that cover every allowed pair exactly once.

    Attributes:
        side: tokens per (query unit, key unit).
        batches: all tiles. A query unit that sees nothing is in no tile.
        layers: (batch, heads) that the mask distinguishes, 1 where it does not.
        padded: whether some tile has a query slot without a query unit.
        density: computed pairs as a share of all.
        cost: modelled time, in pairs of a large dense tile.
        budget: scores per kernel call and query head of a group.
        terms: the masks of batches as terms of the scores, kept after the first call if all of them are small.
    """

    side: tuple[int, int]
    batches: tuple[Batch, ...]
    layers: tuple[int, int]
    padded: bool
    density: float
    cost: float
    budget: int
    terms: dict[tuple[Batch, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @property
    def keeps_terms(self) -> bool:
        kinds = [batch.kind for batch in self.batches if batch.kind is not None]
        return sum(kind.numel() for kind in kinds) * math.prod(self.side) * 4 <= _TERM_BYTES


_plans: WeakKeyDictionary[Mask, dict[tuple[int, int, int, torch.device], Plan]] = WeakKeyDictionary()
_kept: deque[Mask] = deque(maxlen=16)  # equal masks are often made anew for every call; this keeps their plans alive


def plan(mask: Mask, n: int, m: int, groups: int, device: torch.device) -> Plan:
    """The plan for n queries and m keys, with ``groups`` query heads per key head; made once per mask.

    The plan of a mask that holds tables (lists chosen at run time) is forgotten with the mask.
    """
    plans = _plans.get(mask)
    if plans is None:
        plans = _plans[mask] = {}
        if not holds_table(mask):
            _kept.append(mask)
    key = (n, m, groups, device)
    if key not in plans:
        plans[key] = _make(mask.to("cpu"), n, m, groups, device)
    return plans[key]


def holds_table(mask: Mask) -> bool:
    """Whether a part of the mask is a table, such as lists of blocks chosen at run time."""
    return any(isinstance(leaf, Table) for leaf in _leaves(mask))


def pattern(batch: Batch, mask: Mask, side: tuple[int, int], heads: int, n: int, m: int) -> Tensor:
    """The mask at the partly visible blocks of a batch: (S, query side, key side) bool."""
    tile, row, column = batch.partial
    return _pairs(mask, side, heads, n, m, batch.layer[tile], batch.queries[tile, row], batch.keys[tile, column])


def _pairs(
    mask: Mask, side: tuple[int, int], heads: int, n: int, m: int, layer: Tensor, row: Tensor, column: Tensor
) -> Tensor:
    """The pairs of blocks (row, column), numbered in units: (S, query side, key side) bool."""
    layer = layer[:, None, None]
    q = (row[:, None] * side[0] + torch.arange(side[0], device=row.device))[:, :, None]
    k = (column[:, None] * side[1] + torch.arange(side[1], device=row.device))[:, None, :]
    allowed = mask(layer // heads, layer % heads, q.clamp(max=n - 1), k.clamp(max=m - 1)) & (k < m)
    return allowed.broadcast_to(len(row), *side)


def _make(mask: Mask, n: int, m: int, groups: int, device: torch.device) -> Plan:
    best: _Cut | None = None
    for side in _sides(mask, n):
        structure = mask.blocks(n, m, side)
        cells = structure.cells()
        for stride in {1, _stride(structure)}:
            for rows in {min(queries // side[0], structure.num_query_blocks // stride) for queries in (64, 128, 256)}:
                if rows:
                    cut = _Cut(structure, cells, rows, stride)
                    best = cut if best is None or cut.cost < 0.95 * best.cost else best
        assert best is not None
        kind = best.cells[2]
        if (kind == ALL).sum() > _DENSE_ENOUGH * len(kind):
            break
    assert best is not None
    return best.plan(mask, groups, device)


def _sides(mask: Mask, n: int) -> list[tuple[int, int]]:
    """Unit sizes to try, coarse ones first; the table's own where blocks were chosen at run time."""
    tables = [leaf.block_size for leaf in _leaves(mask) if isinstance(leaf, Table)]
    if tables and min(min(size) for size in tables) >= 8:
        bq, bk = (math.gcd(64, *sizes) for sizes in zip(*tables, strict=True))
        sides = [(bq, bk)]
    else:
        sides = [(64, 64), (16, 16), (8, 8), (8, 2)]
    most = 1 << (n - 1).bit_length()  # few queries (decoding) need no tall units
    return list(dict.fromkeys((min(bq, most), bk) for bq, bk in sides))


def _leaves(mask: Mask) -> Iterator[Mask]:
    """The masks an expression is made of."""
    inner = [getattr(mask, name, ()) for name in ("mask", "parts", "masks")]
    parts = [part for found in inner for part in (found if isinstance(found, tuple) else (found,))]
    if not parts:
        yield mask
    for part in parts:
        yield from _leaves(part)


def _stride(structure: BlockStructure) -> int:
    """Query units from one line of a token grid to the next, read off the distance between runs; 1 without a grid."""
    start, _, _ = structure.row(structure.num_query_blocks // 2)
    return int(start.diff().mode().values) if len(start) > 2 else 1


class _Cut:
    """Tiles of ``rows`` query units, ``stride`` units apart.

    Attributes:
        cells: query row, key unit and kind of each visited block, see `BlockStructure.cells`.
        tile, slot: (layers * query units,) where each query row has its place.
        needed: (tiles, key units) bool.
        cost: see `Plan`.
    """

    def __init__(self, structure: BlockStructure, cells: tuple[Tensor, Tensor, Tensor], rows: int, stride: int):
        self.structure, self.cells, self.rows, self.stride = structure, cells, rows, stride
        self.span = rows * stride
        units, layers = structure.num_query_blocks, structure.batch * structure.heads
        self.per_layer = -(-units // self.span) * stride
        row = torch.arange(layers * units)
        unit = row % units
        self.tile = row // units * self.per_layer + unit // self.span * stride + unit % stride
        self.slot = unit % self.span // stride
        self.needed = torch.zeros(layers * self.per_layer, structure.num_key_blocks, dtype=torch.bool)
        self.needed.view(-1)[self._place()] = True
        queries = rows * structure.block_size[0]
        length = self.needed.sum(1) * structure.block_size[1]
        # Measured on CPU with D = 64: a tile has a fixed part, and few queries make poor use of the kernel.
        self.cost = float(((length + 32 * (length > 0)) * queries).sum() * (0.85 + 25 / queries))

    def _place(self) -> Tensor:
        """(cells,) where each visited block falls in `needed`."""
        return self.tile[self.cells[0]] * self.structure.num_key_blocks + self.cells[1]

    def plan(self, mask: Mask, groups: int, device: torch.device) -> Plan:
        """Tiles that are mostly visible are done in two parts, so that only the rest of them carries a mask."""
        s = self.structure
        bq, bk = s.block_size
        _, column, kind = self.cells
        if s.m % bk:  # the last unit reaches beyond the last key
            kind = torch.where(column == s.num_key_blocks - 1, SOME, kind)
        visible = torch.zeros(self.needed.numel(), dtype=torch.int16)
        seen = self._place()[kind == ALL]
        visible.index_add_(0, seen, visible.new_ones(1).expand(len(seen)))
        whole = visible.view(self.needed.shape) == self.rows
        mostly = (whole == self.needed).all(1) | (whole.sum(1) * bk >= _WORTH_SPLITTING)
        whole &= mostly[:, None]
        rest = self.needed & ~whole
        cells = _masks(self, mask, rest, kind)
        budget = _PAIRS * torch.get_num_threads() // groups
        units = budget // (self.rows * bq * bk)
        # only masked tiles can be padded
        batches = [self._batch(tiles, whole[tiles], None, False) for tiles in _alike(whole.sum(1), None, 1.0, units)]
        for wanted, joins in ((rest & ~mostly[:, None], False), (rest & mostly[:, None], True)):
            for tiles in _alike(wanted.sum(1), cells.signature, _SLACK, units):
                batches.append(self._batch(tiles, wanted[tiles], cells, joins))
        computed = sum(batch.keys.numel() for batch in batches) * self.rows * bq * bk
        return Plan(
            s.block_size,
            tuple(_to(batch, device) for batch in batches),
            (s.batch, s.heads),
            s.num_query_blocks % self.span != 0,
            computed / (s.n * s.m * s.batch * s.heads),
            self.cost,
            budget,
        )

    def _batch(self, tiles: Tensor, wanted: Tensor, cells: "_Cells | None", joins: bool) -> Batch:
        length = wanted.sum(1)
        width = int(length.max())
        keys = wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        keys = keys * (torch.arange(width) < length[:, None])
        within = tiles % self.per_layer
        first = within // self.stride * self.span + within % self.stride
        queries = first[:, None] + torch.arange(self.rows) * self.stride
        queries = queries.clamp(max=self.structure.num_query_blocks)
        layer = tiles // self.per_layer
        runs = _run(layer, queries), _run(layer, keys)
        pairs = queries.numel() * width * math.prod(self.structure.block_size)
        if cells is None:
            nothing = torch.zeros(3, 0, dtype=torch.int64)
            return Batch(layer, queries, keys, None, nothing, None, *runs, joins, pairs)
        local, own = cells.of(tiles)
        kind = torch.full((len(tiles), self.rows, width), NONE, dtype=torch.uint8)
        number = torch.full(kind.shape, -1)
        kind[local, cells.slot[own], cells.place[own]] = cells.kind[own]
        number[local, cells.slot[own], cells.place[own]] = cells.number[own]
        some = kind == SOME
        pattern = None if cells.pattern is None else cells.pattern[number[some]]
        if pattern is not None and len(tiles) > 1 and torch.equal(kind, kind[:1].expand_as(kind)):
            each = pattern.unflatten(0, (len(tiles), -1))
            if torch.equal(each, each[:1].expand_as(each)):
                kind, some, pattern = kind[:1], some[:1], each[0].clone()
        visible = bool((kind == ALL).all())
        partial = some.nonzero().T.contiguous()
        return Batch(layer, queries, keys, None if visible else kind, partial, pattern, *runs, joins, pairs)


@dataclass(frozen=True, eq=False)
class _Cells:
    """The visited blocks that stand in masked tiles, sorted by tile."""

    tile: Tensor
    slot: Tensor
    place: Tensor  # key slot
    kind: Tensor
    number: Tensor  # index into pattern of the blocks of kind SOME
    pattern: Tensor | None  # as far as they fit in memory
    signature: Tensor  # (tiles,) equal for tiles that are masked alike

    def of(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of some tiles: each one's position in ``tiles``, and its index here."""
        first = torch.searchsorted(self.tile, tiles)
        count = torch.searchsorted(self.tile, tiles, right=True) - first
        local = torch.repeat_interleave(count)
        skipped = count.cumsum(0) - count
        return local, torch.arange(len(local)) - skipped[local] + first[local]


def _masks(cut: _Cut, mask: Mask, wanted: Tensor, kind: Tensor) -> _Cells:
    """The cells in the key units that are wanted, and what their tiles look like."""
    s = cut.structure
    row, column, _ = cut.cells
    inside = wanted.view(-1)[cut._place()].nonzero().flatten()
    inside = inside[cut.tile[row[inside]].argsort(stable=True)]
    row, column, kind = row[inside], column[inside], kind[inside]
    tile, slot = cut.tile[row], cut.slot[row]
    place = (wanted.cumsum(1, dtype=torch.int32) - 1)[tile, column].long()
    some = kind == SOME
    number = some.cumsum(0) - 1
    if int(some.sum()) * math.prod(s.block_size) > _PATTERN_BYTES:
        return _Cells(tile, slot, place, kind, number, None, torch.zeros(len(wanted)))
    layer, unit = row // s.num_query_blocks, row % s.num_query_blocks
    pattern = _pairs(mask, s.block_size, s.heads, s.n, s.m, layer[some], unit[some], column[some])
    # Tiles with equal signatures are compared before they share a mask, so collisions do no harm.
    weight = torch.rand(math.prod(s.block_size), generator=torch.Generator().manual_seed(0))
    look = kind.float()
    look[some] = pattern.flatten(1).float() @ weight
    look *= torch.sin((slot * 7919 + place).float() + 1.0)
    signature = torch.zeros(len(wanted)).index_add_(0, tile, look)
    return _Cells(tile, slot, place, kind, number, pattern, signature)


def _alike(length: Tensor, signature: Tensor | None, slack: float, budget: int) -> Iterator[Tensor]:
    """Tiles whose numbers of key units differ at most by ``slack``, ``budget`` in all; those masked alike apart."""
    if signature is None:
        signature = torch.zeros(len(length))
    _, look, count = torch.unique(signature, return_inverse=True, return_counts=True)
    look[count[look] == 1] = len(count)  # one of a kind: with the others of its length
    order = look.argsort(stable=True)
    order = order[length[order].argsort(stable=True)]
    order = order[length[order] > 0]
    lengths, looks = length[order].tolist(), look[order].tolist()
    begin = 0
    for end in range(1, len(lengths) + 1):
        if (
            end == len(lengths)
            or (looks[end] != looks[begin])
            or lengths[end] > lengths[begin] * slack
            or (end + 1 - begin) * lengths[end] > budget
        ):
            yield order[begin:end]
            begin = end


def _run(layer: Tensor, units: Tensor) -> Run | None:
    first = int(units[0, 0])
    step = int(units[1, 0]) - first if len(units) > 1 else units.shape[1]
    regular = first + torch.arange(len(units))[:, None] * step + torch.arange(units.shape[1])
    same_layer = bool((layer == layer[0]).all())
    return Run(first, step) if step > 0 and same_layer and torch.equal(units, regular) else None


def _to(batch: Batch, device: torch.device) -> Batch:
    tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(batch).items() if isinstance(x, Tensor)}
    return replace(batch, **tensors)
