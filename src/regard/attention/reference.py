"""The specification: attention written out over the whole score matrix, in the order of its equation."""

import torch
from torch import Tensor

from regard.attention.partial import Partial
from regard.attention.problem import Problem


def scores(p: Problem) -> Tensor:
    """``scale · q kᵀ + bias``, with ``-inf`` where the mask forbids: (B, H, N, M), float32 or wider."""
    dtype = torch.promote_types(p.query.dtype, torch.float32)
    key = p.key.to(dtype).repeat_interleave(p.groups, dim=1)
    s = p.query.to(dtype) @ key.mT * p.scale
    if p.bias is not None:
        s = s + p.bias
    allowed = p.allowed()
    return s if allowed is None else s.masked_fill(~allowed, -torch.inf)


def softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise softmax and log-sum-exp that give zeros and ``-inf``, and zero gradients, for rows of ``-inf``."""
    if s.shape[-1] == 0:
        return s, s.sum(-1) - torch.inf
    peak = s.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    e = (s - peak).exp()
    total = e.sum(-1, keepdim=True)
    unseen = total == 0
    total = total.masked_fill(unseen, 1.0)
    lse = (total.log() + peak).masked_fill(unseen, -torch.inf)
    return e / total, lse.squeeze(-1)


def run(p: Problem) -> Partial:
    """Attention by its definition; O(N·M) memory."""
    weights, lse = softmax(scores(p))
    value = p.value.to(weights.dtype).repeat_interleave(p.groups, dim=1)
    return Partial((weights @ value).to(p.query.dtype), lse)


def weights(p: Problem) -> Tensor:
    """The attention weights themselves: (B, H, N, M), float32 or wider."""
    return softmax(scores(p))[0]
