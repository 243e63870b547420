"""Attention over a window of keys per axis in two steps, for those who need the weights: (B, *lengths, H, slots)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.attention.grid_plan import Axis, Slots, slots


def slot_scores(
    query: Tensor,
    key: Tensor,
    axes: Sequence[Axis],
    *,
    bias: Tensor | None = None,
    bias_center: Sequence[int] = (),
    scale: float | None = None,
) -> Tensor:
    """``scale · q_i · k_j + bias`` for the key j in every slot of i's window, ``-inf`` in empty slots.

    Args:
        query: (B, *lengths, H, D).
        key: (B, *key_lengths, H, D).
        axes: one per axis of the grid.
        bias, bias_center, scale: as in `grid_attention`.
    """
    keys, visible, offsets = _tensors(tuple(axes), query.device)
    q, k = query.flatten(1, -3), key.flatten(1, -3)
    # one slot after the other: N times the window times D is never made
    scores = torch.stack([(q * k.index_select(1, index)).sum(-1) for index in keys.unbind(1)], -1)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias_at(bias, offsets, bias_center).movedim(0, 1)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    return scores.view(*query.shape[:-1], keys.shape[1])


def slot_sum(weights: Tensor, value: Tensor, axes: Sequence[Axis]) -> Tensor:
    """``Σ_slots w_i v_j``: weights (B, *lengths, H, slots) and value (B, *key_lengths, H, D) to (B, *lengths, H, D)."""
    keys = _tensors(tuple(axes), value.device)[0]
    w, v = weights.flatten(1, -3), value.flatten(1, -3)
    parts = (w[..., slot, None] * v.index_select(1, index) for slot, index in enumerate(keys.unbind(1)))
    total = sum(parts)
    assert isinstance(total, Tensor)
    return total.view(*weights.shape[:-1], value.shape[-1])


def bias_at(bias: Tensor, offsets: Tensor, center: Sequence[int]) -> Tensor:
    """A table (H, *sizes) at offsets (axes, ...) from its center: (H, ...); what is beyond it has to be masked."""
    index = [
        (each + middle).clamp(0, size - 1) for each, middle, size in zip(offsets, center, bias.shape[1:], strict=True)
    ]
    return bias[(slice(None), *index)]


@torch.compiler.assume_constant_result
def _table(axes: tuple[Axis, ...]) -> tuple[Any, ...]:
    found: Slots = slots(tuple(Axis(*axis) for axis in axes))
    return tuple(None if x is None else torch.as_tensor(x) for x in found)


def _tensors(axes: tuple[Axis, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(None if t is None else t.to(device) for t in _table(axes))
