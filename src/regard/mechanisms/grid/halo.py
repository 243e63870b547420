"""Halo attention: blocks of queries see their block and a halo around it."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention.grid import grid_attention
from regard.attention.grid_plan import Axis
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.mechanisms.grid.base import GridMechanism


class HaloAttention(GridMechanism):
    """Blocked local attention with haloing (HaloNet, arXiv:2103.12731), as in timm: x (B, H, W, C) to (B, H', W', C').

        y_q = Σ_k softmax_k(q·k / √d + q·(r_rows[k_row - q_row] + r_columns[k_col - q_col])) v_k

    The queries of a block of b×b pixels all see the window of (b + 2h)² pixels around it. Beyond the border the window
    holds zeros, which take part: their score is that of the position alone, their value is 0. With ``pad="mask"``
    they are left out. There is no output projection; H and W must be multiples of b.

    Exact, cost O(H W ((b + 2h)² C + C²)). The two position terms are written as channels more of q and k (q's part is
    ``q·r``, k's part says in which row and column k stands), so no matrix of queries times window is made for them.

    Args:
        dim, dim_out: C and C', C by default.
        stride: 2 halves H and W: every other row and column of queries is kept (keys are not thinned out); where
            block_size is odd, or with avg_down, the output is averaged instead.
        num_heads: heads, dividing dim_out.
        head_dim: d of queries and keys; by default dim_out · qk_ratio, rounded to a multiple of 8, over num_heads.
        block_size, halo_size: b and h.
        qk_ratio: see head_dim.
        qkv_bias: of the projections.
        avg_down: see stride.
        scale_pos_embed: divide the position terms by √d too.
        pad: "zeros" or "mask", see above.
    """

    cost: ClassVar[str] = "O(N C² + N (b + 2h)² C)"
    example: ClassVar[dict[str, Any]] = {"block_size": 7, "halo_size": 2}

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        pad: str = "zeros",
    ):
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim_out % num_heads:
            raise ArgumentError(f"num_heads: {num_heads} heads do not divide dim_out {dim_out}")
        if stride not in (1, 2):
            raise ArgumentError(f"stride: expected 1 or 2, got {stride}")
        if block_size < 1 or halo_size < 0:
            raise ArgumentError(f"block_size, halo_size: expected at least 1 and 0, got {block_size} and {halo_size}")
        if pad not in ("zeros", "mask"):
            raise ArgumentError(f"pad: expected 'zeros' or 'mask', got {pad!r}")
        self.dim, self.dim_out, self.num_heads, self.stride = dim, dim_out, num_heads, stride
        self.head_dim = head_dim if head_dim is not None else make_divisible(dim_out * qk_ratio) // num_heads
        self.block_size, self.halo_size, self.pad = block_size, halo_size, pad
        self.query_stride = 1 if avg_down or block_size % stride else stride
        self.scale_pos_embed = scale_pos_embed
        inner = num_heads * self.head_dim
        self.q = nn.Linear(dim, inner, bias=qkv_bias)
        self.kv = nn.Linear(dim, inner + dim_out, bias=qkv_bias)
        rows = 2 * (block_size + 2 * halo_size) - 1
        self.height_rel = nn.Parameter(torch.empty(rows, self.head_dim))
        self.width_rel = nn.Parameter(torch.empty(rows, self.head_dim))
        for weight, std in (
            (self.q.weight, dim**-0.5),
            (self.kv.weight, dim**-0.5),
            (self.height_rel, self.head_dim**-0.5),
            (self.width_rel, self.head_dim**-0.5),
        ):
            nn.init.trunc_normal_(weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        b, h = self.block_size, self.halo_size
        if x.dim() != 4 or x.shape[-1] != self.dim or x.shape[1] % b or x.shape[2] % b or 0 in x.shape:
            raise ShapeError(
                f"x: expected (B, H, W, {self.dim}) with H and W multiples of block_size {b}, got {tuple(x.shape)}"
            )
        window, step = b + 2 * h, self.query_stride
        q = self.q(x[:, ::step, ::step]).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self.kv(x).unflatten(-1, (self.num_heads, -1))
        border = "cut" if self.pad == "mask" else "pad"
        axes = [Axis(n // step, window, stride=b // step, border=border, key_stride=b) for n in x.shape[1:3]]
        if self.pad == "zeros":
            kv = F.pad(kv, (0, 0, 0, 0, h, h, h, h))
        k, v = kv.split((self.head_dim, kv.shape[-1] - self.head_dim), -1)
        rows = (q @ self.height_rel.mT).take_along_dim(self._offsets(q.shape[1], x)[None, :, None, None], -1)
        columns = (q @ self.width_rel.mT).take_along_dim(self._offsets(q.shape[2], x)[None, None, :, None], -1)
        scale = self.head_dim**-0.5
        q = torch.cat([q * scale, *(t * scale if self.scale_pos_embed else t for t in (rows, columns))], -1)
        row, column = self._places(k.shape[1], x)[:, None, None], self._places(k.shape[2], x)[:, None]
        k = torch.cat([k, *(t.to(k.dtype).expand(*k.shape[:-1], -1) for t in (row, column))], -1)
        y = grid_attention(q, k, v, axes, scale=1.0, size=[b // step] * 2).out.flatten(-2)
        return F.avg_pool2d(y.movedim(-1, 1), 2).movedim(1, -1) if step < self.stride else y

    def _places(self, length: int, x: Tensor) -> Tensor:
        """One-hot rows (length, window) for keys: their place modulo the window, which differs for all of a window."""
        window, offset = self.block_size + 2 * self.halo_size, self.halo_size if self.pad == "mask" else 0
        places = (torch.arange(length, device=x.device) + offset) % window
        return F.one_hot(places, window)

    def _offsets(self, length: int, x: Tensor) -> Tensor:
        """Rows of the tables (length, window) for the keys at each place modulo the window, seen from each query."""
        window, block = self.block_size + 2 * self.halo_size, self.block_size // self.query_stride
        query, place = torch.arange(length, device=x.device)[:, None], torch.arange(window, device=x.device)
        inside = (place - query // block * self.block_size) % window  # place in the query's own window
        return inside - query % block + window - 1

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        dim: int,
        dim_out: int | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        feat_size: Any = None,
    ) -> "HaloAttention":
        """Weights and arguments of timm's ``HaloAttn``; the paper's code was not published."""
        module = cls(
            dim,
            dim_out,
            stride,
            num_heads,
            dim_head,
            block_size,
            halo_size,
            qk_ratio,
            qkv_bias,
            avg_down,
            scale_pos_embed,
        )
        load_strictly(module, state_dict, {"pos_embed.": ""})
        return module


def make_divisible(width: float, divisor: int = 8) -> int:
    """``width`` rounded to a multiple of ``divisor``, upwards where rounding would take away more than a tenth."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded
