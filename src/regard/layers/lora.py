"""Low-rank changes to a linear layer."""

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError


class LoRA(nn.Module):
    """``x A B``, to be added to a linear layer's output (arXiv:2106.09685); zero at the start, because B is.

    (..., dim_in) to (..., dim_out).
    """

    def __init__(self, dim_in: int, dim_out: int, rank: int, alpha: float | None = None):
        super().__init__()
        if rank < 1:
            raise ArgumentError(f"rank: expected at least 1, got {rank}")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.down = nn.Parameter(torch.randn(dim_in, rank) * dim_in**-0.5)
        self.up = nn.Parameter(torch.zeros(rank, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down @ self.up * self.scale
