"""Spectral gating: every channel of an image is filtered by frequencies (SpectFormer, GFNet)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.layers.relative_position import window_shape
from regard.mechanisms.grid.base import GridMechanism


def spectral_gating(x: Tensor, weight: Tensor) -> Tensor:
    """``irfft2(rfft2(x) ∘ W)`` over the grid of x (B, H, W, C), orthonormal, in float32 or wider.

    ``weight``: (H, W // 2 + 1, C, 2), real and imaginary parts.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft2(x.to(wide), dim=(1, 2), norm="ortho")
    spectrum = spectrum * torch.view_as_complex(weight.to(wide).contiguous())
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho").to(x.dtype)


class SpectralGating(GridMechanism):
    """A learned complex factor for every frequency and channel (arXiv:2304.06446, GFNet arXiv:2107.00645).

        y = irfft2(rfft2(x) ∘ W)

    x (B, H, W, C) to the same, for the one grid size it was made for (`resize` makes it for another). It is a circular
    depthwise convolution with a kernel as large as the grid (`kernel`): every token sees all, channels do not mix, and
    there is no causal form. What the borders of the half spectrum hold beyond a real signal's has no effect, as
    `torch.fft` has it.

    Args:
        dim: C.
        grid_size: (H, W), or one number for both.
    """

    cost: ClassVar[str] = "O(N C log N), N = H W"
    example: ClassVar[dict[str, Any]] = {"grid_size": 14}

    def __init__(self, dim: int, grid_size: int | Sequence[int]):
        super().__init__()
        self.dim, self.grid_size = dim, _grid(grid_size)
        height, width = self.grid_size
        self.weight = nn.Parameter(torch.randn(height, width // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (*self.grid_size, self.dim):
            height, width = self.grid_size
            raise ShapeError(
                f"x: expected (B, {height}, {width}, {self.dim}), got {tuple(x.shape)}; resize() makes other grids fit"
            )
        return spectral_gating(x, self.weight)

    def kernel(self) -> Tensor:
        """(H, W, C): what the image is circularly convolved with."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return torch.fft.irfft2(torch.view_as_complex(weight), s=self.grid_size, dim=(0, 1))

    @torch.no_grad()
    def resize(self, grid_size: int | Sequence[int]) -> Self:
        """Make it for another grid, in place: real and imaginary parts are interpolated bilinearly."""
        height, width = self.grid_size = _grid(grid_size)
        parts = self.weight.flatten(2).movedim(-1, 0).unsqueeze(0)
        parts = F.interpolate(parts, (height, width // 2 + 1), mode="bilinear", align_corners=True)
        self.weight = nn.Parameter(parts[0].movedim(0, -1).unflatten(-1, (self.dim, 2)).contiguous())
        if isinstance(self._hub_mixin_config, dict):  # what a saved model is made from
            self._hub_mixin_config["grid_size"] = self.grid_size
        return self

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid_size={self.grid_size}"

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        h: int = 14,
        w: int = 8,
        grid_size: Sequence[int] | None = None,
        **_: Any,
    ) -> "SpectralGating":
        """The published ``SpectralGatingNetwork``; ``grid_size`` where the grid is not square.

        Raises:
            ArgumentError: a grid that has not ``h`` by ``w`` frequencies.
        """
        grid = _grid((h, h) if grid_size is None else grid_size)
        if (grid[0], grid[1] // 2 + 1) != (h, w):
            raise ArgumentError(f"grid_size: expected a grid with {h} x {w} frequencies, got {grid}")
        module = cls(dim, grid)
        load_strictly(module, state_dict, {"complex_weight": "weight"})
        return module


def _grid(size: int | Sequence[int]) -> tuple[int, int]:
    shape = window_shape(size, "grid_size")
    if len(shape) != 2:
        raise ArgumentError(f"grid_size: expected (height, width), got {size}")
    return shape[0], shape[1]
