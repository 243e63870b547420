"""Global response normalisation: channels compete by their norm over the image."""

import torch
from torch import Tensor, nn


class GlobalResponseNorm(nn.Module):
    """``x ∘ (γ ∘ n + 1) + β`` with ``n_c = ‖x_c‖ / mean_c ‖x_c‖``, norms over the grid (arXiv:2301.00808).

    (B, *grid, C) to the same.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.gamma, self.beta = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim() - 1)), keepdim=True)
        return x * (self.gamma * norm / (norm.mean(-1, keepdim=True) + self.eps) + 1) + self.beta
