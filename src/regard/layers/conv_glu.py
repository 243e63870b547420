"""A gated channel mixer whose gate looks at its neighbours."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers.grid import DepthwiseConv2d
from regard.layers.weights import load_strictly


class ConvGLU(nn.Module):
    """``W2 (GELU(dwconv(u)) ∘ v)`` with ``u, v = W1 x`` (TransNeXt, arXiv:2311.17132).

    (B, H, W, dim) to (B, H, W, out_dim).

    Args:
        dim: channels.
        hidden_dim: width of the MLP that it replaces; u and v are two thirds of it, for as many parameters.
        out_dim: dim by default.
    """

    def __init__(self, dim: int, hidden_dim: int | None = None, out_dim: int | None = None):
        super().__init__()
        inner = 2 * (dim if hidden_dim is None else hidden_dim) // 3
        if inner < 1:
            raise ArgumentError(f"hidden_dim: expected at least 2, got {hidden_dim}")
        self.fc1 = nn.Linear(dim, 2 * inner)
        self.dwconv = DepthwiseConv2d(inner)
        self.fc2 = nn.Linear(inner, dim if out_dim is None else out_dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.fc1(x).chunk(2, -1)
        return self.fc2(F.gelu(self.dwconv(u)) * v)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        **_: Any,
    ) -> "ConvGLU":
        """Weights and arguments of the published ``ConvolutionalGLU``."""
        module = cls(in_features, hidden_features or None, out_features or None)
        load_strictly(module, state_dict, {"dwconv.dwconv": "dwconv"})
        return module
