"""Attention whose queries are means over the last few tokens."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError
from regard.layers import merge_heads, per_head, split_heads
from regard.layers.dropout import dropout_attention
from regard.mechanisms.base import KV, Mechanism, Pattern, check_rate, visible
from regard.positions import rotate_tokens


class WindowQueryState(NamedTuple):
    """What streaming carries along.

    Attributes:
        kv: keys and values so far.
        tail: (B, L-1, C), the last tokens, zeros before the first one and for padding.
        real: (B, L-1, 1), 1 for those of them that are tokens.
    """

    kv: KV
    tail: Tensor
    real: Tensor


class WindowQueryAttention(Mechanism):
    """One branch of MQSA (arXiv:2311.01056): causal self-attention with queries of windows of L tokens.

        a_t = mean(x_{t-L+1} ... x_t)              over those that exist and are no padding
        n_t = LN(a_t)       q = Wq n,  k = Wk x,  v = Wv x
        y_t = [softmax(q_h k_hᵀ / √D) v_h]_h + n_t

    x (B, N, C) to (B, N, C). A long window asks for what a user's recent items have in common, L = 1 for what follows
    the last one. Keys and values are of single tokens, not normalised. There is no output projection, and the
    residual is the normalised mean, not x; ``residual=False`` leaves it out. Exact. Cost O(N² C + N L C).

    Args:
        dim, num_heads: C and H.
        window_size: L.
        residual: add n, as published.
        dropout: of attention weights in training, which then are a N×N matrix.
        eps: added to the variance of the norm.
        rope_theta: base of rotary angles of q and k; None for none, as published.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N² C + N L C)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        window_size: int = 3,
        residual: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-24,
        rope_theta: float | None = None,
    ):
        super().__init__()
        if window_size < 1:
            raise ArgumentError(f"window_size: expected at least 1, got {window_size}")
        per_head(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.window_size, self.residual, self.rope_theta = window_size, residual, rope_theta
        self.dropout = check_rate("dropout", dropout)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self._next(x, None, valid)[0]

    def stream(
        self, x: Tensor, state: WindowQueryState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, WindowQueryState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._next(x, state, valid)

    def _next(self, x: Tensor, state: WindowQueryState | None, valid: Tensor | None) -> tuple[Tensor, WindowQueryState]:
        x, real = _without_padding(x, valid)
        before = self.window_size - 1
        if state is None:
            kv, past = None, 0
            recent, recent_real = (F.pad(t, (0, 0, before, 0)) for t in (x, real))
        else:
            kv, past = state.kv, state.kv.key.shape[2]
            recent, recent_real = torch.cat([state.tail, x], 1), torch.cat([state.real, real], 1)
        n = self.norm(_window_means(recent, recent_real, self.window_size))

        q, k, v = (
            split_heads(proj(source), self.num_heads)
            for proj, source in ((self.q_proj, n), (self.k_proj, x), (self.v_proj, x))
        )
        q, k = (rotate_tokens(t, self.rope_theta, past) for t in (q, k))
        kv = KV.append(kv, k, v, valid)
        mask = visible(x.shape[1], True, kv.valid, past)
        rate = self.dropout if self.training else 0.0
        y = merge_heads(dropout_attention(q, kv.key, kv.value, rate, mask))
        last = recent.shape[1] - before
        return y + n if self.residual else y, WindowQueryState(kv, recent[:, last:], recent_real[:, last:])


def window_means(x: Tensor, window_size: int, valid: Tensor | None = None) -> Tensor:
    """Means of each token (B, N, C) and the ``window_size - 1`` before it, without padding; 0 where all is padding."""
    x, real = _without_padding(x, valid)
    x, real = (F.pad(t, (0, 0, window_size - 1, 0)) for t in (x, real))
    return _window_means(x, real, window_size)


def _without_padding(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    if valid is None:
        return x, torch.ones_like(x[..., :1])
    return x.masked_fill(~valid[..., None], 0.0), valid[..., None].to(x.dtype)


def _window_means(x: Tensor, real: Tensor, window_size: int) -> Tensor:
    """From L - 1 tokens before the first one whose mean is wanted."""
    total, count = (t.unfold(1, window_size, 1).sum(-1) for t in (x, real))
    return total / count.clamp(min=1.0)
