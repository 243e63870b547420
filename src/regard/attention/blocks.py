"""Exact block-sparse attention: every tile of a `Plan` through the platform's fused kernel, forward and backward."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regard import masks
from regard.attention import tile
from regard.attention.partial import Partial
from regard.attention.plan import Batch, Plan, pattern, plan
from regard.attention.problem import Problem
from regard.masks import NONE, Mask


def run(p: Problem) -> Partial:
    """Attention over the blocks that the mask visits; time and memory in proportion to them."""
    mask = structured(p)
    grouped = mask.heads is None
    layout = _Layout(
        p.batch, p.kv_heads if grouped else p.heads, p.groups if grouped else 1, p.kv_heads, p.n, p.m, p.scale
    )
    work = plan(mask, p.n, p.m, layout.groups, p.device)
    dim = max(p.key.shape[-1], p.value.shape[-1])
    q, k, v = (F.pad(t, (0, dim - t.shape[-1])) for t in (p.query, p.key, p.value))
    out, lse = _Blocks.apply(q, k, v, p.bias, mask, work, layout)
    return Partial(out[..., : p.value.shape[-1]], lse)


def structured(p: Problem) -> Mask:
    """The mask of a problem as a `Mask`."""
    if p.mask is None:
        return masks.full()
    if isinstance(p.mask, Tensor):
        return masks.from_dense(p.mask.expand(-1, -1, p.n, p.m))
    return p.mask


@dataclass(frozen=True)
class _Layout:
    """Heads as *lanes*: a lane is a query head, or all query heads that share a key head where the mask is the same.

    Attributes:
        lanes: per batch item.
        groups: query heads per lane.
        kv_heads: key heads per batch item.
    """

    batch: int
    lanes: int
    groups: int
    kv_heads: int
    n: int
    m: int
    scale: float

    def runs(self, batch: Batch, layers: tuple[int, int]) -> Tensor:
        """(lanes that share a layer, T): the lanes each tile is run for."""
        items = torch.arange(self.batch, device=batch.layer.device).view(layers[0], -1)
        heads = torch.arange(self.lanes, device=batch.layer.device).view(layers[1], -1)
        b, h = batch.layer // layers[1], batch.layer % layers[1]
        lanes = items[b].T[:, None, :] * self.lanes + heads[h].T[None, :, :]
        return lanes.flatten(0, 1)

    def query_rows(self, lane: Tensor, unit: Tensor, units: int) -> Tensor:
        """Rows of a query-side tensor cut into units, for tiles: (T, G, R)."""
        group = torch.arange(self.groups, device=lane.device)
        return (lane[:, None, None] * self.groups + group[:, None]) * units + unit[:, None, :]

    def key_rows(self, lane: Tensor, unit: Tensor, units: int) -> Tensor:
        """Rows of a key-side tensor cut into units, for tiles: (T, C)."""
        b, h = lane // self.lanes, lane % self.lanes
        return (b * self.kv_heads + h // (self.lanes // self.kv_heads))[:, None] * units + unit


class _Units:
    """A (B, H, N, ...) tensor cut into units of ``side`` tokens, as rows of a matrix.

    ``spare`` adds a unit per head that padded query slots read and write.
    """

    def __init__(self, x: Tensor, side: int, spare: bool, pad: float = 0.0):
        n = x.shape[2]
        self.count = -(-n // side) + spare
        extra = self.count * side - n
        if extra:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, extra), value=pad)
        self.shape = x.shape
        self.n, self.side = n, side
        self.rows = x.reshape(x.shape[0] * x.shape[1] * self.count, -1)

    def take(self, index: Tensor) -> Tensor:
        """The tokens of units (..., U): (..., U * side, dims)."""
        found = self.rows.index_select(0, index.flatten())
        return found.view(*index.shape[:-1], index.shape[-1] * self.side, *self.shape[3:])

    def put(self, index: Tensor, value: Tensor) -> None:
        self.rows.index_copy_(0, index.flatten(), value.reshape(index.numel(), -1))

    def add(self, index: Tensor, value: Tensor) -> None:
        self.rows.index_add_(0, index.flatten(), value.reshape(index.numel(), -1))

    def whole(self) -> Tensor:
        """Back to (B, H, N, ...)."""
        return self.rows.view(self.shape)[:, :, : self.n]


class _Blocks(torch.autograd.Function):
    """Saves inputs, ``out`` and ``lse``; the backward replays the tiles."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, work: Plan, layout: _Layout
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        bq, bk = work.side
        spare = work.padded
        queries, keys, values = _Units(q, bq, spare), _Units(k, bk, False), _Units(v, bk, False)
        out = _Units(q.new_zeros(q.shape), bq, spare)
        lse = _Units(q.new_full(q.shape[:3], -torch.inf, dtype=wide), bq, spare)
        for batch in work.batches:
            additive = _additive(batch, mask, work, layout, wide)
            for lane in layout.runs(batch, work.layers):
                qi = layout.query_rows(lane, batch.queries, queries.count)
                ki = layout.key_rows(lane, batch.keys, keys.count)
                kt, vt = (x.take(ki).unsqueeze(1).expand(-1, layout.groups, -1, -1) for x in (keys, values))
                o, l = tile.forward(queries.take(qi), kt, vt, additive, layout.scale)
                out.put(qi, o)
                lse.put(qi, l.to(wide))
        result = out.whole(), lse.whole()
        ctx.save_for_backward(q, k, v, bias, *result)
        ctx.mask, ctx.work, ctx.layout = mask, work, layout
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        mask, work, layout = ctx.mask, ctx.work, ctx.layout
        wide = lse.dtype
        bq, bk = work.side
        spare = work.padded
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        queries, keys, values = _Units(q, bq, spare), _Units(k, bk, False), _Units(v, bk, False)
        outs, grad_outs = _Units(out, bq, spare), _Units(grad_out, bq, spare)
        lses = _Units(lse, bq, spare, torch.inf)
        grad_lses = None if grad_lse is None else _Units(grad_lse, bq, spare)
        dq = _Units(q.new_zeros(q.shape), bq, spare)
        dk, dv = (_Units(torch.zeros_like(x, dtype=wide), bk, False) for x in (k, v))
        for batch in work.batches:
            additive = _additive(batch, mask, work, layout, wide)
            for lane in layout.runs(batch, work.layers):
                qi = layout.query_rows(lane, batch.queries, queries.count)
                ki = layout.key_rows(lane, batch.keys, keys.count)
                kt, vt = (x.take(ki).unsqueeze(1).expand(-1, layout.groups, -1, -1) for x in (keys, values))
                dqt, dkt, dvt = tile.backward(
                    grad_outs.take(qi),
                    None if grad_lses is None else grad_lses.take(qi),
                    queries.take(qi),
                    kt,
                    vt,
                    outs.take(qi),
                    lses.take(qi),
                    additive,
                    layout.scale,
                )
                dq.put(qi, dqt)
                dk.add(ki, dkt.sum(1, dtype=wide))
                dv.add(ki, dvt.sum(1, dtype=wide))
        grads = dq.whole(), dk.whole().to(k.dtype), dv.whole().to(v.dtype)
        return *grads, None, None, None, None


def _additive(batch: Batch, mask: Mask, work: Plan, layout: _Layout, dtype: torch.dtype) -> Tensor | None:
    """The mask of a batch's tiles as a term of the scores: (T, 1, R * query side, C * key side); None if all visible."""
    if batch.kind is None:
        return None
    bq, bk = work.side
    tiles, rows, columns = batch.kind.shape
    hidden = torch.zeros(batch.kind.shape, dtype=dtype, device=batch.kind.device)
    hidden.masked_fill_(batch.kind == NONE, -torch.inf)
    blocks = hidden[:, :, None, :, None].expand(tiles, rows, bq, columns, bk).contiguous()
    if batch.partial.numel():
        allowed = batch.pattern
        if allowed is None:
            allowed = pattern(mask, batch, work.side, work.layers[1], layout.n, layout.m)
        term = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
        blocks.transpose(2, 3)[batch.partial.unbind()] = term
    return blocks.view(tiles, 1, rows * bq, columns * bk)
