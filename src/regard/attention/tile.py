"""One dense tile of attention, forward and backward: the unit of work of `sdpa` and `blocks`.

Shapes: q (L, G, n, D); k, v (L, K, m, D), where K divides G; additive mask broadcastable to (L, G, n, m) and float32 or
wider, or None. L counts independent problems, G query heads and K key heads. On CPU the tile is torch's own fused
kernel, called directly because it also returns the log-sum-exp; elsewhere it is written out in matrix products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten


def _has_kernel(q: Tensor) -> bool:
    """Whether the fused kernel can be called directly; it is the CPU's."""
    return q.device.type == "cpu"


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(out (L, G, n, D), lse (L, G, n)) of a tile; rows that see nothing give zeros and ``-inf``.

    ``causal``: query i sees only keys 0..i of the tile.
    """
    if _has_kernel(q):
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, attn_mask=mask, scale=scale
        )
        if mask is not None:  # the kernel reports 0 for rows that see nothing
            lse = lse.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
        return out, lse
    k, v = (_spread(x, q.shape[1]) for x in (k, v))
    s = _scores(q, k, mask, scale, causal)
    lse = s.logsumexp(-1)
    return (_weights(s, lse) @ v.to(s.dtype)).to(v.dtype), lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a tile, given the output and log-sum-exp over *all* keys of its rows.

    Where ``out`` and ``lse`` come from more keys than the tile holds, the result is the tile's share of the gradients.
    """
    if not _has_kernel(q):
        return backward_with_scores(grad_out, grad_lse, q, k, v, out, lse, mask, scale, causal)[:3]
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    dim = q.shape[-1]
    if grad_lse is not None:
        # The kernel knows no grad_lse, but computes Σ grad_out ∘ out itself: one more column with value 0, gradient 1
        # and output -grad_lse changes that sum by -grad_lse and nothing else.
        grad_out = torch.cat([grad_out, torch.ones_like(grad_out[..., :1])], -1)
        out = torch.cat([out, -grad_lse.unsqueeze(-1).to(out.dtype)], -1)
        q, k, v = (torch.cat([t, torch.zeros_like(t[..., :1])], -1) for t in (q, k, v))
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    dq, dk, dv = (g[..., :dim] for g in grads)
    return dq, dk, dv


def backward_with_scores(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, ds) of a tile; ds (L, G, n, m) is the gradient of the scores, which a learnt bias needs."""
    kv_heads = k.shape[1]
    k, v = (_spread(x, q.shape[1]) for x in (k, v))
    weights, ds = _grad_scores(grad_out, grad_lse, q, k, v, out, lse, mask, scale, causal)
    dq, dk, dv = _from_grad_scores(grad_out, q, k, weights, ds, scale)
    return dq, _gather(dk, kv_heads), _gather(dv, kv_heads), ds


def _spread(x: Tensor, heads: int) -> Tensor:
    """Each key head, (L, K, m, D), for all its query heads: (L, heads, m, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _gather(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of each key head from those of its query heads."""
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).sum(2)


def _grad_scores(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """``P = exp(s - lse)`` and ``dS = P ∘ (grad_out vᵀ - Σ_d grad_out ∘ out + grad_lse)``."""
    weights = _weights(_scores(q, k, mask, scale, causal), lse)
    wide = weights.dtype
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    return weights, weights * (grad_out.to(wide) @ v.to(wide).mT - delta.unsqueeze(-1))


def _from_grad_scores(
    grad_out: Tensor, q: Tensor, k: Tensor, weights: Tensor, ds: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = ds.dtype
    dq = ds @ k.to(wide) * scale
    dk = ds.mT @ q.to(wide) * scale
    dv = weights.mT @ grad_out.to(wide)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ k.to(wide).mT * scale
    if causal:
        s = s.masked_fill(s.new_ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return s if mask is None else s + mask


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    return (s - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()


class Attend(torch.autograd.Function):
    """A whole problem as one tile, differentiable through ``out`` and ``lse``; the mask gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, mask, scale, causal)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.scale, ctx.causal = scale, causal
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dq, dk, dv = backward(grad_out, grad_lse, q, k, v, out, lse, mask, ctx.scale, ctx.causal)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None
