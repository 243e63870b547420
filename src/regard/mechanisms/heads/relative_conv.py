"""RCMHA: relative positions of Transformer-XL on queries, keys and values that passed a short convolution."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.layers.conv import CausalDepthwiseConv1d
from regard.masks import Mask
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible


class RelativeConvState(NamedTuple):
    """What decoding needs: keys and values after the convolutions, and the convolutions' states (B, H, k-1, D)."""

    kv: KV
    query_conv: Tensor
    key_conv: Tensor
    value_conv: Tensor


class RelativeConvAttention(Mechanism):
    """Relative convolutional multi-head attention (RCMHA, arXiv:2308.03429).

        q, k, v = conv(x Wq), conv(x Wk), conv(x Wv)            depthwise over time, causal, shared by the heads
        s_ij    = ((q_i + u)·k_j + q_i·e_{j-i} + β_{j-i}) / √D
        y       = Wo [softmax(s) v]

    x (B, N, C) to (B, N, C). Tables e and β for signed distances and the query bias u are learned and start at zero, so
    training starts without positions. Exact; the relative term is an N×N bias, so memory is O(N² H).

    ``memory`` (B, M, C) are earlier tokens, as in Transformer-XL: all of them are seen, and the convolution of the keys
    runs through them while that of the queries starts anew, as published. `stream` instead continues exactly.

    Args:
        dim, num_heads: C and H; head_dim is C / H.
        kernel_size: taps of the convolutions.
        max_length: longest distance, to the past and to the future.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar = "growing"

    def __init__(self, dim: int, num_heads: int = 8, kernel_size: int = 3, max_length: int = 4096, causal: bool = True):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        if max_length < 1:
            raise ArgumentError(f"max_length: expected at least 1, got {max_length}")
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.past = max_length  # where distance 0 stands in the tables
        self.q_proj, self.k_proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(dim, dim)
        self.q_conv, self.k_conv, self.v_conv = (CausalDepthwiseConv1d(self.head_dim, kernel_size) for _ in range(3))
        self.relative_keys = nn.Parameter(torch.zeros(2 * max_length, num_heads, self.head_dim))
        self.relative_bias = nn.Parameter(torch.zeros(2 * max_length, num_heads))
        self.query_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))
        self.o_proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        past = 0 if memory is None else memory.shape[1]
        if memory is not None and (memory.dim() != 3 or memory.shape[-1] != self.dim):
            raise ShapeError(f"memory: expected (B, M, {self.dim}), got {tuple(memory.shape)}")
        if valid is not None:
            x = x * valid.unsqueeze(-1)
            if memory is not None:
                valid = torch.cat([valid.new_ones(memory.shape[:2]), valid], dim=1)
        source = x if memory is None else torch.cat([memory, x], dim=1)
        return self.attend(x, source, visible(x.shape[1], self.causal, valid, past))

    def attend(self, x: Tensor, source: Tensor, mask: Mask | Tensor | None) -> Tensor:
        """Queries from x (B, N, C), keys and values from source (B, M, C), whose last N tokens are those of x."""
        q, k, v = self.project(x, source)
        return self._mix(q, k, v, mask)

    def stream(
        self, x: Tensor, state: RelativeConvState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, RelativeConvState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        projected = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        before = (None, None, None) if state is None else state[1:]
        steps = zip((self.q_conv, self.k_conv, self.v_conv), projected, before, strict=True)
        (q, q_state), (k, k_state), (v, v_state) = (conv.stream(part, old) for conv, part, old in steps)
        past = seen(None if state is None else state.kv)
        kv = KV.append(None if state is None else state.kv, k, v, valid)
        y = self._mix(q, kv.key, kv.value, visible(x.shape[1], True, kv.valid, past))
        return y, RelativeConvState(kv, q_state, k_state, v_state)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k and v (B, H, M, D), after the convolutions."""
        q = self.q_conv(split_heads(self.q_proj(x), self.num_heads))
        k = self.k_conv(split_heads(self.k_proj(source), self.num_heads))
        return q, k, self.v_conv(split_heads(self.v_proj(source), self.num_heads))

    def position_scores(self, q: Tensor, m: int) -> Tensor:
        """``q_i·e_{j-i} + β_{j-i}`` for the newest N of M tokens: (B, H, N, M), not scaled."""
        n = q.shape[2]
        if max(n, m) > self.past:
            raise ShapeError(f"x: {max(n, m)} tokens are more than max_length = {self.past}")
        first = self.past - m + 1  # the table row of the oldest key as the newest query sees it
        rows = slice(first, first + n + m - 1)
        by_distance = torch.einsum("bhnd,rhd->bhnr", q, self.relative_keys[rows])
        by_distance = by_distance + self.relative_bias[rows].T[:, None]
        distance = torch.arange(m, device=q.device) - torch.arange(n, device=q.device)[:, None] + n - 1
        return by_distance.gather(-1, distance.expand(*q.shape[:3], m))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None) -> Tensor:
        bias = self.position_scores(q, k.shape[2]) * self.head_dim**-0.5
        out = attention(q + self.query_bias[:, None], k, v, mask=mask, bias=bias)
        return self.o_proj(merge_heads(out))

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, past: int | None = None, **official_kwargs: Any
    ) -> "RelativeConvAttention":
        """``RelativeMultiHeadAttention``; ``past`` is the table row of distance 0, in the middle by default."""
        rows = len(state_dict["key_pos_bias"])
        kernel_size = state_dict["query.1.conv.weight"].shape[-1]
        module = cls(official_kwargs["d_model"], official_kwargs["heads"], kernel_size)
        module.past = rows // 2 if past is None else past
        module.relative_keys = nn.Parameter(torch.zeros(rows, *module.relative_keys.shape[1:]))
        module.relative_bias = nn.Parameter(torch.zeros(rows, module.num_heads))
        load_strictly(module, state_dict, official_names())
        return module


def official_names() -> dict[str, str]:
    """Published names of the weights to ours."""
    names = {"key_pos_embeddings": "relative_keys", "key_pos_bias": "relative_bias", "query_pos_bias": "query_bias"}
    for name in ("query", "key", "value"):
        names |= {f"{name}.0.linear": f"{name[0]}_proj", f"{name}.1.conv": f"{name[0]}_conv.conv"}
    return {**names, "output": "o_proj"}
