"""Masks on the difference ``q - k`` that are no single band: strided, dilated and PowerAttention patterns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.masks.base import Index, Mask
from regard.masks.sequence import at_least


class Differences(Mask):
    """Masks that allow a set of differences ``q - k``; the differences in a rectangle are one run of integers."""

    relative = True

    @abstractmethod
    def meets(self, least: Tensor, most: Tensor) -> Tensor:
        """Whether some difference in ``least..most`` (inclusive) is allowed."""

    @abstractmethod
    def covers(self, least: Tensor, most: Tensor) -> Tensor:
        """Whether every difference in ``least..most`` (inclusive) is allowed."""

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        least, most = q0 - k1 + 1, q1 - 1 - k0
        return self.meets(least, most), self.covers(least, most)


@dataclass(frozen=True, repr=False)
class Strided(Differences):
    """``(q - k) % stride == 0``."""

    stride: int

    settles = True

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return (q_idx - k_idx) % self.stride == 0

    def meets(self, least: Tensor, most: Tensor) -> Tensor:
        return most // self.stride * self.stride >= least

    def covers(self, least: Tensor, most: Tensor) -> Tensor:
        return ((least == most) & (least % self.stride == 0)) | (self.stride == 1)

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        return (height + width > self.stride) & (self.stride > 1)

    def __repr__(self) -> str:
        return f"strided({self.stride})"


@dataclass(frozen=True, repr=False)
class Dilated(Differences):
    """``q - k = dilation * j`` with ``|j| < window``."""

    window: int
    dilation: int

    settles = True

    @property
    def reach(self) -> int:
        """The largest allowed difference."""
        return (self.window - 1) * self.dilation

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        difference = q_idx - k_idx
        return (difference % self.dilation == 0) & (difference.abs() <= self.reach)

    def meets(self, least: Tensor, most: Tensor) -> Tensor:
        return most.clamp(max=self.reach) // self.dilation * self.dilation >= least.clamp(min=-self.reach)

    def covers(self, least: Tensor, most: Tensor) -> Tensor:
        inside = (least >= -self.reach) & (most <= self.reach)
        return inside & (((least == most) & (least % self.dilation == 0)) | (self.dilation == 1))

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        inside = (q0 - k1 + 1 >= -self.reach) & (q1 - 1 - k0 <= self.reach)
        return inside & (height + width > self.dilation) & (self.dilation > 1)

    def __repr__(self) -> str:
        return f"dilated({self.window}, {self.dilation})"


@dataclass(frozen=True, repr=False)
class Power(Mask):
    """The PowerAttention pattern; see `power`."""

    block: int
    window: int
    sinks: int
    causal: bool

    @property
    def relative(self) -> bool:  # type: ignore[override]
        return self.block == 1 and self.sinks == 0

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        key_block = k_idx // self.block
        distance = q_idx // self.block - key_block
        if not self.causal:
            distance = distance.abs()
        power_of_two = (distance & (distance - 1)) == 0  # or zero
        allowed = power_of_two | (distance < self.window) | (key_block < self.sinks)
        return allowed & (k_idx <= q_idx) if self.causal else allowed

    @cached_property
    def _distances(self) -> tuple[Tensor, Tensor]:
        """First and last of each run of allowed block distances, ascending."""
        near = max(self.window, 3)
        while near & (near - 1) == 0:
            near += 1  # distances 0 .. near - 1 are all allowed, and near is not
        far = [1 << e for e in range(near.bit_length(), 60)]
        first, last = [0, *far], [near - 1, *far]
        if not self.causal:
            first, last = [-x for x in reversed(far)] + [1 - near, *far], [-x for x in reversed(far)] + [near - 1, *far]
        return torch.tensor(first), torch.tensor(last)

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        first_query, last_query = q0 // self.block, (q1 - 1) // self.block
        first_key, last_key = k0 // self.block, (k1 - 1) // self.block
        # every pair is allowed: key blocks that are sinks are, the others must be at allowed distances
        beyond = first_key.clamp(min=self.sinks)
        every = (last_key < self.sinks) | self._covers(first_query - last_key, last_query - beyond)
        some = self._meets(first_query - last_key, last_query - first_key) | (first_key < self.sinks)
        if self.causal:
            # A visible pair of blocks at a positive distance, or a sink, has pairs with k <= q if the rectangle has
            # any; so has a block shared by queries and keys.
            return some & (k0 < q1), every & (k1 - 1 <= q0)
        return some, every

    def _meets(self, least: Tensor, most: Tensor) -> Tensor:
        first, last = self._distances
        return first[torch.searchsorted(last, least).clamp(max=len(last) - 1)] <= most

    def _covers(self, least: Tensor, most: Tensor) -> Tensor:
        first, last = self._distances
        run = torch.searchsorted(last, most).clamp(max=len(last) - 1)
        return (first[run] <= least) & (most <= last[run])

    def __repr__(self) -> str:
        return f"power(block={self.block}, window={self.window}, sinks={self.sinks}, causal={self.causal})"


def strided(stride: int) -> Mask:
    """Every ``stride``-th key, counted from the query in both directions: ``(q - k) % stride == 0``."""
    return Strided(at_least("stride", stride, 1))


def dilated(window: int, dilation: int) -> Mask:
    """A sliding window with gaps: ``q - k = dilation * j`` for ``|j| < window``.

    ``dilation=1`` is ``sliding_window(window)``. Near the ends the window is cut off, not moved; for windows that keep
    their size see `neighborhood`.
    """
    return Dilated(at_least("window", window, 1), at_least("dilation", dilation, 1))


def power(block: int = 1, window: int = 1, sinks: int = 0, causal: bool = True) -> Mask:
    """PowerAttention (arXiv:2503.03588): keys at block distances that are powers of two, a window, and sinks.

    With ``d = q // block - k // block`` a pair is allowed if ``d`` is zero or a power of two, or ``d < window``, or
    ``k // block < sinks``, and ``k <= q``. A query sees O(log n) blocks, and L layers reach every distance below 2^L.
    ``causal=False`` uses ``|d|`` and drops ``k <= q`` (a symmetric variant that is not in the paper).

    Args:
        block: tokens per block; 256 in the paper's runs, 1 is the pattern on tokens.
        window: blocks of the local window, the query's own included.
        sinks: blocks at the start that every query sees.
    """
    return Power(at_least("block", block, 1), at_least("window", window, 0), at_least("sinks", sinks, 0), causal)
