"""Sigmoid attention: every key is weighed by itself, without a softmax over the row."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regard.attention.problem import Problem, checked
from regard.errors import ArgumentError
from regard.layers import MLP, load_strictly, merge_heads, per_head, split_heads, split_rows
from regard.masks import Mask
from regard.mechanisms.base import KV, Mechanism, Pattern, check_rate, legitimate, seen, visible
from regard.positions import alibi_slopes, rotary_angles, rotate

CHUNK = 1 << 21  # scores that live at once

POWERS = {None: 0.0, "n": 1.0, "sqrt_n": 0.5}


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    slopes: Tensor | None = None,
    past: int = 0,
    scale: float | None = None,
    dropout: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """``σ(scale · q kᵀ + slope_h (j - i) + b | mask) v``, exact, a chunk of queries at a time, also in the backward.

    Weights of different keys do not depend on each other: results over parts of the keys add up to the whole. A query
    that sees nothing gets zeros.

    Args:
        query: (B, H, N, D).
        key: (B, Hk, M, D), where Hk divides H.
        value: (B, Hk, M, Dv).
        mask: a `regard.masks.Mask` or a bool tensor broadcastable to (B, H, N, M), True = may be seen. Keys that a
            chunk of queries cannot see are not computed where a `Mask` says so.
        logit_bias: b, a number or a tensor that broadcasts to (B, H, N, 1); -ln M by default.
        slopes: (H,) of ALiBi; linear in j - i, so that keys after the query are preferred where they are seen.
        past: position of the first query among the keys.
        scale: ``1/√D`` by default.
        dropout: share of the weights that is dropped.
        chunk_size: queries per chunk; by default so that a chunk has about two million scores.

    Returns:
        (B, H, N, Dv).

    Raises:
        ShapeError, ArgumentError: as `regard.attention`; chunk_size is less than 1.
    """
    p = checked(query, key, value, mask, None, scale)
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size: expected at least 1, got {chunk_size}")
    bias = -math.log(max(p.m, 1)) if logit_bias is None else logit_bias
    key, value = (t.repeat_interleave(p.groups, dim=1) if p.groups > 1 else t for t in (key, value))
    rows = chunk_size or max(1, CHUNK // max(p.batch * p.heads * p.m, 1))

    def chunk(
        query: Tensor, key: Tensor, value: Tensor, bias: float | Tensor, start: int, low: int, high: int
    ) -> Tensor:
        stop = start + query.shape[2]
        s = (query * p.scale @ key[:, :, low:high].mT).to(torch.promote_types(query.dtype, torch.float32))
        if slopes is not None:
            i = torch.arange(past + start, past + stop, device=s.device)
            s = s + slopes.to(s)[:, None, None] * (torch.arange(low, high, device=s.device) - i[:, None])
        s = s + (
            bias[..., start:stop, :] if isinstance(bias, Tensor) and bias.dim() > 1 and bias.shape[-2] > 1 else bias
        )
        allowed = p.allowed(slice(start, stop))
        if allowed is not None:
            s = s.masked_fill(~(allowed if allowed.shape[-1] == 1 else allowed[..., low:high]), -torch.inf)
        return F.dropout(s.sigmoid(), dropout).to(value.dtype) @ value[:, :, low:high]

    if p.n <= rows:
        return chunk(query, key, value, bias, 0, 0, p.m)
    parts = []
    for start in range(0, p.n, rows):
        arguments = (query[:, :, start : start + rows], key, value, bias, start, *_reach(p, start, rows))
        # scores are computed again in the backward instead of being kept for all chunks
        parts.append(checkpoint(chunk, *arguments, use_reentrant=False) if p.needs_grad else chunk(*arguments))
    return torch.cat(parts, 2)


def _reach(p: Problem, start: int, rows: int) -> tuple[int, int]:
    """An interval that holds all the keys which this chunk of queries sees."""
    if not isinstance(p.mask, Mask) or torch.compiler.is_compiling():
        return 0, p.m
    low = torch.arange(0, p.m, rows, device=p.device)
    high = (low + rows).clamp(max=p.m)
    q0 = torch.full_like(low, start)
    some, _ = p.mask.rect(q0, (q0 + rows).clamp(max=p.n), low, high)
    some = some.broadcast_to(*some.shape[:-1], len(low)).reshape(-1, len(low)).any(0)
    return (int(low[some][0]), int(high[some][-1])) if bool(some.any()) else (0, 0)


class SigmoidAttention(Mechanism):
    """Attention with an elementwise sigmoid for the softmax (arXiv:2409.04431).

        y_i = Wo [Σ_j σ(e^τ (q_i · k_j / √D + slope_h (j - i)) + b) v_j / r_i]_h        slopes with ALiBi only

    Rows do not sum to one; b = -ln n makes them about 1/2 to 1 at the start, which is what lets it train, together with
    normalised queries and keys. r_i = 1, or i, or √i (``normalise``), i counting from 1.

    x (B, N, C) to (B, N, C). Exact. Cost O(N² C), memory of a chunk of queries; without a row statistic a key's weight
    never changes when others are added, and results over parts of the keys add up.

    Args:
        dim: C.
        num_heads, num_kv_heads, head_dim: H, key heads (H by default) and D (C / H by default).
        bias: of the four projections.
        qk_norm: LayerNorm over each head of q and k, before the rotation.
        v_norm: the same for v, as published for cross-attention.
        logit_bias: b, or "-log_n": n is ``max_length`` if that is given, else the number of keys a query may see.
        temperature: τ.
        alibi: ALiBi's linear biases (arXiv:2108.12409).
        rope_theta: base of the rotary angles; None leaves them out.
        normalise: None, "n" (r = i) or "sqrt_n" (r = √i).
        dropout: of the weights.
        max_length: the training length n, for the bias; any length is accepted all the same.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self", "cross"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar = "growing"

    slopes: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = True,
        v_norm: bool = False,
        logit_bias: float | Literal["-log_n"] = "-log_n",
        temperature: float = 0.0,
        alibi: bool = False,
        rope_theta: float | None = None,
        normalise: Literal["n", "sqrt_n"] | None = None,
        dropout: float = 0.0,
        max_length: int | None = None,
        causal: bool = True,
    ):
        super().__init__()
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        if isinstance(logit_bias, str) and logit_bias != "-log_n":
            raise ArgumentError(f"logit_bias: expected a number or '-log_n', got {logit_bias!r}")
        if normalise not in POWERS:
            raise ArgumentError(f"normalise: expected None, 'n' or 'sqrt_n', got {normalise!r}")
        if max_length is not None and max_length < 1:
            raise ArgumentError(f"max_length: expected at least 1, got {max_length}")
        if max_length is not None and logit_bias == "-log_n":
            logit_bias = -math.log(max_length)
        self.logit_bias, self.temperature, self.rope_theta = logit_bias, temperature, rope_theta
        self.normalise, self.dropout = normalise, check_rate("dropout", dropout)
        kv_width = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, kv_width, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.q_norm, self.k_norm, self.v_norm = (
            nn.LayerNorm(self.head_dim) if wanted else nn.Identity() for wanted in (qk_norm, qk_norm, v_norm)
        )
        self.register_buffer("slopes", alibi_slopes(num_heads) if alibi else None, persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self.qkv(x, x if context is None else context)
        return self.o_proj(merge_heads(self.mix(q, k, v, valid, cross=context is not None)))

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v = self.qkv(x, x, past)
        state = KV.append(state, k, v, valid)
        return self.o_proj(merge_heads(self.mix(q, state.key, state.value, state.valid, past))), state

    def qkv(self, x: Tensor, source: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k and v (B, Hk, M, D), normalised and rotated."""
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(source), self.num_kv_heads))
        v = self.v_norm(split_heads(self.v_proj(source), self.num_kv_heads))
        if self.rope_theta is not None:
            at = [torch.arange(past, past + t.shape[2], device=t.device) for t in (q, k)]
            q, k = (
                rotate(t, *rotary_angles(p, self.head_dim, self.rope_theta)) for t, p in zip((q, k), at, strict=True)
            )
        return q, k, v

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, past: int = 0, cross: bool = False
    ) -> Tensor:
        """The heads' outputs (B, H, N, Dv); ``valid`` (B, M) is of the keys, ``past`` the first query's position."""
        n, m = q.shape[2], k.shape[2]
        if valid is None or cross:
            row = torch.arange(past + 1, past + n + 1, device=q.device)[:, None]
        else:
            row = valid.cumsum(1)[:, None, past:, None].clamp(min=1)  # of real tokens, wherever the padding stands
        sees = row if self.causal else m if valid is None else valid.sum(1)[:, None, None, None].clamp(min=1)
        bias: float | Tensor
        if isinstance(self.logit_bias, str):
            bias = -sees.float().log() if isinstance(sees, Tensor) else -math.log(sees)
        else:
            bias = self.logit_bias
        heat = math.exp(self.temperature)
        out = sigmoid_attention(
            q,
            k,
            v,
            mask=visible(n, self.causal, valid, past),
            logit_bias=bias,
            slopes=None if self.slopes is None else self.slopes.float() * heat,
            past=past,
            scale=heat * self.head_dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
        )
        return out if self.normalise is None else out / row.to(out.dtype) ** POWERS[self.normalise]

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        variant: str = "Attention",
        dim: int | None = None,
        num_heads: int = 8,
        attn_activ_fn: str = "sigmoid",
        causal: bool = False,
        **official_kwargs: Any,
    ) -> "SigmoidAttention | SigmoidBlock":  # type: ignore[override]
        """The simulator's modules; biases, norms and the two buffers are what the weights say.

        Args:
            state_dict: of the published module.
            variant: "Attention" or "CrossAttention", with "RoPE" or "ALiBi" before it, or the block of one of them:
                "TransformerBlock", "ALiBiTransformerBlock" …
            dim: C, read from the weights by default.
            num_heads: H.
            attn_activ_fn: "sigmoid", "seq_len_normalized_sigmoid" or "sqrt_seq_len_normalized_sigmoid".
            causal: whether the mask the published module was called with is causal.
            official_kwargs: what else the published constructors take (``bias``, ``qk_norm``, ``attn_bias`` …).
        """
        unknown = official_kwargs.keys() - OFFICIAL
        if unknown:
            raise ArgumentError(f"{', '.join(sorted(unknown))}: not an argument of the published modules")
        if attn_activ_fn not in ACTIVATIONS:
            raise ArgumentError(f"attn_activ_fn: expected one of {', '.join(ACTIVATIONS)}, got {attn_activ_fn!r}")
        kind = variant.removeprefix("RoPE").removeprefix("ALiBi")
        if kind not in ("Attention", "CrossAttention", "TransformerBlock"):
            raise ArgumentError(
                f"variant: expected (RoPE|ALiBi)(Attention|CrossAttention|TransformerBlock), got {variant!r}"
            )
        state = dict(state_dict)
        of = "attn." if kind == "TransformerBlock" else ""
        if f"{of}proj.weight" not in state:
            raise ArgumentError(f"state_dict does not fit {variant}: missing {of}proj.weight")
        split_rows(state, f"{of}qkv", (f"{of}q_proj", f"{of}k_proj", f"{of}v_proj"))
        split_rows(state, f"{of}kv_proj", (f"{of}k_proj", f"{of}v_proj"))
        shift, heat = (state.pop(f"{of}{name}", torch.zeros(1)) for name in ("attn_bias", "attn_temp"))
        attention = cls(
            dim=state[f"{of}proj.weight"].shape[0] if dim is None else dim,
            num_heads=num_heads,
            bias=f"{of}proj.bias" in state,
            qk_norm=f"{of}q_norm.weight" in state,
            v_norm=f"{of}v_norm.weight" in state,
            logit_bias=shift.item(),
            temperature=heat.item(),
            alibi=variant.startswith("ALiBi"),
            rope_theta=10_000.0 if variant.startswith("RoPE") else None,
            normalise=ACTIVATIONS[attn_activ_fn],
            dropout=official_kwargs.get("attn_drop", 0.0),
            causal=causal,
        )
        if variant.startswith("RoPE"):  # pairs (0, 1), (2, 3) … become our (0, D/2), (1, 1 + D/2) …
            halves = torch.cat([torch.arange(0, attention.head_dim, 2), torch.arange(1, attention.head_dim, 2)])
            for name in [
                f"{of}{t}_{part}.{kind}" for t in "qk" for part in ("proj", "norm") for kind in ("weight", "bias")
            ]:
                if name in state:
                    state[name] = state[name].unflatten(0, (-1, attention.head_dim))[:, halves].flatten(0, 1)
        module: SigmoidAttention | SigmoidBlock = attention
        if of:
            scales = "ls1.gamma" in state
            module = SigmoidBlock(attention, state["mlp.fc1.weight"].shape[0], "mlp.fc2.bias" in state, scales)
        load_strictly(module, state, {f"{of}proj": f"{of}o_proj", "ls1.gamma": "scale1", "ls2.gamma": "scale2"})
        return module


class SigmoidBlock(nn.Module):
    """A pre-norm transformer block around sigmoid attention, as published: what keeps it stable stands on the branches.

        x ← x + γ1 ∘ attn(norm(x))        x ← x + γ2 ∘ mlp(norm(x))          LayerScale, for vision
        x ← x + norm(attn(norm(x)))       …                                  hybrid norm, for large language models

    Args:
        attn: the attention.
        hidden_dim: of the feed-forward layer, 4 C by default.
        mlp_bias: of its linear layers' second; the first has none.
        layer_scale: γ, from 1e-4.
        hybrid_norm: normalise what the attention adds.
    """

    def __init__(
        self,
        attn: SigmoidAttention,
        hidden_dim: int | None = None,
        mlp_bias: bool = False,
        layer_scale: bool = False,
        hybrid_norm: bool = False,
    ):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(attn.dim), attn, nn.LayerNorm(attn.dim)
        self.mlp = MLP(attn.dim, hidden_dim, bias=False)
        if mlp_bias:
            self.mlp.fc2 = nn.Linear(self.mlp.fc2.in_features, attn.dim)
        self.scale1, self.scale2 = (
            nn.Parameter(torch.full((attn.dim,), 1e-4)) if layer_scale else None for _ in range(2)
        )
        self.post_norm = nn.LayerNorm(attn.dim) if hybrid_norm else nn.Identity()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        mixed = self.post_norm(self.attn(self.norm1(x), valid=valid))
        x = x + (mixed if self.scale1 is None else self.scale1 * mixed)
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if self.scale2 is None else self.scale2 * mixed)


ACTIVATIONS: dict[str, Literal["n", "sqrt_n"] | None] = {
    "sigmoid": None,
    "seq_len_normalized_sigmoid": "n",
    "sqrt_seq_len_normalized_sigmoid": "sqrt_n",
}
OFFICIAL = {"bias", "qk_norm", "attn_drop", "proj_drop", "attn_bias", "attn_temp", "q_dim", "kv_dim", "N"}
