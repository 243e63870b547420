"""Masks on token sequences in which every query sees one interval of keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.masks.base import Index, Mask


class Interval(Mask):
    """Masks in which query ``q`` sees the keys ``low(q) <= k < high(q)``.

    Both ends never move back as ``q`` grows, and the intervals of neighbouring queries touch or overlap. The keys that
    a run of queries sees are then one interval too, and a rectangle is answered from its four corners.
    """

    @abstractmethod
    def low(self, q: Tensor) -> Tensor:
        """First key that query ``q`` sees."""

    @abstractmethod
    def high(self, q: Tensor) -> Tensor:
        """One past the last key that query ``q`` sees."""

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return (self.low(q_idx) <= k_idx) & (k_idx < self.high(q_idx))

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        last = q1 - 1
        some = (self.low(q0) < k1) & (k0 < self.high(last))
        return some, (self.low(last) <= k0) & (k1 <= self.high(q0))

    def count(self, n: int, m: int) -> int | None:
        q = torch.arange(n)
        return int((self.high(q).clamp(0, m) - self.low(q).clamp(0, m)).sum())


@dataclass(frozen=True, repr=False)
class Band(Interval):
    """``least <= q - k <= most``; None stands for no bound."""

    least: int | None = None
    most: int | None = None

    relative = True

    def low(self, q: Tensor) -> Tensor:
        return torch.full_like(q, -_FAR) if self.most is None else q - self.most

    def high(self, q: Tensor) -> Tensor:
        return torch.full_like(q, _FAR) if self.least is None else q - self.least + 1

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        difference = q_idx - k_idx
        if self.least is None:
            return torch.ones_like(difference, dtype=torch.bool) if self.most is None else difference <= self.most
        above = difference >= self.least
        return above if self.most is None else above & (difference <= self.most)

    def intersect(self, other: Band) -> Band | None:
        """The band of differences that both bands hold; None if there are none."""
        least = _tighter(max, self.least, other.least)
        most = _tighter(min, self.most, other.most)
        return None if least is not None and most is not None and least > most else Band(least, most)

    def moved(self, offset: int) -> Band:
        """The band as seen by queries that start at position ``offset``."""
        return Band(*(None if end is None else end - offset for end in (self.least, self.most)))

    def __repr__(self) -> str:
        match self.least, self.most:
            case None, None:
                return "full()"
            case 0, None:
                return "causal()"
            case 0, int(most):
                return f"sliding_window({most + 1}, causal=True)"
            case int(least), int(most) if least == -most:
                return f"sliding_window({most + 1})"
        return f"band({self.least}, {self.most})"


def _tighter(choose: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    """The choice of two bounds, of which None is no bound."""
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)


@dataclass(frozen=True, repr=False)
class Empty(Mask):
    """Nothing is allowed."""

    relative = True

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return torch.zeros_like(q_idx - k_idx, dtype=torch.bool)

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros_like(q0, dtype=torch.bool)
        return nothing, nothing

    def __repr__(self) -> str:
        return "empty()"


@dataclass(frozen=True, repr=False)
class Sinks(Interval):
    """``k < n``."""

    n: int

    def low(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def high(self, q: Tensor) -> Tensor:
        return torch.full_like(q, self.n)

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return k_idx < self.n

    def __repr__(self) -> str:
        return f"sinks({self.n})"


@dataclass(frozen=True, repr=False)
class Prefix(Interval):
    """``k < n or k <= q``."""

    n: int

    def low(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def high(self, q: Tensor) -> Tensor:
        return (q + 1).clamp(min=self.n)

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return (k_idx < self.n) | (k_idx <= q_idx)

    def __repr__(self) -> str:
        return f"prefix({self.n})"


@dataclass(frozen=True, repr=False)
class BlockwiseCausal(Interval):
    """``k // block <= q // block``."""

    block: int

    def low(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def high(self, q: Tensor) -> Tensor:
        return (q // self.block + 1) * self.block

    def __repr__(self) -> str:
        return f"blockwise_causal({self.block})"


_FAR = 1 << 60  # beyond every position, and far enough from the end of int64 to add to


def full() -> Mask:
    """Every query sees every key."""
    return Band()


def empty() -> Mask:
    """No query sees any key."""
    return Empty()


def causal() -> Mask:
    """A query sees the keys up to its own position: ``k <= q``."""
    return Band(least=0)


def sliding_window(window: int, causal: bool = False) -> Mask:
    """Keys closer than ``window``: ``|q - k| < window``, or ``0 <= q - k < window`` if ``causal``.

    A query sees itself and ``window - 1`` keys on each side (or on the left side only).
    """
    window = at_least("window", window, 1)
    return Band(0 if causal else 1 - window, window - 1)


def band(least: int | None, most: int | None) -> Mask:
    """Differences in a range: ``least <= q - k <= most``, where None stands for no bound."""
    if least is not None and most is not None and least > most:
        raise ArgumentError(f"least must not exceed most, got {least} and {most}")
    return Band(least, most)


def sinks(n: int) -> Mask:
    """The first ``n`` keys, for every query: ``k < n``. Combine it, as in ``causal() & (window | sinks(4))``."""
    return Sinks(at_least("n", n, 0))


def prefix(n: int) -> Mask:
    """The prefix-LM mask: ``k < n or k <= q``.

    The first ``n`` tokens see each other in both directions, what follows is causal. That is ``causal() | sinks(n)``,
    written as one exact leaf; for "the first n keys and nothing else" use `sinks`.
    """
    return Prefix(at_least("n", n, 0))


def blockwise_causal(block: int) -> Mask:
    """Causal between blocks of ``block`` tokens, full inside each: ``k // block <= q // block``."""
    return BlockwiseCausal(at_least("block", block, 1))


def at_least(name: str, value: int, least: int) -> int:
    """``value`` itself, or `ArgumentError` if it is no integer or smaller than ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value
