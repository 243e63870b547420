"""A channel mixer with a depthwise convolution in its hidden layer."""

from torch import Tensor, nn

from regard.layers.grid import DepthwiseConv2d


class ConvMLP(nn.Module):
    """``W2 (h + dwconv(h))`` with ``h = GELU(W1 x)`` and a 3×3 convolution; (B, H, W, C) to the same."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.dwconv = DepthwiseConv2d(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        return self.fc2(h + self.dwconv(h))
