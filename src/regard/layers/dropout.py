"""Dropout of attention weights."""

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.attention import attention
from regard.masks import Mask


def dropout_attention(q: Tensor, k: Tensor, v: Tensor, rate: float, mask: Mask | None = None) -> Tensor:
    """`regard.attention`, with weights dropped at ``rate``; (B, H, N, D) and (B, Hk, M, D) to (B, H, N, Dv).

    The weights are attention to indicators of the keys: where something is dropped there is an N×M matrix.
    """
    if rate == 0.0:
        return attention(q, k, v, mask=mask)
    indicators = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    weights = F.dropout(attention(q, k, indicators, mask=mask), rate)
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
