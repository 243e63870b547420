"""Convolutions over time that see no future."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError


class CausalDepthwiseConv1d(nn.Module):
    """``y_t = b + Σ_j w_j ∘ x_{t-k+1+j}``, one filter of ``kernel_size`` taps per channel; zeros before the start.

    x (..., N, channels) to the same. The state is what the next tokens still see: the last ``kernel_size - 1`` inputs
    (..., kernel_size - 1, channels).
    """

    def __init__(self, channels: int, kernel_size: int = 3, bias: bool = True):
        super().__init__()
        if kernel_size < 1:
            raise ArgumentError(f"kernel_size: expected at least 1, got {kernel_size}")
        self.kernel_size = kernel_size
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(x)[0]

    def stream(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next tokens, and the state after them."""
        before = x.new_zeros(*x.shape[:-2], self.kernel_size - 1, x.shape[-1]) if state is None else state
        padded = torch.cat([before, x], dim=-2)
        y = F.conv1d(padded.flatten(0, -3).mT, self.conv.weight, self.conv.bias, groups=x.shape[-1])
        return y.mT.reshape(x.shape), padded[..., padded.shape[-2] - self.kernel_size + 1 :, :]
