"""Sigmoid attention: every key is weighed by itself, without a softmax over the row."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.attention.problem import Problem, checked
from regard.errors import ArgumentError
from regard.layers import MLP, load_strictly, merge_heads, per_head, split_heads, split_rows
from regard.layers.scale import LayerScale
from regard.masks import Mask
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible
from regard.positions import alibi_slopes, rotate_tokens

NORMALISE = (None, "n", "sqrt_n")
_CHUNK = 256  # queries at a time


class SigmoidAttention(Mechanism):
    """Sigmoid self- and cross-attention (arXiv:2409.04431).

        p_ij = sigmoid((q_i·k_j / √D + slope_h (j - i)) exp(t) + b)
        y_i  = Wo [Σ_j p_ij v_j]_h                               rows do not sum to one

    x (B, N, C) to (B, N, C). The recommended b is -log n for sequences of n tokens, so that a row begins near a sum of
    one; with ALiBi it may be 0. A key's weight does not change when others are added, so parts of the keys simply add
    up. Exact, computed some queries at a time: no N×N tensor, in the backward neither.

    Args:
        dim, num_heads, num_kv_heads, head_dim: C, H, key heads and D.
        bias: of the projections.
        qk_norm, v_norm: LayerNorm over each head of q and k, of v (the paper's cross-attention has both).
        logit_bias: b; by default ``-log(max_length)``, or 0 with ALiBi.
        temperature: t.
        alibi: linear biases (arXiv:2108.12409).
        rope_theta: base of rotary angles; None for none.
        normalise: divide row i (from 1) by "n" = i or "sqrt_n" = √i.
        max_length: n of the default bias; sequences may be longer.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self", "cross"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar = "growing"
    logit_bias: Tensor
    temperature: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = True,
        v_norm: bool = False,
        logit_bias: float | None = None,
        temperature: float = 0.0,
        alibi: bool = False,
        rope_theta: float | None = None,
        normalise: str | None = None,
        max_length: int = 1024,
        causal: bool = True,
    ):
        super().__init__()
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        if normalise not in NORMALISE:
            raise ArgumentError(f"normalise: expected n, sqrt_n or None, got {normalise!r}")
        if max_length < 1:
            raise ArgumentError(f"max_length: expected at least 1, got {max_length}")
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.rope_theta, self.normalise = rope_theta, normalise
        if logit_bias is None:
            logit_bias = 0.0 if alibi else -math.log(max_length)
        self.register_buffer("logit_bias", torch.tensor([float(logit_bias)]))
        self.register_buffer("temperature", torch.tensor([float(temperature)]))
        self.alibi = alibi
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, self.num_kv_heads * self.head_dim, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in range(2))
        self.v_norm = nn.LayerNorm(self.head_dim) if v_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self.qkv(x, x if context is None else context)
        return self.o_proj(merge_heads(self.mix(q, k, v, valid=valid)))

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v = self.qkv(x, x, past)
        state = KV.append(state, k, v, valid)
        return self.o_proj(merge_heads(self.mix(q, state.key, state.value, past, state.valid))), state

    def qkv(self, x: Tensor, source: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated queries (B, H, N, D) and keys, and values (B, Hk, M, D)."""
        q = self.q_norm(split_heads(self.q_proj(x), self.num_heads))
        k = self.k_norm(split_heads(self.k_proj(source), self.num_kv_heads))
        v = self.v_norm(split_heads(self.v_proj(source), self.num_kv_heads))
        return rotate_tokens(q, self.rope_theta, past), rotate_tokens(k, self.rope_theta, past), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, past: int = 0, valid: Tensor | None = None) -> Tensor:
        """`sigmoid_attention` with this layer's settings; heads normalised by the row where that is asked for."""
        out = sigmoid_attention(
            q,
            k,
            v,
            mask=visible(q.shape[2], self.causal, valid, past),
            logit_bias=self.logit_bias,
            temperature=self.temperature,
            slopes=alibi_slopes(self.num_heads).to(q) if self.alibi else None,
            past=past,
        )
        if self.normalise is None:
            return out
        row = torch.arange(past + 1, past + 1 + q.shape[2], device=q.device)
        row = row.to(torch.promote_types(out.dtype, torch.float32))
        return (out / (row if self.normalise == "n" else row.sqrt())[:, None]).to(out.dtype)

    @classmethod
    def from_official(
        cls, state_dict: dict[str, Tensor], *, variant: str = "alibi_causal", **official_kwargs: Any
    ) -> "SigmoidAttention":
        """The layers of the attention simulator.

        ``variant`` is "alibi_causal", "rope_bias" (noncausal), "seqlen_norm", "sqrt_seqlen_norm" or "cross"; norms,
        biases and the logit bias follow from the weights. `SigmoidBlock.from_official` loads the block.
        """
        state = dict(state_dict)
        settings: dict[str, dict[str, Any]] = {
            "alibi_causal": {"alibi": True},
            "rope_bias": {"rope_theta": 10_000.0, "causal": False},
            "seqlen_norm": {"normalise": "n"},
            "sqrt_seqlen_norm": {"normalise": "sqrt_n"},
            "cross": {"causal": False},
        }
        if variant not in settings:
            raise ArgumentError(f"variant: expected one of {', '.join(settings)}, got {variant!r}")
        heads = official_kwargs["num_heads"]
        split_rows(state, "qkv", ("q_proj", "k_proj", "v_proj"))
        split_rows(state, "kv_proj", ("k_proj", "v_proj"))
        module = cls(
            official_kwargs["dim"],
            heads,
            bias="proj.bias" in state,
            qk_norm="q_norm.weight" in state,
            v_norm="v_norm.weight" in state,
            **settings[variant],
        )
        if module.rope_theta is not None:  # published pairs are neighbours, ours are half a head apart
            for name in (
                "q_proj.weight",
                "k_proj.weight",
                "q_proj.bias",
                "k_proj.bias",
                "q_norm.weight",
                "k_norm.weight",
            ):
                if name in state:
                    state[name] = _halves_apart(state[name], 1 if "norm" in name else heads)
            for name in ("q_norm.bias", "k_norm.bias"):
                if name in state:
                    state[name] = _halves_apart(state[name], 1)
        load_strictly(module, state, {"proj": "o_proj", "attn_bias": "logit_bias", "attn_temp": "temperature"})
        return module


class SigmoidBlock(nn.Module):
    """``x + γ1 attn(norm(x))``, then ``x + γ2 mlp(norm(x))``; ``hybrid_norm`` norms the attention's output too."""

    def __init__(
        self,
        attn: SigmoidAttention,
        hidden_dim: int | None = None,
        layer_scale: float = 1e-4,
        hybrid_norm: bool = False,
    ):
        super().__init__()
        dim = attn.dim
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = attn, MLP(dim, hidden_dim, bias=False)
        self.ls1, self.ls2 = LayerScale(dim, layer_scale), LayerScale(dim, layer_scale)
        self.norm3 = nn.LayerNorm(dim) if hybrid_norm else nn.Identity()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.norm3(self.attn(self.norm1(x), valid=valid)))
        return x + self.ls2(self.mlp(self.norm2(x)))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "SigmoidBlock":
        """``TransformerBlock`` with causal ALiBi attention and LayerScale."""
        attn = {name[5:]: part for name, part in state_dict.items() if name.startswith("attn.")}
        rest = {name: part for name, part in state_dict.items() if not name.startswith("attn.")}
        block = cls(SigmoidAttention.from_official(attn, **official_kwargs), len(rest["mlp.fc1.weight"]))
        load_strictly(block, rest | {f"attn.{name}": part for name, part in block.attn.state_dict().items()})
        return block


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    logit_bias: Tensor | float = 0.0,
    temperature: Tensor | float = 0.0,
    slopes: Tensor | None = None,
    past: int = 0,
    scale: float | None = None,
) -> Tensor:
    """``Σ_j sigmoid((scale q_i·k_j + slope (j - i)) exp(temperature) + logit_bias) v_j``.

    Keys that are masked weigh exactly 0; a query that sees none gives zeros.

    Args:
        q: (B, H, N, D). k, v: (B, Hk, M, D), (B, Hk, M, E), where Hk divides H.
        mask: as in `regard.attention`. Keys that a chunk of queries cannot reach are left out.
        slopes: (H,) of linear biases; None for none.
        past: the position of the first query among the keys, for the linear biases.
        scale: 1/√D by default.

    Returns:
        (B, H, N, E).

    Raises:
        ShapeError, ArgumentError: as `regard.attention`.
    """
    p = checked(q, k, v, mask, None, scale)
    factor = torch.as_tensor(temperature, device=q.device, dtype=torch.float32).exp()
    bias = torch.as_tensor(logit_bias, device=q.device, dtype=torch.float32)
    again = p.needs_grad and p.n > _CHUNK  # the backward computes the rows again

    def rows(first: int, keys: slice) -> Tensor:
        wide, queries = torch.promote_types(q.dtype, torch.float32), slice(first, first + _CHUNK)
        key, value = (t[:, :, keys].to(wide).repeat_interleave(p.groups, 1) for t in (k, v))
        scores = (q[:, :, queries].to(wide) * p.scale) @ key.mT
        if slopes is not None:
            i, j = (torch.arange(size, device=q.device)[part] for size, part in ((p.n, queries), (p.m, keys)))
            scores = scores + slopes.to(wide)[:, None, None] * (j - (i + past)[:, None])
        scores = scores * factor + bias
        if (allowed := p.allowed(queries)) is not None:
            scores = scores.masked_fill(~(allowed if allowed.shape[-1] == 1 else allowed[..., keys]), -torch.inf)
        return (scores.sigmoid() @ value).to(v.dtype)

    out = []
    for i, keys in enumerate(_reached(p)):
        out.append(checkpoint(rows, i * _CHUNK, keys, use_reentrant=False) if again else rows(i * _CHUNK, keys))
    return torch.cat(out, 2)


def _reached(p: Problem) -> list[slice]:
    """For each chunk of queries, from the first to the last key that any of them may see."""
    chunks = -(-p.n // _CHUNK)
    if not isinstance(p.mask, Mask) or chunks < 2 or p.m == 0 or torch.compiler.is_compiling():
        return [slice(0, p.m)] * max(chunks, 1)
    blocks = (p.mask.blocks(p.n, p.m, _CHUNK).grid() > 0).flatten(0, 1).any(0)
    found = (row.nonzero().flatten().tolist() or [0, -1] for row in blocks)
    return [slice(columns[0] * _CHUNK, (columns[-1] + 1) * _CHUNK) for columns in found]


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Channels of each head reordered from neighbouring pairs to halves; scores do not change."""
    per = rows.unflatten(0, (heads, -1))
    return torch.cat([per[:, 0::2], per[:, 1::2]], dim=1).flatten(0, 1)
