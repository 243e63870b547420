"""Single-head attention over a part of the channels (SHViT)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly
from regard.layers.conv_bn import ConvBN
from regard.mechanisms.grid.base import GridMechanism


class SingleHeadAttention(GridMechanism):
    """One head mixes the first channels of an image; the others pass by (SHViT, arXiv:2401.16456).

        x1, x2 = x[..., :p], x[..., p:]        q, k, v = BN(GN(x1) Wqkv)
        y = BN(ReLU([softmax(q kᵀ / √d) v, x2]) Wo)

    x (B, H, W, C) to the same, at any size; exact, noncausal. GN normalises all of an image's p channels together.
    The other channels see no neighbours and meet the attention's output in Wo only.

    Args:
        dim: C.
        partial_dim: p, channels of x1 and of the values.
        qk_dim: d, channels of queries and keys.
    """

    cost: ClassVar[str] = "O(N² (d + p) + N C²), N = H W"
    example: ClassVar[dict[str, Any]] = {"partial_dim": 16}

    def __init__(self, dim: int, partial_dim: int, qk_dim: int = 16):
        super().__init__()
        if not 1 <= partial_dim <= dim:
            raise ArgumentError(f"partial_dim: expected 1 to {dim} (dim), got {partial_dim}")
        if qk_dim < 1:
            raise ArgumentError(f"qk_dim: expected at least 1, got {qk_dim}")
        self.dim, self.partial_dim, self.qk_dim = dim, partial_dim, qk_dim
        self.pre_norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvBN(partial_dim, 2 * qk_dim + partial_dim)
        self.act = nn.ReLU()
        self.proj = ConvBN(dim, dim, weight_init=0.0)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, H, W, {self.dim}), got {tuple(x.shape)}")
        mixed, passed = x.split([self.partial_dim, self.dim - self.partial_dim], -1)
        qkv = self.qkv(self.pre_norm(mixed.movedim(-1, 1)).movedim(1, -1))
        q, k, v = qkv.flatten(1, 2).unsqueeze(1).split([self.qk_dim, self.qk_dim, self.partial_dim], -1)
        mixed = attention(q, k, v).view_as(mixed)
        return self.proj(self.act(torch.cat([mixed, passed], -1)))

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, dim: int, qk_dim: int, pdim: int, **_: Any
    ) -> "SingleHeadAttention":
        """The published ``SHSA``."""
        module = cls(dim, pdim, qk_dim)
        load_strictly(module, state_dict, {"qkv.c": "qkv.conv", "proj.1.c": "proj.conv", "proj.1": "proj"})
        return module
