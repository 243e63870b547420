"""The attention of MAELRE: linear in the tokens while there are many, softmax once there are few."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError
from regard.layers import merge_heads, per_head, split_heads
from regard.mechanisms.base import Mechanism, Pattern, visible

APPROXIMATIONS = ("linear", "xca")


class AdaptiveAttention(Mechanism):
    """Softmax attention, or above ``threshold`` tokens a form whose memory is D² per head (MAELRE, arXiv:2507.19409).

        N ≤ threshold:      y = softmax(q kᵀ / √D) v
        "linear" (N > …):   y = softmax_channels(q / √D) (softmax_tokens(k)ᵀ v)
        "xca"    (N > …):   y = v softmax(τ q̂ᵀ k̂)ᵀ,   q̂, k̂ of length one along the tokens, τ learned per head

    x (B, N, C) to (B, N, C); both forms use the same projections. The regime follows from the N of each call. The paper
    has no published code and was read in abstract only: it states an approximation of O(D²) memory while N > D and
    softmax afterwards; which approximation is our choice. Each form is computed exactly.

    Args:
        dim: C.
        num_heads: H, with head_dim D = C / H.
        approximation: "linear" (arXiv:1812.01243) or "xca" (arXiv:2106.09681).
        threshold: "dim" (C), "head_dim" (D), or a number of tokens.
        bias: of the projections.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})
    cost: ClassVar[str] = "O(N C D) above the threshold, O(N² C) up to it"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        approximation: str = "linear",
        threshold: str | int = "dim",
        bias: bool = True,
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        if approximation not in APPROXIMATIONS:
            raise ArgumentError(f"approximation: expected one of {', '.join(APPROXIMATIONS)}, got {approximation!r}")
        named = {"dim": dim, "head_dim": self.head_dim}
        if threshold not in named and not isinstance(threshold, int):
            raise ArgumentError(f"threshold: expected 'dim', 'head_dim' or a number of tokens, got {threshold!r}")
        self.threshold = threshold if isinstance(threshold, int) else named[threshold]
        self.dim, self.num_heads, self.approximation, self.causal = dim, num_heads, approximation, False
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        if approximation == "xca":
            self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if x.shape[1] <= self.threshold:
            out = attention(q, k, v, mask=visible(x.shape[1], False, valid))
        elif self.approximation == "linear":
            out = efficient_attention(q, k, v, valid)
        else:
            out = cross_covariance_attention(q, k, v, self.temperature, valid)
        return self.o_proj(merge_heads(out))


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """``softmax_channels(q / √D) (softmax_tokens(k)ᵀ v)``; q, k, v (B, H, N, D), valid (B, N) bool of the tokens."""
    if valid is not None:
        hidden = ~valid[:, None, :, None]
        # a sequence without any token has nothing to share out: its context is zero
        k = k.masked_fill(hidden, -torch.inf).masked_fill(~valid.any(1)[:, None, None, None], 0.0)
        v = v.masked_fill(hidden, 0.0)
    return (q * q.shape[-1] ** -0.5).softmax(-1) @ (k.softmax(2).mT @ v)


def cross_covariance_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Attention between channels, ``v softmax(τ q̂ᵀ k̂)ᵀ``; q, k, v (B, H, N, D), temperature (H, 1, 1)."""
    if valid is not None:
        q, k = (t.masked_fill(~valid[:, None, :, None], 0.0) for t in (q, k))
    q, k = (nn.functional.normalize(t, dim=2) for t in (q, k))
    return v @ (temperature * (q.mT @ k)).softmax(-1).mT
