"""Softmax attention, the mechanism all others are compared with."""

from typing import Any, ClassVar

from torch import Tensor, nn

from regard.attention import attention
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible
from regard.positions import rotate_tokens


class SoftmaxAttention(Mechanism):
    """Multi-head attention (arXiv:1706.03762), grouped (arXiv:2305.13245), with rotary positions (arXiv:2104.09864).

        y = Wo [softmax(q_h k_gᵀ / √D) v_g]_h        q = R(p) x Wq,  k = R(p) x Wk,  v = x Wv

    x (B, N, C) to (B, N, C). Exact. Cost O(N² C), or O(N w C) with a window of w tokens.

    Args:
        dim: C.
        num_heads: query heads H.
        num_kv_heads: key and value heads, dividing H; H by default.
        head_dim: D, C / H by default.
        bias: of the four projections.
        qk_norm: RMSNorm over each head of q and k before the rotation.
        rope_theta: base of the rotary angles; None leaves positions out.
        window_size: see only the last so many tokens (both sides if noncausal); None for all.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self", "cross"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float | None = None,
        window_size: int | None = None,
        causal: bool = True,
    ):
        super().__init__()
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        self.rope_theta, self.window_size = rope_theta, window_size
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self.qkv(x, x if context is None else context)
        mask = visible(x.shape[1], self.causal, valid, window_size=self.window_size)
        return self.o_proj(merge_heads(attention(q, k, v, mask=mask)))

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v = self.qkv(x, x, past)
        state = KV.append(state, k, v, valid)
        mask = visible(x.shape[1], True, state.valid, past, self.window_size)
        return self.o_proj(merge_heads(attention(q, state.key, state.value, mask=mask))), state

    def qkv(self, x: Tensor, source: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, N, D) of x and keys (B, Hk, M, D) of source, both counted from past, and values."""
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(source), self.num_kv_heads))
        v = split_heads(self.v_proj(source), self.num_kv_heads)
        return rotate_tokens(q, self.rope_theta, past), rotate_tokens(k, self.rope_theta, past), v

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "SoftmaxAttention":
        """Llama-style weights: ``q_proj, k_proj, v_proj, o_proj``, and our own arguments."""
        module = cls(**official_kwargs)
        load_strictly(module, state_dict)
        return module
