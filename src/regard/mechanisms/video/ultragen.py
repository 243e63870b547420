"""UltraGen: windows at two scales and a pooled copy of the whole video, fused by diffusion time."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from regard import masks
from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.layers.lora import LoRA
from regard.masks import Mask
from regard.positions import rotary_angles, rotate

Grid = tuple[int, int, int]
LAYOUTS = ("shift", "even")


class UltraGenAttention(nn.Module):
    """Hierarchical window attention for a video transformer (UltraGen, arXiv:2510.18775).

        cro = SA(windows; θ)                                 K×K windows, (K+1)×(K+1) in odd layers, all frames
        hla = up(SA(coarse windows of down(z); θ + LoRA))    K/2 or K/2+1 per axis, down by ``coarse_factor``
        glb = up(SA(down(z); θ + LoRA))                      all tokens, down by ``global_factor``
        out = a glb + (1 - a)(b hla + (1 - b) cro),          a, b = MLP(sincos(t)), per channel

    z (B, T, H, W, C) and diffusion time t (B,) to (B, T, H, W, C), noncausal. ``down`` is a depthwise convolution that
    starts as the mean of a cell, ``up`` a bilinear resize and a 3×3×3 convolution that starts as the identity; a and b
    start at zero, so a new block is exactly window attention with the host's weights. Positions of pooled tokens are
    the centres of their cells. With S = T·H·W tokens, cost O(S² C (1/K² + 4/(K² c⁴) + 1/g⁴)) for factors c and g.

    The paper has no published code and leaves open: the layout of odd layers, the order inside the local pair (the
    coarser one takes the gate here), the gates' range (unbounded here) and how convolutions start.

    Args:
        dim, num_heads: C and H, with head_dim D = C / H.
        layer_idx: odd layers have other borders than even ones.
        windows: K, even.
        global_factor, coarse_factor: how much smaller height and width become in the two pooled branches.
        lora_rank: of the changes to q, k, v in each pooled branch.
        time_dim: width of the sine code of t.
        layout: of odd layers, "shift" (borders move by half a window) or "even" (K+1 windows of equal size).
        rope_theta: rotary positions along time, height and width, a third of the channels each; None for none.
        bias: of the projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        layer_idx: int = 0,
        windows: int = 4,
        global_factor: int = 4,
        coarse_factor: int = 2,
        lora_rank: int = 64,
        time_dim: int = 256,
        layout: str = "shift",
        rope_theta: float | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        if windows < 1 or (windows > 1 and windows % 2):
            raise ArgumentError(f"windows: expected 1 or an even number, got {windows}")
        if layout not in LAYOUTS:
            raise ArgumentError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
        if rope_theta is not None and self.head_dim < 6:
            raise ArgumentError(f"rope_theta: three axes need a head_dim of at least 6, got {self.head_dim}")
        self.dim, self.num_heads, self.windows, self.layout = dim, num_heads, windows, layout
        self.odd, self.rope_theta, self.time_dim = layer_idx % 2, rope_theta, time_dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.coarse = Pooled(dim, coarse_factor, lora_rank)
        self.glob = Pooled(dim, global_factor, lora_rank)
        closed = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(closed.weight)
        nn.init.zeros_(closed.bias)
        self.gates = nn.Sequential(nn.Linear(time_dim, dim), nn.SiLU(), closed)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        if z.dim() != 5 or z.shape[-1] != self.dim:
            raise ShapeError(f"z: expected (B, T, H, W, {self.dim}), got {tuple(z.shape)}")
        if tuple(t.shape) != (z.shape[0],):
            raise ShapeError(f"t: expected ({z.shape[0]},), got {tuple(t.shape)}")
        fine = self._attend(z, 1, self.windows, None)
        coarse = self.coarse(z, lambda x, lora: self._attend(x, self.coarse.factor, max(1, self.windows // 2), lora))
        whole = self.glob(z, lambda x, lora: self._attend(x, self.glob.factor, None, lora))
        a, b = (g[:, None, None, None] for g in self.gates(time_code(t, self.time_dim).to(z.dtype)).chunk(2, dim=-1))
        return a * whole + (1 - a) * (b * coarse + (1 - b) * fine)

    def _attend(self, z: Tensor, factor: int, windows: int | None, lora: nn.Module | None) -> Tensor:
        """Self-attention of a grid inside so many windows per axis, or everywhere."""
        grid = (z.shape[1], z.shape[2], z.shape[3])
        x = z.flatten(1, 3)
        qkv = self.qkv(x) if lora is None else self.qkv(x) + lora(x)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        if self.rope_theta is not None:
            q, k = (self._rotate(part, grid, factor) for part in (q, k))
        mask = None if windows is None else window_mask(grid, windows, bool(self.odd), self.layout)
        return self.proj(merge_heads(attention(q, k, v, mask=mask))).view(z.shape)

    def _rotate(self, x: Tensor, grid: Grid, factor: int) -> Tensor:
        assert self.rope_theta is not None
        size = self.head_dim // 6 * 2
        axes = torch.meshgrid(
            torch.arange(grid[0]).float(), *((torch.arange(n) + 0.5) * factor - 0.5 for n in grid[1:]), indexing="ij"
        )
        angles = [rotary_angles(axis.flatten().to(x.device), size, self.rope_theta) for axis in axes]
        turned = [rotate(part, *angle) for part, angle in zip(x[..., : 3 * size].split(size, -1), angles, strict=True)]
        return torch.cat([*turned, x[..., 3 * size :]], dim=-1)


class Pooled(nn.Module):
    """A branch on a copy of the video that is smaller by ``factor`` along height and width."""

    def __init__(self, dim: int, factor: int, rank: int):
        super().__init__()
        if factor < 1:
            raise ArgumentError(f"factor: expected at least 1, got {factor}")
        self.factor = factor
        self.down = nn.Conv2d(dim, dim, factor, factor, groups=dim, bias=False)
        nn.init.constant_(self.down.weight, factor**-2)
        self.lora = LoRA(dim, 3 * dim, rank)
        self.up = nn.Conv3d(dim, dim, 3, padding=1)
        nn.init.dirac_(self.up.weight)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, attend: Any) -> Tensor:
        frames = z.shape[1]
        if z.shape[2] % self.factor or z.shape[3] % self.factor:
            raise ShapeError(f"z: height and width must be divisible by {self.factor}, got {tuple(z.shape)}")
        small = self.down(rearrange(z, "b t h w c -> (b t) c h w"))
        small = attend(rearrange(small, "(b t) c h w -> b t h w c", t=frames), self.lora)
        large = F.interpolate(rearrange(small, "b t h w c -> (b t) c h w"), size=z.shape[2:4], mode="bilinear")
        return rearrange(self.up(rearrange(large, "(b t) c h w -> b c t h w", t=frames)), "b c t h w -> b t h w c")


def window_mask(grid: Grid, windows: int, odd: bool, layout: str = "shift") -> Mask:
    """Tokens of one window see each other, in all frames.

    Args:
        grid: (T, H, W). windows: K per axis; odd layers have K + 1, see `UltraGenAttention`.

    Raises:
        ShapeError: K (or 2K, where windows are shifted by half) does not divide height and width.
    """
    t, *space = grid
    if odd and layout == "even":
        axes = [masks.documents([len(part) for part in torch.arange(n).tensor_split(windows + 1)]) for n in space]
        return masks.product(grid, [masks.full(), *axes])
    parts = 2 * windows if odd else windows
    if any(n % parts for n in space):
        raise ShapeError(f"grid: {parts} must divide height and width for {windows} windows per axis, got {grid}")
    sizes = [n // windows for n in space]
    if odd:
        return masks.shifted_windows(grid, (t, *sizes), (0, *(size // 2 for size in sizes)))
    return masks.windows(grid, (t, *sizes))


def time_code(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of a time (B,) at ``dim / 2`` frequencies: (B, dim)."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
