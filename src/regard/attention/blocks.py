"""Exact block-sparse attention: every tile of a `Plan` through the platform's fused kernel, forward and backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from regard import masks
from regard.attention import tile
from regard.attention.partial import Partial, merge
from regard.attention.plan import Batch, Plan, Run, pattern, plan
from regard.attention.problem import Problem
from regard.masks import NONE, Mask


def run(p: Problem) -> Partial:
    """Attention over the blocks that the mask visits; time and memory in proportion to them."""
    work, mask, layout = prepare(p)
    dim = max(p.key.shape[-1], p.value.shape[-1])
    q, k, v = (F.pad(t, (0, dim - t.shape[-1])) for t in (p.query, p.key, p.value))
    out, lse = _Blocks.apply(q, k, v, p.bias, mask, work, layout)
    return Partial(out[..., : p.value.shape[-1]], lse)


def prepare(p: Problem) -> tuple[Plan, Mask, "_Layout"]:
    """What is to be run, before anything is computed. Plans are remembered, so asking twice costs nothing."""
    mask = structured(p)
    shared = mask.heads is None
    layout = _Layout(
        p.batch, p.kv_heads if shared else p.heads, p.groups if shared else 1, p.kv_heads, p.n, p.m, p.scale
    )
    return plan(mask, p.n, p.m, layout.groups, p.device), mask, layout


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

    def visits(self, batch: Batch, work: Plan) -> Iterator["_Visit"]:
        """Everywhere a batch is to be run: in all lanes that share a layer of the mask, as many at once as pay off."""
        device, layers = batch.layer.device, work.layers
        items = torch.arange(self.batch, device=device).view(layers[0], -1)
        heads = torch.arange(self.lanes, device=device).view(layers[1], -1)
        b, h = batch.layer // layers[1], batch.layer % layers[1]
        lanes = (items[b][:, :, None] * self.lanes + heads[h][:, None, :]).flatten(1)  # (T, lanes that share)
        group = torch.arange(self.groups, device=device)
        for some in lanes.split(max(1, work.budget // batch.pairs), dim=1):
            query_head = (some[:, :, None] * self.groups + group).flatten(1)
            yield _Visit(batch, query_head, some // (self.lanes // self.kv_heads))


class _Visit(NamedTuple):
    """A batch of tiles for particular heads, numbered across batch items."""

    batch: Batch
    query_head: Tensor  # (T, G), evenly spaced
    key_head: Tensor  # (T, K), where K divides G


class _Units:
    """A (B, H, N, ...) tensor cut into units of ``side`` tokens.

    ``spare`` adds a unit per head that padded query slots read and write.
    """

    def __init__(self, x: Tensor, side: int, spare: bool = False, pad: float = 0.0):
        self.n, self.side = x.shape[2], side
        self.count = -(-self.n // side) + spare
        if extra := self.count * side - self.n:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, extra), value=pad)
        self.x = x.contiguous()
        self.rows = self.x.view(x.shape[0] * x.shape[1] * self.count, -1)
        self.scratch = self.rows.new_empty(0)  # gathering into fresh memory each time would cost twice as much

    def take(self, head: Tensor, units: Tensor, run: Run | None) -> Tensor:
        """Tokens of the tiles, (T, heads, tokens, ...), valid until the next call; a view where they form a `Run`."""
        if run is not None:
            return self._view(head, units, run)
        index = self._index(head, units)
        size = index.numel() * self.rows.shape[1]
        if self.scratch.numel() < size:
            self.scratch = self.rows.new_empty(size)
        found = self.scratch[:size].view(index.numel(), -1)
        torch.index_select(self.rows, 0, index.flatten(), out=found)
        return found.view(*index.shape[:2], index.shape[2] * self.side, *self.x.shape[3:])

    def put(self, head: Tensor, units: Tensor, run: Run | None, value: Tensor) -> None:
        if run is not None:
            self._view(head, units, run).copy_(value)
        else:
            index = self._index(head, units)
            self.rows.index_copy_(0, index.flatten(), value.reshape(index.numel(), -1))

    def add(self, head: Tensor, units: Tensor, run: Run | None, value: Tensor) -> None:
        if run is not None:
            view = self._view(head, units, run)
            apart = -(-units.shape[1] // run.step)  # so far apart, tiles do not overlap
            for first in range(min(apart, len(units))):
                view[first::apart] += value[first::apart]
        else:
            index = self._index(head, units)
            self.rows.index_add_(0, index.flatten(), value.reshape(index.numel(), -1))

    def whole(self) -> Tensor:
        """Back to (B, H, N, ...)."""
        return self.x[:, :, : self.n]

    def _index(self, head: Tensor, units: Tensor) -> Tensor:
        return head[:, :, None] * self.count + units[:, None, :]

    def _view(self, head: Tensor, units: Tensor, run: Run) -> Tensor:
        tiles, length = units.shape
        unit = self.rows.shape[1]
        tail = self.x.stride()[2:]
        apart = int(head[0, 1] - head[0, 0]) if head.shape[1] > 1 else 1
        return self.rows.as_strided(
            (tiles, head.shape[1], length * self.side, *self.x.shape[3:]),
            (run.step * unit, apart * self.count * unit, *tail),
            self.rows.storage_offset() + (int(head[0, 0]) * self.count + run.first) * unit,
        )


class _Blocks(torch.autograd.Function):
    """Saves inputs, ``out`` and ``lse``; the backward replays the tiles."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, work: Plan, layout: _Layout
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys, values = _cut(q, k, v, work)
        out = _Units(q.new_zeros(q.shape), work.side[0], work.padded)
        lse = _Units(q.new_full(q.shape[:3], -torch.inf, dtype=wide), work.side[0], work.padded)
        for batch in work.batches:
            additive = _additive(batch, mask, work, layout, wide)
            for visit in layout.visits(batch, work):
                rows = (visit.query_head, batch.queries, batch.query_run)
                columns = (visit.key_head, batch.keys, batch.key_run)
                kt, vt = keys.take(*columns), values.take(*columns)
                term = _with_bias(additive, bias, visit, work, layout, wide)
                out_tile, lse_tile = tile.forward(queries.take(*rows), kt, vt, term, layout.scale)
                if batch.joins:
                    earlier = Partial(out.take(*rows), lse.take(*rows))
                    out_tile, lse_tile = merge(earlier, Partial(out_tile, lse_tile))
                out.put(*rows, out_tile)
                lse.put(*rows, lse_tile)
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
        side, spare = work.side[0], work.padded
        queries, keys, values = _cut(q, k, v, work)
        outs, lses = _Units(out, side, spare), _Units(lse, side, spare, torch.inf)
        grad_outs = _Units(torch.zeros_like(out) if grad_out is None else grad_out, side, spare)
        grad_lses = None if grad_lse is None else _Units(grad_lse, side, spare)
        dq = _Units(q.new_zeros(q.shape, dtype=lse.dtype), side, spare)
        dk, dv = (_Units(x.new_zeros(x.shape, dtype=lse.dtype), work.side[1]) for x in (k, v))
        dbias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[3] else None
        for batch in work.batches:
            additive = _additive(batch, mask, work, layout, lse.dtype)
            for visit in layout.visits(batch, work):
                rows = (visit.query_head, batch.queries, batch.query_run)
                columns = (visit.key_head, batch.keys, batch.key_run)
                kt, vt = keys.take(*columns), values.take(*columns)
                term = _with_bias(additive, bias, visit, work, layout, lse.dtype)
                arguments: tuple[Any, ...] = (
                    grad_outs.take(*rows),
                    None if grad_lses is None else grad_lses.take(*rows),
                    queries.take(*rows),
                    kt,
                    vt,
                    outs.take(*rows),
                    lses.take(*rows),
                    term,
                    layout.scale,
                )
                if dbias is None:
                    dq_tile, dk_tile, dv_tile = tile.backward(*arguments)
                else:
                    dq_tile, dk_tile, dv_tile, ds = tile.backward_with_scores(*arguments)
                    _add_bias_gradient(dbias, ds, visit, work, layout)
                (dq.add if batch.joins else dq.put)(*rows, dq_tile.to(lse.dtype))
                dk.add(*columns, dk_tile.to(lse.dtype))
                dv.add(*columns, dv_tile.to(lse.dtype))
        bias_grad = None if dbias is None else dbias.to(bias.dtype)
        return dq.whole().to(q.dtype), dk.whole().to(k.dtype), dv.whole().to(v.dtype), bias_grad, None, None, None


