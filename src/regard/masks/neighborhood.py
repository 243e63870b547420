"""Generalized neighborhood attention on 1-, 2- and 3-D grids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.masks.base import Index, Mask
from regard.masks.grid import Product, grid_shape, per_axis, spread
from regard.masks.table import from_dense

_SHORT = 1 << 10  # axes up to this length may be kept as a matrix
_LONG = 1 << 16  # axes beyond this length are not even kept as a table


@dataclass(frozen=True)
class NeighborhoodAxis(Mask):
    """One axis of `neighborhood`.

    The axis splits into ``dilation`` groups of tokens with equal ``i % dilation``; token ``i`` has position
    ``p = i // dilation`` in its group. Inside a group a query sees one interval of positions, whose ends never move
    back as ``p`` grows.
    """

    length: int
    window: int
    dilation: int
    stride: int
    causal: bool

    settles = True

    @property
    def lengths(self) -> tuple[int | None, int | None]:  # type: ignore[override]
        return self.length, self.length

    def start(self, p: Tensor, size: Tensor) -> Tensor:
        """First visible position for the query at position ``p`` of a group of ``size`` tokens."""
        leader = p // self.stride * self.stride + (self.stride - 1 if self.causal else self.stride // 2)
        leader = torch.minimum(leader, size - 1)
        if self.causal:
            return (leader - self.window + 1).clamp(min=0)
        return torch.minimum((leader - self.window // 2).clamp(min=0), size - self.window)

    def end(self, p: Tensor, size: Tensor) -> Tensor:
        """One past the last visible position."""
        return p + 1 if self.causal else self.start(p, size) + self.window

    def size(self, group: Tensor) -> Tensor:
        """Tokens in a dilation group."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        start, end = self.bounds(q_idx)
        key = k_idx // self.dilation
        visible = (start <= key) & (key < end)
        return visible if self.dilation == 1 else visible & (k_idx % self.dilation == q_idx % self.dilation)

    def bounds(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """First visible position, and one past the last, of the queries at coordinates ``q``."""
        p, size = q // self.dilation, self.size(q % self.dilation)
        return self.start(p, size), self.end(p, size)

    @cached_property
    def _all_bounds(self) -> tuple[Tensor, Tensor]:
        return self.bounds(torch.arange(self.length))

    @cached_property
    def _dense(self) -> Mask:
        return from_dense(self.dense(self.length))

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        if self.dilation == 1:
            (start0, end0), (start1, end1) = self._look_up(q0), self._look_up(q1 - 1)
            return (start0 < k1) & (k0 < end1), (start1 <= k0) & (k1 <= end0)
        if self.length <= _SHORT:
            some, every = self._dense.rect(q0, q1, k0, k1)
            return some.flatten(), every.flatten()
        return self._rect_by_group(q0, q1, k0, k1)

    def _look_up(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """`bounds`, from a table where that is small."""
        if self.length > _LONG:
            return self.bounds(q)
        start, end = self._all_bounds
        return start[q], end[q]

    def _rect_by_group(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        some = torch.zeros_like(q0, dtype=torch.bool)
        for step in range(min(self.dilation, int((q1 - q0).max()))):
            first = torch.minimum(q0 + step, q1 - 1)  # the first query of its group, unless met in an earlier step
            last = q1 - 1 - (q1 - 1 - first) % self.dilation
            group = first % self.dilation
            key0, key1 = (-((group - k) // self.dilation) for k in (k0, k1))  # divided by the dilation, rounded up
            some |= (key0 < key1) & (self._look_up(first)[0] < key1) & (key0 < self._look_up(last)[1])
        return some, some & (q1 - q0 == 1) & (k1 - k0 == 1)  # neighbours are in different groups

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        # where every group's interval holds all keys of its group, only the groups decide, and they alternate
        smallest, largest = self.length // self.dilation, -(-self.length // self.dilation)
        start = self.start((q1 - 1) // self.dilation, torch.full_like(q0, largest))
        end = self.end(q0 // self.dilation, torch.full_like(q0, smallest))
        inside = (start <= k0 // self.dilation) & ((k1 - 1) // self.dilation < end)
        return inside & (height + width > self.dilation) & (self.dilation > 1)

    def count(self, n: int, m: int) -> int | None:
        start, end = self.bounds(torch.arange(self.length))
        return int((end - start).sum()) if n == m == self.length else None


def neighborhood(
    grid: Sequence[int],
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Mask:
    """Generalized neighborhood attention (arXiv:2504.16922), the definition of NATTEN.

    On every axis of length ``L``, with ``p = i // dilation`` inside the group ``i % dilation`` of ``S`` tokens:

    - the query's leader is the middle of its stride group, ``min(p // stride * stride + stride // 2, S - 1)``;
    - it sees the ``window`` positions from ``clamp(leader - window // 2, 0, S - window)`` on: at a border the window
      stops moving and keeps its size, and an even window reaches one further back than ahead;
    - if causal, the leader is the last of its stride group and the query sees ``leader - window + 1 .. p``, clipped
      at 0;
    - keys are of the query's own dilation group.

    A pair is visible if all axes say so. ``stride=1`` is neighborhood attention, ``stride=window`` blocked windows,
    ``window=L`` full attention. No query is ever left without keys.

    Args:
        grid: tokens per axis, flattened in row-major order.
        window, dilation, stride, causal: one value, or one per axis; ``1 <= stride <= window`` and
            ``window * dilation <= L`` on every axis.
    """
    axes = neighborhood_axes(grid_shape(grid), window, dilation, stride, causal)
    names = ("length", "window", "dilation", "stride", "causal")
    shape, sizes, dilations, strides, causals = (tuple(getattr(axis, each) for axis in axes) for each in names)
    name = f"neighborhood({shape}, {sizes}, dilation={dilations}, stride={strides}, causal={causals})"
    return Product(shape, axes, name)


def neighborhood_axes(
    shape: tuple[int, ...],
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    window_name: str = "window",
    causal_name: str = "causal",
) -> tuple[NeighborhoodAxis, ...]:
    """The axes of `neighborhood`, its arguments checked; the last two are their names in messages."""
    sizes = per_axis(window_name, window, shape, 1)
    dilations, strides = per_axis("dilation", dilation, shape, 1), per_axis("stride", stride, shape, 1)
    causals = spread(causal_name, causal, shape)
    if not all(isinstance(each, bool) for each in causals):
        raise ArgumentError(f"{causal_name} must be True or False, or one of them per axis, got {causal!r}")
    for axis, (length, size, gap, step) in enumerate(zip(shape, sizes, dilations, strides, strict=True)):
        if step > size:
            raise ArgumentError(
                f"stride must not exceed the {window_name}, got stride {step}, {window_name} {size} on axis {axis}"
            )
        if size * gap > length:
            raise ArgumentError(
                f"{window_name} * dilation must fit the grid, got {size} * {gap} on axis {axis} of length {length}"
            )
    return tuple(NeighborhoodAxis(*each) for each in zip(shape, sizes, dilations, strides, causals, strict=True))
