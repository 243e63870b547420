"""How a grid is cut into tiles of queries, each with the one box of keys that it needs; all of it on plain numbers.

Planning runs in NumPy and not in torch, so that it goes on as usual where torch traces a program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, reduce
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from regard.masks.neighborhood import NeighborhoodAxis

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PAIRS = 1 << 22  # a tile has no more pairs than this
_LONGEST = 512  # queries of a tile along one axis


class Axis(NamedTuple):
    """What queries see along one axis of a grid.

    Tokens of equal remainder modulo ``dilation`` are a group; in its own group the query at position ``p`` sees an
    interval of positions, whose ends never move back as p grows.

    Attributes:
        length: queries, and keys unless padded.
        window: keys that a query sees.
        dilation: 1 for neighbours.
        stride: this many queries share a window (as `masks.neighborhood` says).
        causal: the window ends at the query.
        border: "stop": the window stops at a border and keeps its size (`masks.neighborhood`). "cut": it goes on, and
            what is beyond is no key. "pad": it goes on, over keys that were lengthened by ``dilation * halo`` at both
            ends. In the last two the window is a halo around the ``key_stride`` keys that ``stride`` queries stand for,
            ``halo = (window - key_stride) / 2``; a stride of more than 1 goes with a dilation of 1.
        key_stride: keys per ``stride`` queries, if not as many; for "cut" and "pad".
    """

    length: int
    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False
    border: str = "stop"
    key_stride: int = 1

    @property
    def halo(self) -> int:
        return (self.window - self.key_stride) // 2

    @property
    def key_length(self) -> int:
        keys = self.length // self.stride * self.key_stride if self.border != "stop" else self.length
        return keys + (self.border == "pad") * 2 * self.dilation * self.halo

    def bounds(self, p: Ints, size: Ints) -> tuple[Ints, Ints]:
        """First visible position, and one past the last, for position ``p`` of a group of ``size`` queries."""
        if self.border != "stop":
            start = p // self.stride * self.key_stride
            if self.border == "pad":
                return start, start + self.window
            keys = size // self.stride * self.key_stride
            return np.maximum(start - self.halo, 0), np.minimum(start - self.halo + self.window, keys)
        leader = p // self.stride * self.stride + (self.stride - 1 if self.causal else self.stride // 2)
        leader = np.minimum(leader, size - 1)
        if self.causal:
            return np.maximum(leader - self.window + 1, 0), p + 1
        start = np.minimum(np.maximum(leader - self.window // 2, 0), size - self.window)
        return start, start + self.window


def stopping(axes: Iterable[NeighborhoodAxis]) -> tuple[Axis, ...]:
    """The axes of `masks.neighborhood`, whose windows stop at the borders."""
    return tuple(Axis(a.length, a.window, a.dilation, a.stride, a.causal) for a in axes)


class Extent(NamedTuple):
    """What a cut amounts to: tiles, queries and keys per tile, and kinds of tiles."""

    tiles: int
    queries: int
    keys: int
    kinds: int


class Tiling(NamedTuple):
    """A grid cut into tiles, ordered by kind: tiles of a kind have the same mask inside their box.

    Attributes:
        counts: tiles of each kind.
        queries: (tiles, T) flat indices; slots without a query read query 0 and are masked.
        keys: (tiles, U) flat indices.
        masks: (kinds, T, U); None if everything is visible.
        slot: (N,) where each query stands among the tiles' slots.
        key_slots: (tiles * U,) the slots that hold key 0, then those that hold key 1, ...
        key_starts: (M,) where each key's slots begin in ``key_slots``.
    """

    counts: tuple[int, ...]
    queries: Ints
    keys: Ints
    masks: Bools | None
    slot: Ints
    key_slots: Ints
    key_starts: Ints


@lru_cache(maxsize=64)
def tiling(axes: tuple[Axis, ...], size: tuple[int, ...]) -> Tiling:
    """The tiles of ``size`` queries."""
    lines = [_line(axis, n) for axis, n in zip(axes, size, strict=True)]
    kinds = [len(line.masks) for line in lines]
    kind = _outer([line.kind for line in lines], kinds)
    order = kind.argsort(kind="stable")
    queries = _outer([line.queries for line in lines], [axis.length for axis in axes])[order]
    keys = _outer([line.keys for line in lines], [axis.key_length for axis in axes])[order]
    real = _outer([line.real for line in lines])[order]
    masks = _outer([line.masks for line in lines])
    slot = np.empty(math.prod(axis.length for axis in axes), dtype=np.int64)
    slot[queries[real]] = np.flatnonzero(real)
    found = np.bincount(keys.ravel(), minlength=math.prod(axis.key_length for axis in axes))
    return Tiling(
        counts=tuple(np.bincount(kind, minlength=math.prod(kinds)).tolist()),
        queries=np.where(real, queries, 0),
        keys=keys,
        masks=None if masks.all() else masks,
        slot=slot,
        key_slots=keys.ravel().argsort(kind="stable"),
        key_starts=found.cumsum() - found,
    )


@lru_cache(maxsize=64)
def offsets(axes: tuple[Axis, ...], size: tuple[int, ...]) -> Ints:
    """Key position - query position of the tiles: (axes, kinds, T, U)."""
    lines = [_line(axis, n).offsets for axis, n in zip(axes, size, strict=True)]
    return _along(lines)


@lru_cache(maxsize=256)
def tile_size(axes: tuple[Axis, ...], lanes: int) -> tuple[int, ...]:
    """Queries per tile on each axis: the cheapest by `cost`, for so many heads (of all batch items together)."""
    choices = [[(n, extent(axis, n)) for n in _candidates(axis)] for axis in axes]
    best, found = math.inf, tuple(1 for _ in axes)
    for some in product(*choices):
        extents = [each for _, each in some]
        if math.prod(each.queries * each.keys for each in extents) <= _PAIRS:
            price = cost(extents, lanes)
            if price < best:
                best, found = price, tuple(n for n, _ in some)
    return found


@lru_cache(maxsize=1 << 14)
def extent(axis: Axis, size: int) -> Extent:
    """What tiles of ``size`` queries amount to on one axis."""
    cut = _cut(axis, size)
    return Extent(len(cut.kind), size, cut.width, len(cut.kinds))


def cost(extents: Sequence[Extent], lanes: int) -> float:
    """Time to run the tiles, in units of one visited pair of one head.

    Measured on a CPU with AVX2 and heads of 32 and 64 channels: a query or a key costs as much as 50 pairs (it is
    gathered, and narrow tiles slow the kernel), a tile 1,500, and a call of the kernel 15,000.
    """
    tiles, queries, keys, kinds = (math.prod(part) for part in zip(*extents, strict=True))
    return lanes * tiles * (queries * keys + 50 * (queries + keys) + 1500) + 15_000 * kinds


def _candidates(axis: Axis) -> list[int]:
    """Sizes that cut the longest group into equal parts, and multiples of the stride."""
    longest = -(-axis.length // axis.dilation)
    parts = {-(-longest // count) for count in range(1, longest + 1)}
    strides = range(axis.stride, longest + 1, axis.stride) if axis.stride > 1 else ()
    return sorted(n for n in parts.union(strides) if n <= _LONGEST)


class _Cut(NamedTuple):
    """One axis in tiles: group, first position and first key position of each, and which of the kinds it is."""

    group: Ints
    first: Ints
    start: Ints
    width: int
    kind: Ints
    kinds: Ints  # rows of: first visible slots, ends of the visible slots, first - start


class _Line(NamedTuple):
    """The same with indices: queries (tiles, T), real (tiles, T), keys (tiles, U), masks and offsets (kinds, T, U)."""

    queries: Ints
    real: Bools
    keys: Ints
    kind: Ints
    masks: Bools
    offsets: Ints


def group_sizes(axis: Axis, length: int) -> Ints:
    """Tokens in each group of an axis of that length."""
    return (length - np.arange(min(axis.dilation, axis.length)) + axis.dilation - 1) // axis.dilation


def _cut(axis: Axis, size: int) -> _Cut:
    held, key_held = group_sizes(axis, axis.length), group_sizes(axis, axis.key_length)
    tiles = -(-held // size)
    group = np.arange(len(held)).repeat(tiles)
    first = (np.arange(len(group)) - (tiles.cumsum() - tiles)[group]) * size
    p = first[:, None] + np.arange(size)
    real = p < held[group, None]
    low, high = axis.bounds(np.minimum(p, held[group, None] - 1), held[group, None])
    width = int((high[:, -1] - low[:, 0]).max())
    start = np.maximum(np.minimum(low[:, 0], key_held[group] - width), 0)
    end = np.where(real, high, low)  # slots without a query see nothing
    signature = np.concatenate([low - start[:, None], end - start[:, None], (first - start)[:, None]], 1)
    kinds, kind = np.unique(signature, axis=0, return_inverse=True)
    return _Cut(group, first, start, width, kind.ravel(), kinds)


def _line(axis: Axis, size: int) -> _Line:
    cut = _cut(axis, size)
    inside = np.arange(cut.width)
    low, end, offset = cut.kinds[:, :size, None], cut.kinds[:, size:-1, None], cut.kinds[:, -1:, None]
    masks = (low <= inside) & (inside < end)
    p = cut.first[:, None] + np.arange(size)
    last = group_sizes(axis, axis.key_length)[cut.group, None] - 1
    return _Line(
        queries=p * axis.dilation + cut.group[:, None],
        real=p < group_sizes(axis, axis.length)[cut.group, None],
        keys=np.minimum(cut.start[:, None] + inside, last) * axis.dilation + cut.group[:, None],
        kind=cut.kind,
        masks=masks,
        offsets=np.broadcast_to(inside - np.arange(size)[:, None] - offset, masks.shape),
    )


def _along(parts: Sequence[Ints]) -> Ints:
    """Coordinates per axis, each spread over the combinations with the other axes: (axes, ...) as `_outer` has them."""
    ones = [1] * len(parts)
    return np.stack(
        [_outer([x if i == j else np.zeros_like(x) for j, x in enumerate(parts)], ones) for i in range(len(parts))]
    )


def _outer(parts: Sequence[NDArray], sizes: Sequence[int] | None = None) -> NDArray:  # type: ignore[type-arg]
    """All combinations of (t_1, a_1, ...), (t_2, a_2, ...), ..., row-major: (t_1 t_2 ..., a_1 a_2 ..., ...).

    With ``sizes`` they are mixed-radix numbers, without they are conditions that must all hold.
    """

    def join(left: NDArray, right: NDArray, rule: Callable[[NDArray, NDArray], NDArray]) -> NDArray:  # type: ignore[type-arg]
        both = rule(
            left.reshape([n for d in left.shape for n in (d, 1)]),
            right.reshape([n for d in right.shape for n in (1, d)]),
        )
        return both.reshape([a * b for a, b in zip(left.shape, right.shape, strict=True)])

    if sizes is None:
        return reduce(lambda a, b: join(a, b, np.logical_and), parts)
    total = parts[0]
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        total = join(total, part, lambda a, b, size=size: a * size + b)  # type: ignore[misc]
    return total


class Slots(NamedTuple):
    """The window of every query of a grid, written out: N queries, S = Π windows slots, row-major.

    Attributes:
        keys: (N, S) flat indices.
        visible: (N, S); None if all are.
        offsets: (axes, N, S), key position - query position.
    """

    keys: Ints
    visible: Bools | None
    offsets: Ints


@lru_cache(maxsize=16)
def slots(axes: tuple[Axis, ...]) -> Slots:
    """Which key stands in which slot; a window that is smaller than usual leaves its last slots empty."""
    lines = [_slots(axis) for axis in axes]
    visible = _outer([line[1] for line in lines])
    keys = _outer([line[0] for line in lines], [axis.key_length for axis in axes])
    return Slots(keys, None if visible.all() else visible, _along([line[2] for line in lines]))


def _slots(axis: Axis) -> tuple[Ints, Bools, Ints]:
    query = np.arange(axis.length)
    p, group = query // axis.dilation, query % axis.dilation
    start, end = axis.bounds(p, group_sizes(axis, axis.length)[group])
    position = start[:, None] + np.arange(axis.window)
    visible = position < end[:, None]
    position = np.where(visible, position, start[:, None])
    return position * axis.dilation + group[:, None], visible, position - p[:, None]