def _cut(q: Tensor, k: Tensor, v: Tensor, work: Plan) -> tuple[_Units, _Units, _Units]:
    return _Units(q, work.side[0], work.padded), _Units(k, work.side[1]), _Units(v, work.side[1])


def _additive(batch: Batch, mask: Mask, work: Plan, layout: _Layout, dtype: torch.dtype) -> Tensor | None:
    """The mask of a batch's tiles as a term of the scores: (U, 1, queries, keys); None if all is visible."""
    if batch.kind is None:
        return None
    kept = work.terms.get((batch, dtype))
    if kept is None:
        kept = _term(batch, batch.kind, mask, work, layout, dtype)
        if work.keeps_terms:
            work.terms[batch, dtype] = kept
    return kept


def _term(batch: Batch, kind: Tensor, mask: Mask, work: Plan, layout: _Layout, dtype: torch.dtype) -> Tensor:
    bq, bk = work.side
    tiles, rows, columns = kind.shape
    hidden = torch.zeros(kind.shape, dtype=dtype, device=kind.device)
    hidden.masked_fill_(kind == NONE, -torch.inf)
    blocks = hidden[:, :, None, :, None].expand(tiles, rows, bq, columns, bk).contiguous()
    if batch.partial.numel():
        allowed = batch.pattern
        if allowed is None:
            allowed = pattern(batch, mask, work.side, work.layers[1], layout.n, layout.m)
        term = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
        blocks.transpose(2, 3)[batch.partial.unbind()] = term
    return blocks.view(tiles, 1, rows * bq, columns * bk)


