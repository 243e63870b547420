"""Shifted windows (Swin): window attention whose windows lie across the borders of those of the layer before."""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from regard.attention import attention
from regard.errors import ArgumentError
from regard.layers import merge_heads
from regard.mechanisms.grid.partition import BlockAttention


class ShiftedWindowAttention(BlockAttention):
    """Attention inside shifted windows of P × P tokens with relative positions (Swin, arXiv:2103.14030).

        y = Wo softmax(q kᵀ / √D + bias) v        where `regard.masks.shifted_windows` lets tokens see each other

    x (B, H, W, C) to the same. The grid is rolled by -shift, cut into windows, and tokens that are in one window only
    because of the roll are masked; with shift 0 it is `BlockAttention`. Exact, noncausal.

    Args:
        dim, num_heads, window_size, qkv_bias: as in `BlockAttention`; P must divide H and W.
        shift: from 0 to P - 1.
    """

    cost: ClassVar[str] = "O(N C² + N P² C)"

    def __init__(self, dim: int, num_heads: int, window_size: int = 7, shift: int = 0, qkv_bias: bool = True):
        super().__init__(dim, num_heads, window_size, qkv_bias)
        if not 0 <= shift < min(self.size):
            raise ArgumentError(f"shift: expected 0 to {min(self.size) - 1}, got {shift}")
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        if not self.shift:
            return super().forward(x)
        self._check(x)
        q, k, v = self._heads(x.roll((-self.shift, -self.shift), (1, 2)))
        assert self.rel_pos is not None
        y = self.proj(merge_heads(attention(q, k, v, mask=self._together(x), bias=self.rel_pos()[None])))
        (height, width), (p, _) = x.shape[1:3], self.size
        y = rearrange(y, f"(b h w) (p q) c -> b {self.tokens} c", h=height // p, w=width // self.size[1], p=p)
        return y.roll((self.shift, self.shift), (1, 2))

    def _together(self, x: Tensor) -> Tensor:
        """Which tokens of the rolled windows are together without the roll: (B · windows, 1, P², P²) bool."""
        rows, columns = (torch.arange(side, device=x.device) >= side - self.shift for side in x.shape[1:3])
        region = 2 * rows[:, None].int() + columns.int()
        region = rearrange(region, f"{self.tokens} -> (h w) (p q)", p=self.size[0], q=self.size[1])
        same = region[:, :, None] == region[:, None, :]
        return same.repeat(x.shape[0], 1, 1).unsqueeze(1)
