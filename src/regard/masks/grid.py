"""Masks on 1-, 2- and 3-D token grids: products of one mask per axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

from regard.errors import ArgumentError, ShapeError
from regard.masks.base import Index, Mask
from regard.masks.sequence import Interval, at_least

T = TypeVar("T")
Box = list[tuple[Tensor, Tensor]]
"""Half-open ranges of coordinates, one per axis, each a pair of (R,) tensors."""


@dataclass(frozen=True, repr=False)
class Product(Mask):
    """Tokens stand on a grid in row-major order, and a pair is allowed if every axis allows its two coordinates.

    A run of tokens is a union of at most ``2 * axes - 1`` boxes, and a product mask is answered exactly on a pair of
    boxes by its axes' answers.
    """

    grid: tuple[int, ...]
    axes: tuple[Mask, ...]
    name: str = field(default="", compare=False)

    @property
    def lengths(self) -> tuple[int | None, int | None]:  # type: ignore[override]
        return math.prod(self.grid), math.prod(self.grid)

    @property
    def exact(self) -> bool:  # type: ignore[override]
        return all(axis.exact for axis in self.axes)

    @property
    def settles(self) -> bool:  # type: ignore[override]
        return len(self.axes) == 1 and self.axes[0].settles

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        queries, keys = self._coordinates(q_idx), self._coordinates(k_idx)
        allowed = self.axes[0](b, h, queries[0], keys[0])
        for axis, q, k in zip(self.axes[1:], queries[1:], keys[1:], strict=True):
            allowed = allowed & axis(b, h, q, k)
        return allowed

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        some = torch.zeros_like(q0, dtype=torch.bool)
        every = torch.ones_like(some)
        key_boxes = self._boxes(k0, k1 - 1)
        for queries_here, queries in self._boxes(q0, q1 - 1):
            for keys_here, keys in key_boxes:
                both = queries_here & keys_here
                if both.all():  # the usual case at the finest level, worth the gathers it saves
                    box_some, box_every = self._box_pair(queries, keys)
                    some, every = some | box_some, every & box_every
                elif both.any():
                    here = both.nonzero().flatten()
                    box_some, box_every = self._box_pair(_pick(queries, here), _pick(keys, here))
                    some[here] |= box_some
                    every[here] &= box_every
        return some, every

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        if len(self.axes) == 1:
            return self.axes[0].settled(q0, q1, k0, k1, height, width)
        return super().settled(q0, q1, k0, k1, height, width)

    def count(self, n: int, m: int) -> int | None:
        if (n, m) != self.lengths:
            return None
        counts = [axis.count(size, size) for axis, size in zip(self.axes, self.grid, strict=True)]
        return None if None in counts else math.prod(count for count in counts if count is not None)

    def __repr__(self) -> str:
        return self.name or f"product({self.grid}, {self.axes})"

    def _coordinates(self, index: Tensor) -> list[Tensor]:
        coordinates = []
        for size in reversed(self.grid[1:]):
            coordinates.append(index % size)
            index = index // size
        return [index, *reversed(coordinates)]

    def _boxes(self, first: Tensor, last: Tensor) -> list[tuple[Tensor, Box]]:
        """The boxes that make up the tokens ``first..last`` (inclusive), each with where it is not empty."""
        head, tail = self._coordinates(first), self._coordinates(last)
        whole = [(torch.zeros_like(first), torch.full_like(first, size)) for size in self.grid]
        same = torch.ones_like(first, dtype=torch.bool)  # head and tail agree on all axes before this one
        boxes = []
        for axis, size in enumerate(self.grid):
            end = int(axis == len(self.grid) - 1)  # on the last axis the two end points themselves belong to the run
            start = head[axis] + 1 - end
            stop = torch.where(same, tail[axis] + end, size)
            boxes.append((start < stop, [*_points(head[:axis]), (start, stop), *whole[axis + 1 :]]))
            if axis:
                stop = tail[axis] + end
                boxes.append((~same & (stop > 0), [*_points(tail[:axis]), (whole[axis][0], stop), *whole[axis + 1 :]]))
            same = same & (head[axis] == tail[axis])
        return boxes

    def _box_pair(self, queries: Box, keys: Box) -> tuple[Tensor, Tensor]:
        answers = (axis.rect(*q, *k) for axis, q, k in zip(self.axes, queries, keys, strict=True))
        some, every = zip(*answers, strict=True)
        return reduce(Tensor.__and__, some).flatten(), reduce(Tensor.__and__, every).flatten()


@dataclass(frozen=True)
class Segments(Interval):
    """``(q - border) // size == (k - border) // size``."""

    size: int
    border: int = 0

    def low(self, q: Tensor) -> Tensor:
        return (q - self.border) // self.size * self.size + self.border

    def high(self, q: Tensor) -> Tensor:
        return self.low(q) + self.size


