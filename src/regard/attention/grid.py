"""Attention of grid tokens to a window of keys per axis: tiles of queries, each with the one box of keys it needs.

A tile holds neighbouring queries (of a dilation group) on every axis, so the keys they see lie in a box too, and all
tiles of one kind (equal masks inside the box; there are about three kinds per axis) run in one call of the dense
kernel. Nothing of size N×M, or N times the window, is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regard.attention import tile
from regard.attention.grid_plan import Axis, Tiling, offsets, tile_size, tiling
from regard.attention.grid_slots import bias_at
from regard.attention.partial import Partial

__all__ = ["Axis", "grid_attention"]

_CHUNK = 1 << 20  # numbers gathered from the keys at a time


def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: Sequence[Axis],
    *,
    bias: Tensor | None = None,
    bias_center: Sequence[int] = (),
    scale: float | None = None,
    size: Sequence[int] | None = None,
) -> Partial:
    """``softmax(scale · q kᵀ + bias) v`` over the keys that the axes allow; forward and backward tile by tile.

    Args:
        query: (B, *lengths, H, D).
        key, value: (B, *key_lengths, Hk, D or E), where Hk divides H.
        axes: one per axis of the grid.
        bias: (H, *offsets), added to the score of a key ``o`` positions from its query at index ``o + bias_center``.
        scale: 1/√D by default.
        size: queries per tile and axis; the cheapest if None.

    Returns:
        A `Partial` with out (B, *lengths, H, E) and lse (B, *lengths, H).
    """
    d, e = query.shape[-1], value.shape[-1]
    chosen = None if size is None else tuple(size)
    counts, queries, keys, slot, key_slots, key_starts, masks, offset = (
        t.to(query.device) if isinstance(t, Tensor) else t
        for t in _tensors(tuple(axes), query.shape[0] * query.shape[-2], chosen, bias is not None)
    )
    q, k, v = (F.pad(t.flatten(1, -3), (0, max(d, e) - t.shape[-1])) for t in (query, key, value))
    term = _term(masks, offset, bias, bias_center, torch.promote_types(q.dtype, torch.float32))
    scale = d**-0.5 if scale is None else scale
    out, lse = _Tiles.apply(q, k, v, term, counts, scale, queries, keys, slot, key_slots, key_starts)
    return Partial(out[..., :e].reshape(*query.shape[:-1], e), lse.reshape(query.shape[:-1]))


@torch.compiler.assume_constant_result
def _tensors(axes: tuple[Axis, ...], lanes: int, size: tuple[int, ...] | None, biased: bool) -> tuple[Any, ...]:
    """The tiling as tensors, the parts of `Tiling` that are for the kernel before those that are for `_term`."""
    axes = tuple(Axis(*axis) for axis in axes)
    if size is None:
        size = tile_size(axes, 1 << max(0, lanes - 1).bit_length())
    t: Tiling = tiling(axes, size)
    indices = (torch.as_tensor(x) for x in (t.queries, t.keys, t.slot, t.key_slots, t.key_starts))
    masks = None if t.masks is None else torch.as_tensor(t.masks)
    return t.counts, *indices, masks, torch.as_tensor(offsets(axes, size)) if biased else None


def _term(
    masks: Tensor | None, offset: Tensor | None, bias: Tensor | None, center: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """Mask and bias of every kind of tile: (kinds, 1 or H, T, U)."""
    if bias is None or offset is None:
        if masks is None:
            return None
        return torch.zeros_like(masks, dtype=dtype).masked_fill(~masks, -torch.inf)[:, None]
    term = bias_at(bias.to(dtype), offset, center).movedim(0, 1)
    return term if masks is None else term.masked_fill(~masks[:, None], -torch.inf)


class _Tiles(torch.autograd.Function):
    """q (B, N, H, D), k and v (B, M, Hk, D) to (out (B, N, H, D), lse (B, N, H)); the backward replays the tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        term: Tensor | None,
        counts: tuple[int, ...],
        scale: float,
        queries: Tensor,
        keys: Tensor,
        slot: Tensor,
        key_slots: Tensor,
        key_starts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        qt = _take(q, queries)
        out, lse = torch.empty_like(qt), qt.new_empty(qt.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for kind, part in _chunks(counts, keys, k):
            mask = None if term is None else term.detach()[kind : kind + 1]
            kt, vt = (_heads_first(_take(t, keys[part])) for t in (k, v))
            o, s = tile.forward(_heads_first(qt[part]), kt, vt, mask, scale)
            out[part] = o.transpose(1, 2).view_as(out[part])
            lse[part] = s.transpose(1, 2).view_as(lse[part])
        result = _put(out, slot), _put(lse, slot)
        ctx.save_for_backward(q, k, v, term, *result, queries, keys, slot, key_slots, key_starts)
        ctx.counts, ctx.scale = counts, scale
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, term, out, lse, queries, keys, slot, key_slots, key_starts = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        qt, outs, lses, grads = (_take(t, queries) for t in (q, out, lse, grad_out))
        grad_lses = None if grad_lse is None else _take(grad_lse, queries)
        dq = torch.empty_like(qt)
        dk, dv = (t.new_empty(len(keys), t.shape[0], keys.shape[1], *t.shape[2:]) for t in (k, v))
        dterm = torch.zeros_like(term) if ctx.needs_input_grad[3] else None
        for kind, part in _chunks(ctx.counts, keys, k):
            mask = None if term is None else term[kind : kind + 1]
            kt, vt = (_heads_first(_take(t, keys[part])) for t in (k, v))
            arguments: tuple[Any, ...] = (
                _heads_first(grads[part]),
                None if grad_lses is None else _heads_first(grad_lses[part]),
                _heads_first(qt[part]),
                kt,
                vt,
                _heads_first(outs[part]),
                _heads_first(lses[part]),
                mask,
                ctx.scale,
            )
            if dterm is None:
                parts: Sequence[Tensor] = tile.backward(*arguments)
            else:
                *parts, ds = tile.backward_with_scores(*arguments)
                dterm[kind] += ds.sum(0)
            for total, found in zip((dq, dk, dv), parts, strict=True):
                total[part] = found.transpose(1, 2).reshape(total[part].shape)
        dkv = (_gathered(t, key_slots, key_starts) for t in (dk, dv))
        return _put(dq, slot), *dkv, dterm, None, None, None, None, None, None, None


def _chunks(counts: tuple[int, ...], keys: Tensor, k: Tensor) -> list[tuple[int, slice]]:
    """(kind, tiles) for all tiles, as many at once as pay off."""
    most = max(1, _CHUNK // max(1, keys.shape[1] * k.shape[0] * k.shape[2] * k.shape[3]))
    found, start = [], 0
    for kind, count in enumerate(counts):
        for first in range(start, start + count, most):
            found.append((kind, slice(first, min(first + most, start + count))))
        start += count
    return found


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, ...) at index (tiles, T) to (tiles, B, T, ...)."""
    batch = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    rows = (index[:, None] + batch[:, None]).flatten()
    found = x.reshape(x.shape[0] * x.shape[1], -1).index_select(0, rows)
    return found.view(len(index), x.shape[0], index.shape[1], *x.shape[2:])


def _put(x: Tensor, slot: Tensor) -> Tensor:
    """(tiles, B, T, ...) to (B, N, ...), each query from its slot."""
    batch, size = x.shape[1:3]
    rows = (slot // size * batch + torch.arange(batch, device=x.device)[:, None]) * size + slot % size
    return x.reshape(-1, math.prod(x.shape[3:])).index_select(0, rows.flatten()).view(batch, len(slot), *x.shape[3:])


def _gathered(x: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """(tiles, B, U, ...) to (B, M, ...), the sum over every key's slots."""
    batch, size = x.shape[1:3]
    items = torch.arange(batch, device=x.device)[:, None]
    rows = (slots // size * batch + items) * size + slots % size
    bags = (starts + items * len(slots)).flatten()
    total = F.embedding_bag(rows.flatten(), x.reshape(-1, math.prod(x.shape[3:])), bags, mode="sum")
    return total.view(batch, len(starts), *x.shape[3:])


def _heads_first(x: Tensor) -> Tensor:
    """(tiles, B, T, H, ...) to (tiles · B, H, T, ...)."""
    return x.flatten(0, 1).transpose(1, 2)