def _with_bias(
    additive: Tensor | None, bias: Tensor | None, visit: _Visit, work: Plan, layout: _Layout, dtype: torch.dtype
) -> Tensor | None:
    """The mask's term and the bias of the tiles, together: broadcastable to (T, G, queries, keys)."""
    if bias is None:
        return additive
    term = bias[_bias_index(bias, visit, work, layout)].to(dtype)
    return term if additive is None else term + additive


def _add_bias_gradient(dbias: Tensor, ds: Tensor, visit: _Visit, work: Plan, layout: _Layout) -> None:
    """Add the gradient of the scores of some tiles (T, G, queries, keys) to that of the bias."""
    index = _bias_index(dbias, visit, work, layout)
    shape = torch.broadcast_shapes(*(i.shape for i in index))
    dbias.index_put_(index, ds.sum_to_size(shape), accumulate=True)


def _bias_index(bias: Tensor, visit: _Visit, work: Plan, layout: _Layout) -> tuple[Tensor, ...]:
    """Where the entries of the bias for some tiles stand; together broadcastable to (T, G, queries, keys)."""

    def tokens(units: Tensor, side: int, length: int) -> Tensor:
        inside = torch.arange(side, device=units.device)
        return (units[:, :, None] * side + inside).flatten(1).clamp(max=length - 1)  # what is beyond is masked

    heads = layout.lanes * layout.groups
    index = (
        visit.query_head[:, :, None, None] // heads,
        visit.query_head[:, :, None, None] % heads,
        tokens(visit.batch.queries, work.side[0], layout.n)[:, None, :, None],
        tokens(visit.batch.keys, work.side[1], layout.m)[:, None, None, :],
    )
    return tuple(i if size > 1 else i.new_zeros(1, 1, 1, 1) for i, size in zip(index, bias.shape, strict=True))
