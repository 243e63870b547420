"""Factorization self-attention (FaViT): channels in groups, each with few keys that summarise the image its own way."""

from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, split_heads
from regard.layers.grid import Conv2d, DepthwiseConv2d
from regard.mechanisms.grid.base import GridMechanism

POOLS = ("channels", "windows")

#: published names of the parts of `FactorizationAttention`
PUBLISHED = {
    "kv_g": "kv",
    "local_conv_g": "local",
    "kv_l.depth_conv": "source.0",
    "kv_l.point_conv": "source.1",
    **{f"fcs.{i}": f"summaries.{i}.fc" for i in range(2)},
    **{f"single_heads.{i}": f"summaries.{i}.kv" for i in range(2)},
    **{f"local_convs.{i}": f"summaries.{i}.local" for i in range(2)},
}


class WindowSummary(nn.Module):
    """L × L keys and values for a whole image (B, H, W, c·heads): token t says what stands at place t of the windows.

    Windows of every δ-th token lie side by side, the image filled up by reflection. Their tokens at the same place are
    averaged ("windows"), or as published ("channels"): the M windows' c channels in a row, (window, channel), are
    averaged M at a time, which mixes neighbouring channels of one window and not the windows. Then two linear maps,
    shared by the heads, and a convolution of the values over the L × L places.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, dilation: int, bias: bool, window_pool: str):
        super().__init__()
        self.num_heads, self.window_size, self.dilation, self.pool = num_heads, window_size, dilation, window_pool
        self.span = dilation * (window_size - 1) + 1
        self.fc = nn.Linear(dim // num_heads, dim // num_heads, bias=bias)
        self.kv = nn.Linear(dim // num_heads, 2 * dim // num_heads, bias=bias)
        self.local = DepthwiseConv2d(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L², c)."""
        down, right = self.fill(x.shape[1], x.shape[2])
        if down or right:
            x = F.pad(x.movedim(-1, 1), (0, right, 0, down), mode="reflect").movedim(1, -1)
        cut = rearrange(x, "b (m t) (w u) c -> b m t w u c", t=self.span, u=self.span)
        cut = cut[:, :, :: self.dilation, :, :: self.dilation]
        cells = rearrange(cut, "b m y w x (h c) -> b h (y x) (m w) c", h=self.num_heads)
        if self.pool == "windows":
            summary = cells.mean(-2)
        else:
            summary = cells.flatten(-2).unflatten(-1, (cells.shape[-1], -1)).mean(-1)
        k, v = self.kv(self.fc(summary)).chunk(2, -1)
        side = self.window_size
        places = rearrange(v, "b h (y x) c -> b y x (h c)", y=side)
        return k, v + split_heads(self.local(places).flatten(1, 2), self.num_heads)

    def fill(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that are missing; refuses more than reflection can give."""
        missing = -height % self.span, -width % self.span
        if missing[0] >= height or missing[1] >= width:
            raise ShapeError(
                f"x: a grid of {height} x {width} cannot be filled up by reflection to windows of {self.span} tokens"
            )
        return missing


class FactorizationAttention(GridMechanism):
    """Attention to a constant number of keys of several grains (FaViT, arXiv:2312.08614).

        channels: C_g | C_1 | C_2 in shares 2 : 7 : 7 of C / 16, or C_g | C_1 in shares 1 : 7 of C / 8 if r = 1
        group g:  one head; k, v = LN(conv_r×r(x_g)) W on H/r × W/r tokens
        group i:  k, v = `WindowSummary`(conv(x_rest)_i), L² tokens; windows dense for i = 1, every r-th token for i = 2
        o = softmax(q kᵀ / √D) (v + dwconv(v)) per group        y = Wo [o_g, o_1, o_2]

    x (B, H, W, C) to the same. Every token sees summaries of the whole image in each group. Exact in ``"channels"``
    with respect to the published code, whose pooling is not the mean over windows that the paper describes:
    ``window_pool="windows"`` is that. With one window both are the same. Noncausal.

    Args:
        dim: C, a multiple of 16 (8 if r = 1).
        num_heads: heads of the groups 1 and 2.
        sr_ratio: r.
        window_size: L.
        qkv_bias: of the projections except the last.
        window_pool: "channels" or "windows".

    Raises:
        ShapeError: the image is smaller than r, or too small for windows to be filled up by reflection.
    """

    cost: ClassVar[str] = "O(N (C_g N / r² + (C_1 + C_2) L² + C²))"
    example: ClassVar[dict[str, Any]] = {"sr_ratio": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        window_size: int = 7,
        qkv_bias: bool = True,
        window_pool: str = "channels",
    ):
        super().__init__()
        if window_pool not in POOLS:
            raise ArgumentError(f"window_pool: expected 'channels' or 'windows', got {window_pool!r}")
        for name, value in (("sr_ratio", sr_ratio), ("window_size", window_size), ("num_heads", num_heads)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        shares = (1, 7) if sr_ratio == 1 else (2, 7, 7)
        if dim % sum(shares):
            raise ArgumentError(f"dim: expected a multiple of {sum(shares)}, got {dim}")
        whole, *groups = (dim // sum(shares) * share for share in shares)
        if groups[0] % num_heads:
            raise ArgumentError(f"num_heads: {num_heads} heads do not divide the {groups[0]} channels of a group")
        self.dim, self.num_heads, self.sr_ratio, self.widths = dim, num_heads, sr_ratio, (whole, *groups)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.sr = Conv2d(whole, whole, sr_ratio, sr_ratio, padding=0)
        self.norm = nn.LayerNorm(whole)
        self.kv = nn.Linear(whole, 2 * whole, bias=qkv_bias)
        self.local = DepthwiseConv2d(whole)
        self.source = nn.Sequential(DepthwiseConv2d(dim - whole), nn.Linear(dim - whole, dim - whole))
        self.summaries = nn.ModuleList(
            WindowSummary(width, num_heads, window_size, dilation, qkv_bias, window_pool)
            for width, dilation in zip(groups, (1, sr_ratio), strict=False)
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        self.check_size(*x.shape[1:3])
        whole, rest = self.widths[0], self.dim - self.widths[0]
        x_whole, x_rest = x.split([whole, rest], -1)
        q_whole, q_rest = self.q(x).flatten(1, 2).split([whole, rest], -1)
        reduced = self.sr(x_whole)
        k, v = self.kv(self.norm(reduced)).chunk(2, -1)
        k, v = (t.flatten(1, 2)[:, None] for t in (k, v + self.local(v)))
        outs = [attention(q_whole[:, None], k, v).squeeze(1)]
        queries = split_heads(q_rest, self.num_heads).split([w // self.num_heads for w in self.widths[1:]], -1)
        sources = self.source(x_rest).split(self.widths[1:], -1)
        for query, source, summary in zip(queries, sources, self.summaries, strict=True):
            outs.append(merge_heads(attention(query, *summary(source))))
        return self.proj(torch.cat(outs, -1)).view_as(x)

    def check_size(self, height: int, width: int) -> None:
        """Refuse grids that are too small."""
        if min(height, width) < self.sr_ratio:
            raise ShapeError(f"x: expected at least {self.sr_ratio} rows and columns, got {height} x {width}")
        for summary in self.summaries:
            assert isinstance(summary, WindowSummary)
            summary.fill(height, width)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        sr_ratio: int = 1,
        windowsize: int = 7,
        **_: Any,
    ) -> "FactorizationAttention":
        """The published ``Attention``; its dropout is left out, and its ``qk_scale`` has no effect there either."""
        module = cls(dim, num_heads, sr_ratio, windowsize, qkv_bias)
        load_strictly(module, state_dict, PUBLISHED)
        return module
