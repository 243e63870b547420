"""Strip self-attention (S2AFormer): keys are few and one number per head, and so are queries."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import merge_heads, per_head, split_heads
from regard.layers.grid import Conv2d
from regard.mechanisms.grid.base import GridMechanism

Reduction = Literal["conv", "depthwise"]


class StripAttention(GridMechanism):
    """Softmax attention with narrow queries and keys to a coarse copy of the image (S2AFormer, arXiv:2505.22195).

        z = LN(conv_r×r,stride r(c))        q = x Wq,  k = z Wk  (d numbers per head),  v = z Wv  (D numbers per head)
        y = Wo [softmax(q_h k_hᵀ / √d) v_h]_h

    x (B, H, W, C) to the same, with ``context`` c (B, H', W', C) cross-attention; noncausal. Exact in itself; with
    d = 1 logits have rank one, so a token weighs keys by their order alone: every token that asks for much (q > 0)
    looks most at the largest key. With d = D it is the spatial-reduction attention of PVT (arXiv:2102.12122).

    The authors' code is not published: d, the reduction and the temperature are arguments so that it can be matched.

    Args:
        dim: C.
        num_heads: n.
        sr_ratio: r; 1 leaves z = c.
        qk_dim: d.
        qkv_bias: of Wq, Wk and Wv.
        reduction: "conv", or "depthwise" with a 1×1 convolution after it.
        temperature: learn a factor of the logits per head.
        pad: fill up grids that r does not divide with zeros at the bottom and right; else they are refused.
    """

    cost: ClassVar[str] = "O(N C² + N² C / r²), N = H W"
    example: ClassVar[dict[str, Any]] = {"sr_ratio": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        qk_dim: int = 1,
        qkv_bias: bool = True,
        reduction: Reduction = "conv",
        temperature: bool = False,
        pad: bool = False,
    ):
        super().__init__()
        per_head(dim, num_heads)
        for name, value in (("sr_ratio", sr_ratio), ("qk_dim", qk_dim)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        if reduction not in ("conv", "depthwise"):
            raise ArgumentError(f"reduction: expected conv or depthwise, got {reduction!r}")
        self.dim, self.num_heads, self.sr_ratio, self.pad = dim, num_heads, sr_ratio, pad
        self.q_proj = nn.Linear(dim, num_heads * qk_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, num_heads * qk_dim, bias=qkv_bias)
        self.v_proj, self.o_proj = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1)) if temperature else None
        self.reduce: nn.Module = nn.Identity()
        if sr_ratio > 1:
            groups, last = (1, nn.Identity()) if reduction == "conv" else (dim, nn.Linear(dim, dim))
            conv = Conv2d(dim, dim, sr_ratio, sr_ratio, padding=0, groups=groups)
            self.reduce = nn.Sequential(conv, last, nn.LayerNorm(dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        for name, given in (("x", x), ("context", context)):
            if given.dim() != 4 or given.shape[-1] != self.dim:
                raise ShapeError(f"{name}: expected (B, H, W, {self.dim}), got {tuple(given.shape)}")
        down, right = (-side % self.sr_ratio for side in context.shape[1:3])
        if down or right:
            if not self.pad:
                name, sides = "x" if context is x else "context", " x ".join(map(str, context.shape[1:3]))
                raise ShapeError(f"{name}: expected sides that {self.sr_ratio} (sr_ratio) divides, got {sides}")
            context = F.pad(context, (0, 0, 0, right, 0, down))
        z = self.reduce(context).flatten(1, 2)
        q, k, v = (
            split_heads(proj(tokens), self.num_heads)
            for proj, tokens in ((self.q_proj, x.flatten(1, 2)), (self.k_proj, z), (self.v_proj, z))
        )
        wide = torch.promote_types(v.dtype, torch.float32)  # logits of rank one grow large
        q = q if self.temperature is None else q * self.temperature
        out = attention(q.to(wide), k.to(wide), v.to(wide)).to(v.dtype)
        return self.o_proj(merge_heads(out)).view_as(x)
