"""How much attention each key receives, without the matrix of weights."""

import torch
from torch import Tensor

from regard.attention.problem import checked
from regard.errors import ShapeError
from regard.masks import Mask


def received(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    queries: slice | None = None,
) -> Tensor:
    """Column sums of the attention weights, ``r_j = Σ_i exp(s_ij - lse_i)``: (B, H, M), float32 or wider.

    A second pass over the scores in chunks of queries; memory is O(B·H·M) per chunk row, never O(N·M).

    Args:
        query: (B, H, N, D).
        key: (B, Hk, M, D).
        lse: (B, H, N), as `attention` returned it for the same inputs.
        mask, bias, scale: as in `attention`.
        queries: count only these queries (a slice of 0..N); all by default.

    Raises:
        ShapeError: inputs do not fit together.
        ArgumentError: an argument is of the wrong kind.
    """
    p = checked(query, key, key, mask, bias, scale)
    if lse.shape != query.shape[:3]:
        raise ShapeError(f"lse: expected shape {tuple(query.shape[:3])} like query, got {tuple(lse.shape)}")
    start, stop, step = (queries or slice(None)).indices(p.n)
    dtype = torch.promote_types(query.dtype, torch.float32)
    total = query.new_zeros(p.batch, p.heads, p.m, dtype=dtype)
    keys = p.key.to(dtype).unsqueeze(2)
    chunk = max(1, _CHUNK_SCORES // max(1, p.batch * p.heads * p.m)) * step
    for q0 in range(start, stop, chunk):
        rows = slice(q0, min(q0 + chunk, stop), step)
        q = query[:, :, rows].to(dtype).unflatten(1, (p.kv_heads, p.groups))
        s = (q @ keys.mT * p.scale).flatten(1, 2)
        if (tile := p.bias_rows(rows)) is not None:
            s = s + tile
        rows_lse = lse[:, :, rows, None].to(dtype)
        weights = (s - rows_lse.masked_fill(rows_lse == -torch.inf, 0.0)).exp()
        if (allowed := p.allowed(rows)) is not None:
            weights = weights.masked_fill(~allowed, 0.0)
        total = total + weights.sum(2)
    return total


_CHUNK_SCORES = 2**22  # scores held at once: 16 MB in float32
