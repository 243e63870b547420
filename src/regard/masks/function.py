"""Any ``mask_mod`` as a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.masks.base import Index, Mask


@dataclass(frozen=True, repr=False)
class Function(Mask):
    """What a function says, about which nothing else is known."""

    function: Callable[..., Tensor]
    function_heads: int | None
    function_batch: int | None

    exact = False
    settles = True

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return self.function_heads

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return self.function_batch

    def __call__(self, b: Index, h: Index, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return self.function(b, h, q_idx, k_idx)

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        unknown = torch.ones_like(q0, dtype=torch.bool)
        return unknown, ~unknown

    def settled(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, height: Tensor, width: Tensor) -> Tensor:
        return torch.ones_like(q0, dtype=torch.bool)

    def __repr__(self) -> str:
        return f"from_function({getattr(self.function, '__name__', repr(self.function))})"


def from_function(function: Callable[..., Any], heads: int | None = None, batch: int | None = None) -> Mask:
    """Any FlexAttention ``mask_mod`` ``(b, h, q_idx, k_idx) -> bool tensor`` as a mask.

    Its block structure says "some" everywhere, unless ``blocks(..., exact=True)`` is asked to evaluate every pair or
    the function is combined (``&``) with a mask whose structure is known.

    Args:
        function: must work on integer tensors that broadcast with each other.
        heads, batch: how many heads and batch items it distinguishes; None if it ignores ``h`` or ``b``.
    """
    if not callable(function):
        raise ArgumentError(f"function must be callable as (b, h, q_idx, k_idx), got {type(function).__name__}")
    return Function(function, heads, batch)
