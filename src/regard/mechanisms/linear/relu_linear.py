"""L2ViT's linear global attention: ReLU features, a learned scale, and a denominator that stays large."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.linear import normalized_linear_attention
from regard.mechanisms.base import Mechanism, Pattern


class ReLULinearAttention(Mechanism):
    """Linear attention with ReLU features (L2ViT, arXiv:2501.16182).

        q, k = relu(x Wq), relu(x Wk)        o_i = τ_h Σ_j (q_i·k_j) v_j / max(Σ_j q_i·k_j, 100)        y = o Wo

    x (B, N, C) to (B, N, C), noncausal, in time linear in N. Where the sum stays below ``min_denominator`` (few tokens,
    small activations) this is attention without normaliser, otherwise rows sum to τ. The clamp at 100 is the published
    code's; the paper's equation has another.

    Args:
        dim: C.
        num_heads: H.
        bias: of the query, key and value projections.
        min_denominator: the sum is clamped from below.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})
    cost: ClassVar[str] = "O(N C D)"
    causal = False

    def __init__(self, dim: int, num_heads: int = 8, bias: bool = True, min_denominator: float = 100.0):
        super().__init__()
        head_dim, _ = per_head(dim, num_heads)
        if min_denominator <= 0:
            raise ArgumentError(f"min_denominator: expected a positive number, got {min_denominator}")
        self.dim, self.num_heads, self.min_denominator = dim, num_heads, min_denominator
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), head_dim**-0.5))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        out, _ = normalized_linear_attention(
            F.relu(q), F.relu(k), v, causal=False, valid=valid, min_denominator=self.min_denominator
        )
        return self.proj(merge_heads(out * self.temperature))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "ReLULinearAttention":
        """The published ``LinearAttention``; its dropout is left out."""
        heads, bias = official_kwargs.get("num_heads", 8), official_kwargs.get("qkv_bias", False)
        module = cls(official_kwargs["dim"], heads, bias)
        load_strictly(module, state_dict)
        return module
