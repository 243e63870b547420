"""Learned scales of residual branches."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """``γ ∘ x`` with one learned factor per channel (arXiv:2103.17239)."""

    def __init__(self, dim: int, init: float = 1e-4):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
