"""Feed-forward layers: the channel mixers between token mixers."""

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """``W2 act(W1 x)``; (..., dim) to (..., dim)."""

    def __init__(self, dim: int, hidden_dim: int | None = None, bias: bool = True, act: type[nn.Module] = nn.GELU):
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """``W_down (SiLU(W_gate x) ∘ W_up x)`` (arXiv:2002.05202); (..., dim) to (..., dim).

    ``hidden_dim`` is ``8/3 dim`` by default, rounded up to a multiple of 8: as many parameters as an MLP of ratio 4.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None, bias: bool = False):
        super().__init__()
        hidden_dim = -(-8 * dim // 24) * 8 if hidden_dim is None else hidden_dim
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
