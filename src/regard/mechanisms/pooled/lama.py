"""LAMA: pooling a sequence with heads taken from a low-rank factorisation of one bilinear affinity."""

import math
from collections.abc import Callable
from typing import Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly


class LowRankPooling(nn.Module):
    """Low-rank factorised multi-head attention (LAMA, arXiv:1912.00835) of a global context over tokens.

        cᵀ W h_t = Σ_i (p_i · c) (q_i · h_t)        one head i per term, W = P Qᵀ of rank m

        a_t = tanh(Pᵀ c ∘ Qᵀ h_t) / |·|₂            over the m heads of a token
        α = softmax_t(a),  S = α H                  per head

    x (B, N, d) to (B, m, d), or projected to (B, output_dim). Exact, linear in N: cost O(B N d m), 2 d m parameters.
    Scores are at most 1 in size, so no token weighs more than e² times another: heads are soft by design. It pools and
    does not mix tokens, so it is no `Mechanism`.

    Args:
        dim: d.
        num_heads: m.
        context: c is the mean of the tokens ("mean", which the paper calls LAMA + ctx) or a learned vector ("learned").
        activation: "tanh", or None for none.
        output_dim: project the concatenated heads to this width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        context: Literal["mean", "learned"] = "mean",
        activation: Literal["tanh"] | None = "tanh",
        output_dim: int | None = None,
    ):
        super().__init__()
        sizes = {"dim": dim, "num_heads": num_heads, "output_dim": 1 if output_dim is None else output_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {size}")
        if context not in ("mean", "learned"):
            raise ArgumentError(f"context: expected mean or learned, got {context!r}")
        if activation not in ("tanh", None):
            raise ArgumentError(f"activation: expected tanh or None, got {activation!r}")
        self.dim, self.num_heads, self.activation = dim, num_heads, activation
        self.p, self.q = (nn.Parameter(torch.empty(dim, num_heads)) for _ in range(2))
        for matrix in (self.p, self.q):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.context = nn.Parameter(torch.randn(dim) * dim**-0.5) if context == "learned" else None
        self.projection = None if output_dim is None else nn.Linear(num_heads * dim, output_dim)

    @overload
    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_attention: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_attention: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pool a batch of sequences.

        Args:
            x: (B, N, d).
            valid: (B, N) bool, False marks padding. A sequence of nothing else gives zeros (before the projection).
            return_attention: also return α (B, m, N).
        """
        attention = self.attention(x, valid)
        pooled = attention @ x
        if self.projection is not None:
            pooled = self.projection(pooled.flatten(1))
        return (pooled, attention) if return_attention else pooled

    def attention(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """α (B, m, N): every head's weights over the tokens."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x: expected (B, N, {self.dim}), got {tuple(x.shape)}")
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:2]):
            raise ShapeError(f"valid: expected bool {tuple(x.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}")
        scores = (self._context(x, valid) @ self.p).unsqueeze(-1) * (x @ self.q).mT
        if self.activation is not None:
            scores = scores.tanh()
        scores = F.normalize(scores, dim=1)
        if valid is None:
            return scores.softmax(-1)
        seen = valid.unsqueeze(1)
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen

    def _context(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.context is not None:
            return self.context.expand(x.shape[0], -1)
        if valid is None:
            return x.mean(1)
        return x.masked_fill(~valid.unsqueeze(-1), 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        num_heads: int,
        input_dim: int,
        activation: str | Callable[[Tensor], Tensor] | None = "tanh",
        output_dim: int | None = None,
        variant: str = "LAMAEncoder",
    ) -> Self:
        """Weights of JohnGiorgi's port on GitHub.

        Args:
            variant: "LAMAEncoder", or "LAMA" for its attention alone.
        """
        if variant not in ("LAMAEncoder", "LAMA"):
            raise ArgumentError(f"variant: expected LAMAEncoder or LAMA, got {variant!r}")
        name = "tanh" if activation in (torch.tanh, F.tanh) else activation
        module = cls(input_dim, num_heads, activation=name, output_dim=output_dim or None)  # type: ignore[arg-type]
        prefix = "_attention." if variant == "LAMAEncoder" else ""
        load_strictly(module, state_dict, {f"{prefix}_p": "p", f"{prefix}_q": "q", "projection_layer": "projection"})
        return module
