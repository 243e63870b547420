"""Softmax attention of one query over every prefix: attention as a recurrence with a state of constant size."""

from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import ShapeError

_CHUNK = 128


class PrefixState(NamedTuple):
    """Attention to all tokens so far, not yet normalised: the weighted sums are relative to ``exp(peak)``.

    Attributes:
        peak: (B, H), the largest score; -inf before the first token.
        total: (B, H), ``Σ exp(s - peak)``.
        weighted: (B, H, E), ``Σ exp(s - peak) v``.
    """

    peak: Tensor
    total: Tensor
    weighted: Tensor


def prefix_softmax(
    scores: Tensor, values: Tensor, valid: Tensor | None = None, state: PrefixState | None = None
) -> tuple[Tensor, PrefixState]:
    """``o_i = Σ_{j≤i} exp(s_j) v_j / Σ_{j≤i} exp(s_j)`` for every i, and the state after the last.

    Exact for scores of any size: every exponent is a score minus the largest one of its prefix. A prefix without a
    valid token gives zeros. Cost O(N · 128 · E), in chunks of 128.

    Args:
        scores: (B, H, N).
        values: (B, H, N, E).
        valid: (B, N) bool, False leaves a token out.
        state: of the tokens before.

    Raises:
        ShapeError: shapes do not fit together.
    """
    if scores.dim() != 3 or values.dim() != 4 or values.shape[:3] != scores.shape:
        raise ShapeError(f"values: expected {tuple(scores.shape)} and E, got {tuple(values.shape)}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != (scores.shape[0], scores.shape[2])):
        raise ShapeError(f"valid: expected bool {(scores.shape[0], scores.shape[2])}, got {tuple(valid.shape)}")
    dtype, wide = values.dtype, torch.promote_types(values.dtype, torch.float32)
    scores, values = scores.to(wide), values.to(wide)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
        values = values.masked_fill(~valid[:, None, :, None], 0.0)
    if state is None:
        nothing = scores.new_zeros(scores.shape[:2])
        state = PrefixState(
            torch.full_like(nothing, -torch.inf), nothing, values.new_zeros(*values.shape[:2], values.shape[3])
        )
    if scores.shape[2] == 0:
        return values.to(dtype), state
    out = []
    for s, v in zip(scores.split(_CHUNK, 2), values.split(_CHUNK, 2), strict=True):
        o, state = _chunk(s, v, state)
        out.append(o)
    return torch.cat(out, 2).to(dtype), state


def _chunk(s: Tensor, v: Tensor, state: PrefixState) -> tuple[Tensor, PrefixState]:
    before = state.peak.unsqueeze(-1)
    peak = torch.maximum(s.detach().cummax(-1).values, before)  # a constant: results do not depend on it
    safe = peak.masked_fill(peak == -torch.inf, 0.0)
    future = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).triu(1)
    weights = (s.unsqueeze(-2) - safe.unsqueeze(-1)).masked_fill(future, -torch.inf).exp()
    old = (before - safe).exp()
    total = weights.sum(-1) + old * state.total.unsqueeze(-1)
    weighted = weights @ v + old.unsqueeze(-1) * state.weighted.unsqueeze(-2)
    out = weighted / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out, PrefixState(peak[..., -1], total[..., -1], weighted[..., -1, :])
