"""Linear attention and its relatives: one recurrence in three forms that agree.

    S_t = exp(g_t) S_{t-1} + k_tᵀ v_t        o_t = q_t S_t

g are log decays, at most 0: none, per head, per head and token, or per channel (gated linear attention). "recurrent"
is the definition, step by step; "parallel" writes out the N×N matrix; "chunked" is dense inside chunks and carries the
state from one to the next, which costs O(N).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regard.errors import ArgumentError, ShapeError, Unsupported

FORMS = ("auto", "chunked", "recurrent", "parallel")
_SEGMENT = 16  # chunks between two states that are kept for the backward; inside, they are computed again
_CHANNEL_CHUNK = 16  # with decays per channel the pairs of a chunk need D numbers each
_FEW = 4  # tokens up to which steps are faster than a chunk


class LinearResult(NamedTuple):
    """
    Attributes:
        out: (B, H, N, E).
        state: (B, H, D, E) after the last token, in float32 or wider.
    """

    out: Tensor
    state: Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    causal: bool = True,
    valid: Tensor | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> LinearResult:
    """``o_i = Σ_{j≤i} exp(Σ_{j<l≤i} g_l) (q_i·k_j) v_j``: no softmax, no scale, no denominator.

    Feature maps are applied by the caller (`regard.linear.features`). Sums are taken in float32 or wider. The backward
    of the chunked form keeps the inputs and one state per sixteen chunks, nothing else.

    Args:
        q: (B, H, N, D).
        k: (B, Hk, M, D), where Hk divides H; M = N if causal.
        v: (B, Hk, M, E).
        decay: log decays g ≤ 0: (H,), (B or 1, H, N) or (B or 1, H, N, D); None for none.
        state: (B, H, D, E) from the tokens before; None for none.
        causal: False lets every query see all keys; then there is neither decay nor state.
        valid: (B, M) bool; keys that are False contribute nothing (decay goes on).
        form: "chunked", "recurrent" or "parallel"; "auto" chooses by the length.
        chunk_size: tokens per chunk; at most 16 with decays per channel.

    Raises:
        ShapeError: shapes do not fit together.
        ArgumentError: an unknown form, or a chunk size below 1.
        Unsupported: decay or state without causality.
    """
    k, v = _checked(q, k, v, decay, state, causal, valid, form, chunk_size)
    dtype = v.dtype
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q, k, v))
    if valid is not None:
        k = k.masked_fill(~valid[:, None, :, None], 0.0)
        v = v.masked_fill(~valid[:, None, :, None], 0.0)
    if not causal:
        total = k.mT @ v
        return LinearResult((q @ total).to(dtype), total)
    n = q.shape[2]
    g = None if decay is None else _per_token(decay.to(wide), n)
    s = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state.to(wide)
    if form == "auto":
        form = "recurrent" if n <= _FEW else "chunked"
    run = {"recurrent": _recurrent, "parallel": _parallel, "chunked": _chunked}[form]
    if g is not None and g.dim() == 4:
        chunk_size = min(chunk_size, _CHANNEL_CHUNK)
    out, s = run(q, k, v, g, s, chunk_size)
    return LinearResult(out.to(dtype), s)


def normalized_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    state: Tensor | None = None,
    causal: bool = True,
    valid: Tensor | None = None,
    eps: float = 1e-6,
    min_denominator: float | None = None,
    form: str = "auto",
    chunk_size: int = 64,
) -> LinearResult:
    """`linear_attention` divided by ``Σ_j w_ij``, the sum of its own weights: a weighted mean if features are positive.

    The sum is one more column of v, of ones; so the state is (B, H, D, E + 1). The denominator gets ``eps`` added, or
    is clamped from below at ``min_denominator`` where that is given.
    """
    ones = v.new_ones(*v.shape[:-1], 1)
    both, after = linear_attention(
        q,
        k,
        torch.cat([v, ones], dim=-1),
        decay=decay,
        state=state,
        causal=causal,
        valid=valid,
        form=form,
        chunk_size=chunk_size,
    )
    total = both[..., -1:]
    total = total + eps if min_denominator is None else total.clamp(min=min_denominator)
    return LinearResult(both[..., :-1] / total, after)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    out = []
    for t in range(q.shape[2]):
        if g is not None:
            s = s * _column(g[:, :, t]).exp()
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s).squeeze(-2))
    return (torch.stack(out, 2) if out else v.new_zeros(*q.shape[:3], v.shape[3])), s


def _parallel(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    if q.shape[2] == 0:
        return q @ s, s
    one = None if g is None else g.unsqueeze(2)
    return _chunks(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), one, s)


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    length = _SEGMENT * chunk_size
    out = []
    for start in range(0, n, length):
        tensors = (q, k, v) if g is None else (q, k, v, g)
        parts = [t[:, :, start : start + length] for t in tensors]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, s)) and n > length:
            o, s = checkpoint(_segment, chunk_size, s, *parts, use_reentrant=False)
        else:
            o, s = _segment(chunk_size, s, *parts)
        out.append(o)
    return (torch.cat(out, 2) if out else q @ s), s


def _segment(chunk_size: int, s: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Some chunks at once; what fills up the last chunk is zero and changes no state."""
    n = tensors[0].shape[2]
    missing = -n % chunk_size
    cut = [F.pad(t, (0, 0) * (t.dim() - 3) + (0, missing)).unflatten(2, (-1, chunk_size)) for t in tensors]
    q, k, v, *g = cut
    out, s = _chunks(q, k, v, g[0] if g else None, s)
    return out[:, :, :n], s


