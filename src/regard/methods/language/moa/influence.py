"""How much the loss feels the removal of one attention weight, from the gradient of the attention's output.

With A = softmax(scale · q kᵀ) and dA_ij = ∂L/∂A_ij = dO_i · v_j, removing entry (i, j) and renormalising the row
changes the loss to first order by

    E_ij = -A_ij (dA_ij - Σ_n A_in dA_in) / (1 - A_ij)          E_0j = -A_0j dA_0j when causal

Row 0 of causal attention has one entry, and nothing is left to renormalise.
"""

import torch
from torch import Tensor

from regard.attention.problem import checked
from regard.errors import ArgumentError, ShapeError

_CHUNK_WEIGHTS = 2**21  # weights held at once: 8 MB in float32


def attention_influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    *,
    causal: bool = True,
    block_size: int = 64,
    scale: float | None = None,
) -> Tensor:
    """Σ |E_ij| over blocks of ``block_size`` × ``block_size`` entries (arXiv:2406.14909): (B, H, N / b, N / b).

    Queries are taken a few at a time, so the N × N weights never exist. With ``block_size=1`` the result is |E| itself,
    which has that size. Entries above the diagonal are 0 when causal.

    Args:
        q: (B, H, N, D). k: (B, Hk, N, D), where Hk divides H. v: (B, Hk, N, Dv).
        grad_out: (B, H, N, Dv), the loss's gradient at the attention's output.
        causal: whether a query sees only the keys up to its own.
        block_size: b, which must divide N.
        scale: ``1/sqrt(D)`` by default.

    Returns:
        float32, or float64 for inputs in float64.

    Raises:
        ShapeError: the tensors do not fit together, or N is no multiple of the block size.
        ArgumentError: a block size below 1.
    """
    p = checked(q, k, v, None, None, scale)
    if p.n != p.m:
        raise ShapeError(f"k: expected as many keys as queries, {p.n}, got {p.m}")
    if grad_out.shape != (*q.shape[:3], v.shape[3]):
        raise ShapeError(
            f"grad_out: expected {(*q.shape[:3], v.shape[3])} like the output, got {tuple(grad_out.shape)}"
        )
    if block_size < 1:
        raise ArgumentError(f"block_size must be at least 1, got {block_size}")
    if p.n % block_size:
        raise ShapeError(f"q: expected a multiple of block_size={block_size} queries, got {p.n}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (t.to(dtype).unsqueeze(2) for t in (k, v))
    positions = torch.arange(p.n, device=q.device)
    size = p.n // block_size
    found = q.new_zeros(p.batch, p.heads, size, size, dtype=dtype)
    blocks = max(1, _CHUNK_WEIGHTS // max(1, p.batch * p.heads * p.n * block_size))  # rows of blocks at a time
    for first in range(0, size, blocks):
        last = min(first + blocks, size)
        rows = slice(first * block_size, last * block_size)
        seen = last * block_size if causal else p.n
        query, grad = (t[:, :, rows].to(dtype).unflatten(1, (p.kv_heads, p.groups)) for t in (q, grad_out))
        scores = query @ keys[..., :seen, :].mT * p.scale
        if causal:
            scores = scores.masked_fill(positions[rows, None] < positions[:seen], -torch.inf)
        weights = scores.softmax(-1)
        effect = _effect(weights, grad @ values[..., :seen, :].mT, first_row_alone=causal and first == 0)
        effect = effect.abs().flatten(1, 2)
        pooled = effect.unflatten(3, (-1, block_size)).sum(4).unflatten(2, (-1, block_size)).sum(3)
        found[:, :, first:last, : pooled.shape[3]] = pooled
    return found


def _effect(weights: Tensor, grad: Tensor, *, first_row_alone: bool) -> Tensor:
    """E (..., n, m) of weights A and their gradient dA, both (..., n, m)."""
    product = weights * grad
    eps = torch.finfo(weights.dtype).eps
    effect = -weights * (grad - product.sum(-1, keepdim=True)) / (eps + 1 - weights)
    if first_row_alone:
        effect[..., 0, :] = -product[..., 0, :]
    return effect
