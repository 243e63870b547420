"""Polyline path masked attention (PPMA): softmax attention that fades along two L-shaped paths between pixels."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.layers.grid import DepthwiseConv2d
from regard.mechanisms.grid.base import GridMechanism
from regard.positions import axial_angles, pairs_to_halves, rotate

FORMS = ("whole", "chunk")


class PolylinePathMask(nn.Module):
    """Log decays between pixels, summed along paths; x (B, H, W, heads · head_dim).

        (a, b) = W x_h        α = -exp(A_log) softplus(a + dt_bias)        β = -exp(A_log) softplus(b + dt_bias)
        P_w[r; i, j] = Σ_{min(i,j) < t ≤ max(i,j)} α[r, t]        P_h[c; i, j] = Σ_{min(i,j) < t ≤ max(i,j)} β[t, c]

    All entries are at most 0, and 0 on the diagonals. `dense` joins them to whole paths. Sums are taken in float32 or
    wider.

    Args:
        head_dim: channels of a head.
        num_heads: heads; they share W, and have an A_log and a dt_bias each.
    """

    def __init__(self, head_dim: int, num_heads: int):
        super().__init__()
        self.head_dim, self.num_heads = head_dim, num_heads
        self.dt_linear = nn.Linear(head_dim, 2, bias=False)
        step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step.expm1().log())  # softplus: step
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1.0, 1.1).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """P_w (B, H, heads, W, W) of every row, and P_h (B, W, heads, H, H) of every column."""
        along_rows, along_columns = self.decays(x)
        return _between(along_rows.transpose(1, 2)), _between(along_columns.permute(0, 3, 1, 2))

    def dense(self, x: Tensor) -> Tensor:
        """(B, heads, N, N) along the query's row, then the key's column; transposed, the other way.

        ``L[(r, i), (s, j)] = P_w[r; i, j] + P_h[j; r, s]``, N = H W, row by row.
        """
        rows, columns = self(x)
        first = rows.transpose(1, 2).unsqueeze(4)  # (B, heads, r, i, 1, j)
        then = columns.permute(0, 2, 3, 4, 1).unsqueeze(3)  # (B, heads, r, 1, s, j)
        return (first + then).flatten(4, 5).flatten(2, 3)

    def decays(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """α and β, (B, heads, H, W)."""
        if x.dim() != 4 or x.shape[-1] != self.num_heads * self.head_dim:
            raise ShapeError(f"x: expected (B, H, W, {self.num_heads * self.head_dim}), got {tuple(x.shape)}")
        raw = self.dt_linear(x.unflatten(-1, (self.num_heads, self.head_dim)))  # (B, H, W, heads, 2)
        wide = torch.promote_types(x.dtype, torch.float32)
        steps = F.softplus(raw.to(wide) + self.dt_bias[:, None])
        along_rows, along_columns = (-self.A_log.to(wide).exp()[:, None] * steps).movedim(3, 1).unbind(-1)
        return along_rows, along_columns


class PolylinePathAttention(GridMechanism):
    """Softmax attention under a polyline path mask (PPMA, arXiv:2506.15940): x (B, H, W, C) to the same, at any size.

        whole:  y = Wo (½ softmax(S + L) v + ½ softmax(S + Lᵀ) v + conv(v))        S = R(i)q_i · R(j)k_j / √D
        chunk:  y = Wo (½ A_h A_w v + ½ A_w A_h v + conv(v))        A_w = softmax(S + P_w) inside rows, A_h in columns

    The masks are those of `PolylinePathMask`, and follow the image. Pixels are rotated by their place in the row by row
    order. Both forms are exact; the second is another, cheaper mechanism, which sees the same paths one line after the
    other. "whole" makes the N×N mask, because a decay between any two pixels is a number of its own. Noncausal.

    Args:
        dim: C.
        num_heads: heads of an even number of channels.
        form: "whole" or "chunk".
    """

    cost: ClassVar[str] = "whole: O(N C² + N² C); chunk: O(N C² + N (H + W) C); N = H W"

    def __init__(self, dim: int, num_heads: int, form: str = "whole"):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        if self.head_dim % 2:
            raise ArgumentError(f"num_heads: heads of {self.head_dim} channels, expected an even number")
        if form not in FORMS:
            raise ArgumentError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
        self.dim, self.num_heads, self.form = dim, num_heads, form
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.lepe = DepthwiseConv2d(dim, 5)
        self.path_embed = PolylinePathMask(self.head_dim, num_heads)
        self.o_proj = nn.Linear(dim, dim)
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_normal_(proj.weight, gain=2**-2.5)
        nn.init.xavier_normal_(self.o_proj.weight)
        nn.init.zeros_(self.o_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim or 0 in x.shape:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        cos, sin = self._angles(x)
        values = self.v_proj(x)
        q, k, v = (split_heads(t.flatten(1, 2), self.num_heads) for t in (self.q_proj(x), self.k_proj(x), values))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self._whole(x, q, k, v) if self.form == "whole" else self._chunk(x, q, k, v)
        return self.o_proj(out + self.lepe(values))

    def _whole(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.path_embed.dense(x)
        y = attention(q, k, v, bias=mask) + attention(q, k, v, bias=mask.mT)
        return merge_heads(y / 2).view_as(x)

    def _chunk(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        masks = [mask.flatten(0, 1) for mask in self.path_embed(x)]

        def lines(t: Tensor, axis: int) -> Tensor:
            """(B, heads, N, D) to the rows (B H, heads, W, D) or columns (B W, heads, H, D)."""
            return t.unflatten(2, (height, width)).movedim(2 + axis, 1).flatten(0, 1)

        def mixed(t: Tensor, axis: int) -> Tensor:
            y = attention(lines(q, axis), lines(k, axis), lines(t, axis), bias=masks[axis])
            return y.unflatten(0, (x.shape[0], -1)).movedim(1, 2 + axis).flatten(2, 3)

        return merge_heads((mixed(mixed(v, 0), 1) + mixed(mixed(v, 1), 0)) / 2).view_as(x)

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.linspace(0, 1, self.head_dim // 2, device=x.device)
        places = torch.arange(x.shape[1] * x.shape[2], device=x.device)
        return axial_angles(places[:, None], 10_000.0**-steps)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        embed_dim: int,
        num_heads: int,
        form: str = "whole",
        value_factor: int = 1,
    ) -> "PolylinePathAttention":
        """Weights of the published ``MambaAttentionAllDouble``, or with ``form="chunk"`` ``MambaAttentionChunkDouble``.

        Raises:
            Unsupported: wider values, with which the published classes do not run.
        """
        if value_factor != 1:
            raise Unsupported(f"value_factor: only 1, as in the published models, got {value_factor}")
        module = cls(embed_dim, num_heads, form)
        load_strictly(module, halved(dict(state_dict), num_heads), PUBLISHED)
        return module


PUBLISHED = {"lepe.conv": "lepe", "out_proj": "o_proj"}
"""Published names to ours."""


def halved(state: dict[str, Tensor], num_heads: int, prefix: str = "") -> dict[str, Any]:
    """Published code rotates neighbouring channels, ours halves; q and k are permuted alike, so nothing changes."""
    for name in (f"{prefix}{proj}.{kind}" for proj in ("q_proj", "k_proj") for kind in ("weight", "bias")):
        if name in state:
            state[name] = pairs_to_halves(state[name], num_heads)
    return state


def _between(decays: Tensor) -> Tensor:
    """Log decays (..., n) to their sums over the steps between two places, (..., n, n)."""
    total = decays.cumsum(-1)
    place = torch.arange(decays.shape[-1], device=decays.device)
    sign = (place[:, None] - place).sign().to(total.dtype)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)) * sign
