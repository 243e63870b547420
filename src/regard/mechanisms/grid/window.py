"""Plain window attention, which many backbones put beside something that mixes globally."""

from typing import ClassVar

from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.layers.grid import unwindows, windows
from regard.mechanisms.grid.base import GridMechanism


class WindowAttention2d(GridMechanism):
    """Softmax attention inside windows of (B, H, W, C), without shift or bias; zeros fill up the last windows.

    The zeros are tokens like others, their keys are the projection's bias: so it was published (DaViT, L2ViT). For
    windows that must divide the grid, with relative positions, see `BlockAttention`.

    Args:
        dim: C.
        num_heads: heads.
        window_size: side of a window.
        qkv_bias: of the query, key and value projections.
    """

    cost: ClassVar[str] = "O(N w² C)"

    def __init__(self, dim: int, num_heads: int, window_size: int = 7, qkv_bias: bool = True):
        super().__init__()
        per_head(dim, num_heads)
        if window_size < 1:
            raise ArgumentError(f"window_size: expected at least 1, got {window_size}")
        self.dim, self.num_heads, self.window_size = dim, num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        cut = windows(x, self.window_size)
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(cut).chunk(3, -1))
        return unwindows(self.proj(merge_heads(attention(q, k, v))), self.window_size, *x.shape[1:3])
