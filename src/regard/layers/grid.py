"""Layers on channels-last grids (B, *grid, C)."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on (B, H, W, C); its weights keep their usual shape, "same" padding is the default."""

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int, stride: int = 1, **kwargs: Any):
        super().__init__(dim_in, dim_out, kernel_size, stride, **({"padding": kernel_size // 2} | kwargs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class DepthwiseConv2d(Conv2d):
    """One filter per channel on (B, H, W, C)."""

    def __init__(self, dim: int, kernel_size: int = 3, bias: bool = True):
        super().__init__(dim, dim, kernel_size, groups=dim, bias=bias)


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training a sample loses this branch with probability ``rate``.

    What is kept is scaled by ``1 / (1 - rate)``; (B, ...) to the same.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates that rise linearly from 0 in the first block to ``rate`` in the last, for each block of each stage."""
    last = max(1, sum(depths) - 1)
    rates = iter([rate * block / last for block in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C), filled up with zeros at the bottom and right, to windows (B · count, size², C)."""
    down, right = -x.shape[1] % size, -x.shape[2] % size
    x = F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x
    return rearrange(x, "b (h p) (w q) c -> (b h w) (p q) c", p=size, q=size)


def unwindows(x: Tensor, size: int, height: int, width: int) -> Tensor:
    """Windows (B · count, size², C) back to (B, height, width, C), what was filled up cut off."""
    x = rearrange(x, "(b h w) (p q) c -> b (h p) (w q) c", h=-(-height // size), w=-(-width // size), p=size, q=size)
    return x[:, :height, :width]
