"""Squeeze and excite: every channel is scaled by what the whole image says about it."""

from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """``x ∘ σ(W2 act(W1 mean(x)))`` (arXiv:1709.01507); (B, *grid, C) to the same, the mean is over the grid.

    Args:
        dim: C.
        hidden_dim: rows of W1.
        act: between the two projections.
        bias: of both.
    """

    def __init__(self, dim: int, hidden_dim: int, act: type[nn.Module] = nn.ReLU, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(tuple(range(1, x.dim() - 1)), keepdim=True)
        return x * self.fc2(self.act(self.fc1(pooled))).sigmoid()
