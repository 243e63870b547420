"""Dynamic mask attention: what a key is worth follows from its value, and every query sees the w worthiest keys."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.masks import Mask
from regard.mechanisms.base import Mechanism, Pattern, legitimate, visible
from regard.positions import rotate_tokens

FORMS = ("exp", "linear")
TIES = ("later", "topk")
_CHUNK = 256  # queries at a time


class Kept(NamedTuple):
    """Streaming state: the keys that a later query may still see, per key head, in the order of the sequence.

    A key that w others outrank is outranked by them for good, so at most w are held.

    Attributes:
        key: (B, Hk, M, D), value: (B, Hk, M, Dv).
        worth: (B, Hk, M), -inf for padding.
        length: tokens seen.
    """

    key: Tensor
    value: Tensor
    worth: Tensor
    length: int


class DynamicMaskAttention(Mechanism):
    """Dynamic mask attention (arXiv:2508.02124), as in the Doge models.

        δ_j = exp(A ∘ softplus(W_δ v_j))                  per key head, from the values of all key heads
        S_i = the w keys j ≤ i with the largest δ_j       of equal ones the later
        y_i = Wo [softmax_{j ∈ S_i}(q_i·k_j / √D + δ_j) v_j]_h

    x (B, N, C) to (B, N, C). q and k have an RMSNorm per head and rotary angles. Exact. The choice itself has no
    gradient; A and W_δ learn through the bias. At A = 0, as initialised, all keys are worth the same and it is a
    sliding window. Noncausal and cross-attention, where all queries see the same w keys, are not in the paper.

    Since δ does not depend on the query, what w later or worthier keys outrank never comes back: queries are taken in
    chunks next to the w keys that are left, and no N×N tensor is made.

    Args:
        dim, num_heads, num_kv_heads, head_dim: C, H, key heads and D.
        window_size: w.
        bias: of all projections.
        qk_norm: RMSNorm over each head of q and k.
        bias_form: "exp" (above), or "linear", δ = A ∘ softplus(...), of the authors' later kernels.
        ties: which of equal keys are kept; a repeated token's are equal in a first layer. "later", or "topk": those
            that torch.topk happens to return, as published. The latter makes N×N tensors and cannot stream.
        rope_theta: base of the rotary angles; None leaves positions out.
        norm_eps: of the norms.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self", "cross"})
    cost: ClassVar[str] = "O(N w C)"
    state: ClassVar = "growing"  # up to w keys

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window_size: int = 2048,
        bias: bool = False,
        qk_norm: bool = True,
        bias_form: str = "exp",
        ties: str = "later",
        rope_theta: float | None = 10_000.0,
        norm_eps: float = 1e-6,
        causal: bool = True,
    ):
        super().__init__()
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        for name, value, known in (("bias_form", bias_form, FORMS), ("ties", ties, TIES)):
            if value not in known:
                raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        self.window_size = _checked(window_size)
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.bias_form, self.ties, self.rope_theta = bias_form, ties, rope_theta
        width = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj, self.v_proj = nn.Linear(dim, width, bias=bias), nn.Linear(dim, width, bias=bias)
        self.A = nn.Parameter(torch.zeros(self.num_kv_heads))
        self.dt_proj = nn.Linear(width, self.num_kv_heads, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self.qkv(x, x if context is None else context)
        worth = self.worth(v, valid)
        if self.causal and self.ties == "topk":
            mask = _per_query_head(published_mask(worth, self.window_size), self.num_heads)
            out = attention(q, k, v, mask=mask, bias=_bias(worth, self.num_heads))
        elif self.causal:
            out, _ = dynamic_mask_attention(q, k, v, worth, self.window_size)
        else:
            k, v, worth, _ = _worthiest(Kept(k, v, worth, 0), self.window_size)
            out = attention(q, k, v, mask=_unpadded(worth, self.num_heads), bias=_bias(worth, self.num_heads))
        return self.o_proj(merge_heads(out))

    def stream(self, x: Tensor, state: Kept | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, Kept]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        if self.ties == "topk":
            raise Unsupported("ties: the keys that torch.topk keeps differ from step to step; streaming needs 'later'")
        q, k, v = self.qkv(x, x, 0 if state is None else state.length)
        out, state = dynamic_mask_attention(q, k, v, self.worth(v, valid), self.window_size, state)
        return self.o_proj(merge_heads(out)), state

    def qkv(self, x: Tensor, source: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated queries (B, H, N, D) and keys, and values (B, Hk, M, D)."""
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(source), self.num_kv_heads))
        v = split_heads(self.v_proj(source), self.num_kv_heads)
        return rotate_tokens(q, self.rope_theta, past), rotate_tokens(k, self.rope_theta, past), v

    def worth(self, v: Tensor, valid: Tensor | None = None) -> Tensor:
        """δ of values (B, Hk, M, D): (B, Hk, M), -inf for padding."""
        delta = self.A * F.softplus(self.dt_proj(merge_heads(v)))
        delta = (delta.exp() if self.bias_form == "exp" else delta).transpose(1, 2)
        return delta if valid is None else delta.masked_fill(~valid[:, None], -torch.inf)

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "DynamicMaskAttention":
        """``DogeAttention`` of transformers, from the arguments of ``DogeConfig``; besides them, ``ties``."""
        module = cls(**official_arguments(official_kwargs))
        load_strictly(module, state_dict)
        return module


def official_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Our arguments for those of ``DogeConfig``.

    Raises:
        Unsupported: a sliding window besides the chosen keys, or scaled rotary angles.
    """
    rope = config.get("rope_parameters") or {}
    if config.get("sliding_window") is not None:
        raise Unsupported(f"sliding_window: expected None, got {config['sliding_window']}; use keep_window_size")
    if (kind := rope.get("rope_type", "default")) != "default":
        raise Unsupported(f"rope_parameters: only rope_type default is known, got {kind!r}")
    return {
        "dim": config.get("hidden_size", 1024),
        "num_heads": config.get("num_attention_heads", 8),
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "window_size": config.get("keep_window_size", 2048),
        "bias": config.get("attention_bias", False),
        "ties": config.get("ties", "later"),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
    }


def dynamic_mask(worth: Tensor, window_size: int, queries: int | None = None) -> Tensor:
    """Which keys the last queries of a sequence see: the ``window_size`` worthiest up to each query.

    Args:
        worth: (B, Hk, M), -inf for keys that nobody sees.
        window_size: w; of equally worthy keys the later is kept.
        queries: n, the last n tokens; all M by default. Of the keys before them none may be outranked by w others
            that are not given.

    Returns:
        (B, Hk, n, M) bool.

    Raises:
        ShapeError, ArgumentError: see above.
    """
    if worth.dim() != 3:
        raise ShapeError(f"worth: expected (B, Hk, M), got {tuple(worth.shape)}")
    total = worth.shape[-1]
    n = total if queries is None else queries
    if not 0 <= n <= total:
        raise ArgumentError(f"queries: expected 0 to {total}, the number of keys, got {n}")
    old, new = worth.detach().split((total - n, n), dim=-1)
    order = old.contiguous().sort(dim=-1, stable=True)
    outranked_old = old.shape[-1] - 1 - order.indices.argsort(-1)  # by other old keys
    outranked_new = old.shape[-1] - torch.searchsorted(order.values, new.contiguous(), right=True)  # by old keys
    before = torch.cat([outranked_old, outranked_new], -1)
    key = torch.arange(total, device=worth.device)
    query = key[total - n :, None]
    new, every = new.unsqueeze(-1), worth.detach().unsqueeze(-2)
    outranks = (new > every) | ((new == every) & (query > key))
    count = before.to(torch.int32).unsqueeze(-2) + outranks.cumsum(-2, dtype=torch.int32)
    return (count < _checked(window_size)) & (key <= query) & (every > -torch.inf)


def published_mask(worth: Tensor, window_size: int) -> Tensor:
    """`dynamic_mask` of all queries with torch.topk, which leaves open what it keeps of equal keys."""
    n = worth.shape[-1]
    past = torch.ones(n, n, dtype=torch.bool, device=worth.device).tril()
    rows = worth.detach().unsqueeze(2).expand(-1, -1, n, -1).masked_fill(~past, torch.finfo(worth.dtype).min)
    best = rows.topk(min(window_size, n), dim=-1, sorted=False).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter(-1, best, True) & past & (rows > -torch.inf)


def dynamic_mask_attention(
    q: Tensor, k: Tensor, v: Tensor, worth: Tensor, window_size: int, state: Kept | None = None
) -> tuple[Tensor, Kept]:
    """``softmax(q kᵀ / √D + worth) v`` over the worthiest keys, causal; continues from a state.

    Args:
        q: (B, H, n, D), k: (B, Hk, n, D), v: (B, Hk, n, Dv).
        worth: (B, Hk, n), the additive bias of each key, -inf for padding.

    Returns:
        (B, H, n, Dv) and the state.
    """
    outs = []
    # while nothing can be dropped, one call does; chunks come after that
    room = 0 if state is None else state.key.shape[2]
    sizes = q.shape[2] if room + q.shape[2] <= window_size else _CHUNK
    for new_q, new_k, new_v, new_worth in zip(*(t.split(sizes, dim=2) for t in (q, k, v, worth)), strict=True):
        n = new_q.shape[2]
        if state is None:
            state = Kept(new_k, new_v, new_worth, n)
        else:
            joined = [
                torch.cat([old, new], 2)
                for old, new in ((state.key, new_k), (state.value, new_v), (state.worth, new_worth))
            ]
            state = Kept(joined[0], joined[1], joined[2], state.length + n)
        outs.append(_attend(new_q, state, window_size))
        state = _worthiest(state, window_size)
    assert state is not None
    return torch.cat(outs, 2), state


def _attend(q: Tensor, state: Kept, window_size: int) -> Tensor:
    heads, n, total = q.shape[1], q.shape[2], state.key.shape[2]
    mask: Mask | Tensor | None
    if total > window_size:
        mask = _per_query_head(dynamic_mask(state.worth, window_size, n), heads)
    elif (real := _unpadded(state.worth, heads)) is None:
        mask = visible(n, True, past=total - n)
    else:
        key = torch.arange(total, device=q.device)
        mask = real & (key <= key[total - n :, None])
    return attention(q, state.key, state.value, mask=mask, bias=_bias(state.worth, heads))


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _bias(worth: Tensor, heads: int) -> Tensor:
    """(B, H, 1, M); finite where nobody looks, so that gradients are too."""
    return _per_query_head(worth.masked_fill(worth == -torch.inf, 0.0), heads).unsqueeze(2)


def _unpadded(worth: Tensor, heads: int) -> Tensor | None:
    """(B, H, 1, M), or None if nothing is padding."""
    seen = worth > -torch.inf
    return None if bool(seen.all()) else _per_query_head(seen, heads).unsqueeze(2)


def _worthiest(state: Kept, window_size: int) -> Kept:
    """The state without keys that no later query can see."""
    if state.key.shape[2] <= window_size:
        return state
    index = state.worth.detach().sort(dim=-1, stable=True).indices[..., -window_size:].sort(-1).values
    wide = index.unsqueeze(-1)
    key, value = (t.gather(2, wide.expand(-1, -1, -1, t.shape[-1])) for t in (state.key, state.value))
    return Kept(key, value, state.worth.gather(2, index), state.length)


def _checked(window_size: int) -> int:
    if window_size < 1:
        raise ArgumentError(f"window_size: expected at least 1, got {window_size}")
    return window_size
