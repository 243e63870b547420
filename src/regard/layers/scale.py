"""Learned scales of residual branches."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """``γ ∘ x`` with one learned factor per channel (arXiv:2103.17239), with ``bias`` also a summand, 0 at first."""

    def __init__(self, dim: int, init: float = 1e-4, bias: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gamma
        return y if self.bias is None else y + self.bias
