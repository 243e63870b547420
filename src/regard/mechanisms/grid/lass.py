"""LASS (SegMAN): neighbourhoods first, then the whole image by a scan, or by a second attention."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, per_head
from regard.layers.grid import BatchNorm2d, DepthwiseConv2d
from regard.mechanisms.grid.base import GridMechanism
from regard.mechanisms.grid.neighborhood import neighborhood_attention
from regard.mechanisms.grid.selective import SelectiveScan2d, published_scan
from regard.positions import axial_angles, grid_coordinates, pairs_to_halves, rotate


class LASS(GridMechanism):
    """Local attention and state space (SegMAN, arXiv:2412.11890): x (B, H, W, C) to the same.

        z = NA(R q, R k, v)        the kernel_size × kernel_size keys around a query, shifted inside at the borders
        y = Wo (LN(scan(SiLU(BN(conv(z))))) + z + conv(v))
        y = Wo (softmax(R q (R k)ᵀ / √D + bias) z + conv(v))        global_mode

    R turns channels by the row and the column. `SelectiveScan2d` is linear in N. In global mode the bias has a number
    for every pair of positions of the grid it was made for; a grid of another number of positions gets the table
    bicubically interpolated, which is only roughly what was learned. All else is exact at any size. Noncausal.

    Args:
        dim: C.
        num_heads: heads of a multiple of 4 channels.
        kernel_size, dilation: of the neighbourhood, odd; kernel_size · dilation is the least side of a grid.
        global_mode: a second attention in place of the scan.
        image_size: height and width of the grid for which the table is made, with global_mode and rel_pos_bias.
        rel_pos_bias: learned biases of relative positions in the neighbourhood, and of pairs of positions.
    """

    cost: ClassVar[str] = "O(N C² + N kernel_size² C), in global mode and O(N² C)"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        global_mode: bool = False,
        image_size: int | Sequence[int] | None = None,
        rel_pos_bias: bool = True,
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        if self.head_dim % 4:
            raise ArgumentError(f"num_heads: heads of {self.head_dim} channels, expected a multiple of 4")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ArgumentError(f"kernel_size: expected an odd number, got {kernel_size}")
        if dilation < 1:
            raise ArgumentError(f"dilation: expected at least 1, got {dilation}")
        self.dim, self.num_heads, self.global_mode = dim, num_heads, global_mode
        self.kernel_size, self.dilation = kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = DepthwiseConv2d(dim, 5)
        self.proj = nn.Linear(dim, dim)
        if not global_mode:
            self.dwconv, self.bn = DepthwiseConv2d(dim), BatchNorm2d(dim)
            self.ssm = SelectiveScan2d(dim)
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, side, side)) if rel_pos_bias else None
        self.pair_bias: nn.Parameter | None = None
        if global_mode and rel_pos_bias:
            count = _positions(image_size)
            self.pair_bias = nn.Parameter(torch.zeros(num_heads, count, count))
        for layer in (self.qkv, self.proj):
            nn.init.xavier_normal_(layer.weight, gain=2**-2.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        grid = (x.shape[1], x.shape[2])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)  # (B, H, W, heads, D)
        cos, sin = (t.view(*grid, 1, -1) for t in self._angles(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen = neighborhood_attention(q, k, v, self.kernel_size, self.dilation, rpb=self.rpb)
        if self.global_mode:
            flat = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, seen))
            out = attention(*flat, bias=self.bias_of_pairs(*grid)).transpose(1, 2).reshape(x.shape)
        else:
            seen = seen.flatten(-2)
            out = self.norm(self.ssm(F.silu(self.bn(self.dwconv(seen))))) + seen
        return self.proj(out + self.lepe(v.flatten(-2)))

    def bias_of_pairs(self, height: int, width: int) -> Tensor | None:
        """(heads, N, N) for a grid of this size."""
        count = height * width
        if self.pair_bias is None or self.pair_bias.shape[-1] == count:
            return self.pair_bias
        return F.interpolate(self.pair_bias[None], (count, count), mode="bicubic", align_corners=False)[0]

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        least = self.kernel_size * self.dilation
        if min(x.shape[1:3]) < least:
            raise ShapeError(f"x: expected sides of at least kernel_size · dilation = {least}, got {tuple(x.shape)}")

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.linspace(0, 1, self.head_dim // 4, device=x.device)
        return axial_angles(grid_coordinates(x.shape[1], x.shape[2], device=x.device), 10_000.0**-steps)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        embed_dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        window_dilation: int | Sequence[int] = 1,
        global_mode: bool = False,
        image_size: int | Sequence[int] | None = None,
        use_rpb: bool = False,
        fused_na: bool = False,
        ssm_ratio: float = 1,
        **_: Any,
    ) -> "LASS":
        """Weights of the published ``Attention``.

        Raises:
            Unsupported: ``fused_na``, which leaves the scale and the biases out, oblong windows, or an expanded scan;
                no published model has them.
        """
        if fused_na or ssm_ratio != 1:
            raise Unsupported(f"fused_na, ssm_ratio: only False and 1, got {fused_na} and {ssm_ratio}")
        kernel, dilation = one_side("window_size", window_size), one_side("window_dilation", window_dilation)
        module = cls(embed_dim, num_heads, kernel, dilation, global_mode, image_size, use_rpb)
        load_strictly(module, with_batch_counts(published_lass(dict(state_dict), num_heads)), PUBLISHED)
        return module


PUBLISHED = {"dwconv.0": "dwconv", "dwconv.1": "bn", "rpb.0": "rpb", "rpb.1": "pair_bias"}
"""Published names to ours."""


def published_lass(state: dict[str, Tensor], num_heads: int, prefix: str = "") -> dict[str, Tensor]:
    """Published weights as ours: rotated are halves in place of neighbouring channels, and scans have directions."""
    for kind in ("weight", "bias"):
        if (fused := state.get(f"{prefix}qkv.{kind}")) is not None:
            q, k, v = fused.chunk(3)
            state[f"{prefix}qkv.{kind}"] = torch.cat([*(pairs_to_halves(t, num_heads, axes=2) for t in (q, k)), v])
    return published_scan(state, f"{prefix}ssm.")


def with_batch_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the counts of batches that norms keep for training, 0 where they were left out."""
    means = [name.removesuffix("running_mean") for name in state if name.endswith(".running_mean")]
    return {
        f"{name}num_batches_tracked": state[f"{name}running_mean"].new_zeros((), dtype=torch.long) for name in means
    } | state


def one_side(name: str, size: int | Sequence[int]) -> int:
    """The side of a square given as one number or two."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise Unsupported(f"{name}: only squares, as in the published models, got {size}")
    return sides.pop()


def _positions(image_size: int | Sequence[int] | None) -> int:
    sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size or ())
    if len(sides) != 2 or min(sides) < 1:
        raise ArgumentError(f"image_size: expected the height and width of the grid in global mode, got {image_size}")
    return sides[0] * sides[1]