@dataclass(frozen=True)
class Haloed(Interval):
    """Keys in the query's block of ``block`` tokens or at most ``halo`` tokens beside it."""

    block: int
    halo: int

    def low(self, q: Tensor) -> Tensor:
        return q // self.block * self.block - self.halo

    def high(self, q: Tensor) -> Tensor:
        return (q // self.block + 1) * self.block + self.halo


def product(grid: Sequence[int], axes: Sequence[Mask]) -> Mask:
    """A mask on a token grid from one mask per axis, e.g. rows of an image: ``product((H, W), [band(0, 0), full()])``.

    Args:
        grid: tokens per axis; tokens are flattened in row-major order.
        axes: for each axis a mask on its coordinates. None may distinguish heads or batch items.
    """
    shape = grid_shape(grid)
    if len(axes) != len(shape):
        raise ShapeError(f"axes must hold one mask per axis of the grid {shape}, got {len(axes)}")
    for axis, (mask, size) in enumerate(zip(axes, shape, strict=True)):
        if mask.heads is not None or mask.batch is not None:
            raise ShapeError(f"axes[{axis}] must not distinguish heads or batch items, got {mask!r}")
        mask.check(size, size)
    return Product(shape, tuple(axes))


def windows(grid: Sequence[int], window: int | Sequence[int]) -> Mask:
    """Non-overlapping windows: tokens of one window see each other.

    Args:
        grid: tokens per axis.
        window: window size, one number or one per axis. The last window is smaller where it does not divide.
    """
    shape = grid_shape(grid)
    sizes = per_axis("window", window, shape, 1)
    return Product(shape, tuple(Segments(size) for size in sizes), f"windows({shape}, {sizes})")


def shifted_windows(grid: Sequence[int], window: int | Sequence[int], shift: int | Sequence[int] | None = None) -> Mask:
    """The shifted windows of Swin transformers (arXiv:2103.14030).

    Swin rolls the grid by ``-shift``, cuts it into windows, and masks pairs that are neighbours only because of the
    roll. What remains visible is what is said here without any rolling: borders at ``shift, shift + window, ...`` cut
    each axis into segments, and the first and last segments are smaller.

    Args:
        grid: tokens per axis.
        window: window size, one number or one per axis.
        shift: offset of the borders, half the window if None. Swin itself sets it to 0 on a grid that is not larger
            than the window; here it is used as given.
    """
    shape = grid_shape(grid)
    sizes = per_axis("window", window, shape, 1)
    shifts = tuple(size // 2 for size in sizes) if shift is None else per_axis("shift", shift, shape, 0)
    if any(offset >= size for offset, size in zip(shifts, sizes, strict=True)):
        raise ArgumentError(f"shift must be smaller than the window, got shift={shifts} for window={sizes}")
    axes = tuple(Segments(size, offset) for size, offset in zip(sizes, shifts, strict=True))
    return Product(shape, axes, f"shifted_windows({shape}, {sizes}, {shifts})")


def halo(grid: Sequence[int], block: int | Sequence[int], halo: int | Sequence[int]) -> Mask:
    """Blocked local attention with a halo (HaloNet, arXiv:2103.12731).

    The queries of a block see the block and ``halo`` tokens around it, as far as they lie on the grid. (HaloNet itself
    pads with zeros that take part in the softmax; a mask has no such keys.)

    Args:
        grid: tokens per axis.
        block, halo: sizes, one number or one per axis. The last block is smaller where it does not divide.
    """
    shape = grid_shape(grid)
    sizes, widths = per_axis("block", block, shape, 1), per_axis("halo", halo, shape, 0)
    axes = tuple(Haloed(size, width) for size, width in zip(sizes, widths, strict=True))
    return Product(shape, axes, f"halo({shape}, {sizes}, {widths})")


def grid_shape(grid: Sequence[int]) -> tuple[int, ...]:
    """``grid`` as a tuple, or an error if it is no list of positive sizes."""
    if isinstance(grid, int) or not grid:
        raise ArgumentError(f"grid must be a sequence of sizes, one per axis, got {grid!r}")
    return tuple(at_least("grid", size, 1) for size in grid)


def per_axis(name: str, value: int | Sequence[int], grid: tuple[int, ...], least: int) -> tuple[int, ...]:
    """One integer of at least ``least`` per axis of the grid; a single one stands for all axes."""
    return tuple(at_least(name, each, least) for each in spread(name, value, grid))


def spread(name: str, value: T | Sequence[T], grid: tuple[int, ...]) -> tuple[T, ...]:
    """One value per axis of the grid; a single one stands for all axes."""
    values: tuple[T, ...] = tuple(value) if isinstance(value, Sequence) else (value,) * len(grid)
    if len(values) != len(grid):
        raise ArgumentError(f"{name} must be one value or one per axis of the grid {grid}, got {value!r}")
    return values


def _points(coordinates: list[Tensor]) -> Box:
    return [(c, c + 1) for c in coordinates]


def _pick(box: Box, here: Tensor) -> Box:
    return [(start[here], stop[here]) for start, stop in box]