def _chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v (B, H, chunks, m, ·), g (B, H, chunks, m) or (..., m, D), all exponents at most 0."""
    count, m = q.shape[2:4]
    future = torch.ones(m, m, dtype=torch.bool, device=q.device).triu(1)
    if g is None:
        within = (q @ k.mT).masked_fill(future, 0.0) @ v
        added = k.mT @ v
        before = torch.cat([s.unsqueeze(2), added[:, :, :-1]], 2).cumsum(2)
        return (within + q @ before).flatten(2, 3), before[:, :, -1] + added[:, :, -1]
    c = g.cumsum(3)  # log decay since the start of the chunk, this token's included
    if g.dim() == 4:
        pairs = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
        weights = (q @ k.mT) * pairs
        c = c.unsqueeze(-1)
    else:
        pairs = (c.unsqueeze(4) - c.unsqueeze(3)).masked_fill(future.unsqueeze(-1), -torch.inf).exp()
        weights = torch.einsum("bhcad,bhcxd,bhcaxd->bhcax", q, k, pairs.expand(*q.shape[:3], m, m, q.shape[-1]))
    last = c[:, :, :, -1:]
    added = (k * (last - c).exp()).mT @ v
    kept = last.mT.exp()  # (B, H, chunks, D or 1, 1)
    states = []
    for chunk in range(count):
        states.append(s)
        s = s * kept[:, :, chunk] + added[:, :, chunk]
    out = weights @ v + (q * c.exp()) @ torch.stack(states, 2)
    return out.flatten(2, 3), s


def _column(g: Tensor) -> Tensor:
    """Decays of one token, (B, H) or (B, H, D), against a state (B, H, D, E)."""
    return g[..., None, None] if g.dim() == 2 else g.unsqueeze(-1)


def _per_token(decay: Tensor, n: int) -> Tensor:
    return decay[None, :, None].expand(1, -1, n) if decay.dim() == 1 else decay


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    state: Tensor | None,
    causal: bool,
    valid: Tensor | None,
    form: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as q has."""
    if form not in FORMS:
        raise ArgumentError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if chunk_size < 1:
        raise ArgumentError(f"chunk_size: expected at least 1, got {chunk_size}")
    if q.dim() != 4 or k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ShapeError(f"k: expected (B, Hk, M, D) to go with q (B, H, N, D) {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ShapeError(f"v: expected {tuple(k.shape[:3])} and E, got {tuple(v.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"k: {k.shape[1]} heads do not divide the {q.shape[1]} heads of q")
    batch, heads, n, dim = q.shape
    if causal and k.shape[2] != n:
        raise ShapeError(f"k: causal attention needs as many keys as queries, {n}, got {k.shape[2]}")
    if not causal and (decay is not None or state is not None):
        raise Unsupported("decay and state have no meaning without causality (causal=False)")
    if valid is not None and (valid.dtype != torch.bool or tuple(valid.shape) != (batch, k.shape[2])):
        raise ShapeError(f"valid: expected bool {(batch, k.shape[2])}, got {valid.dtype} {tuple(valid.shape)}")
    if decay is not None:
        full = (batch, heads, n, dim)
        fits = tuple(decay.shape) == (heads,) or (
            decay.dim() in (3, 4) and decay.shape[0] in (1, batch) and tuple(decay.shape[1:]) == full[1 : decay.dim()]
        )
        if not fits:
            raise ShapeError(f"decay: expected ({heads},), {full[:3]} or {full}, got {tuple(decay.shape)}")
    if state is not None and tuple(state.shape) != (batch, heads, dim, v.shape[3]):
        raise ShapeError(f"state: expected {(batch, heads, dim, v.shape[3])}, got {tuple(state.shape)}")
    groups = heads // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
