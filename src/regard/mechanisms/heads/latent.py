"""Multi-head latent attention (MLA), which keeps one small latent per token in place of all keys and values."""

import math
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import load_strictly, merge_heads, per_head, split_heads, split_rows
from regard.masks import Mask
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible
from regard.positions import rotate, rotate_tokens

Rotary = tuple[Tensor, Tensor]


class MultiHeadLatentAttention(Mechanism):
    """MLA (DeepSeek-V2, arXiv:2405.04434).

        c = x W_dkv        ĉ = γ ∘ c / rms(c)        k_pe = R(p) x W_kpe                 one of each for all heads
        q = x Wq, or rms(x Wqa) Wqb, per head [q_nope, R(p) q_pe]        k_h = [ĉ W_uk,h, k_pe]        v_h = ĉ W_uv,h
        y = Σ_h softmax(q_h k_hᵀ / √(d_n + d_r)) v_h Wo_h

    Streaming keeps ĉ and k_pe (r + d_r numbers per token) and attends to them directly, W_uk and W_uv being moved to
    the query's and the output's side (the absorbed form):

        q_nope · k_nope = (q_nope W_uk,hᵀ) · ĉ        o_h = (Σ p ĉ) W_uv,h

    x (B, N, C) to (B, N, C). Exact; both forms give the same. Cost O(N² H (d_n + d_r + d_v)).

    Args:
        dim: C.
        num_heads: H.
        q_lora_rank: width of the queries' own latent; None projects them directly.
        kv_lora_rank: r; 4 C / H by default, as in DeepSeek-V3.
        qk_nope_head_dim: d_n, C / H by default.
        qk_rope_head_dim: d_r, half of d_n by default.
        v_head_dim: d_v, d_n by default.
        bias: of the down-projections and the output projection.
        rope_theta: base of the rotary angles; None leaves positions out; "given" expects ``rotary`` in every call, for
            models whose angles are scaled.
        scale: of the scores, (d_n + d_r)^-½ by default.
        norm_eps: of the two RMSNorms.
        absorbed: stream in the absorbed form; False expands keys and values of all tokens at every step.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self", "cross"})
    cost: ClassVar[str] = "O(N² H (d_n + d_r + d_v))"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        bias: bool = False,
        rope_theta: float | Literal["given"] | None = 10_000.0,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        absorbed: bool = True,
        causal: bool = True,
    ):
        super().__init__()
        d_n, _ = per_head(dim, num_heads, qk_nope_head_dim)
        d_r = 2 * max(d_n // 4, 1) if qk_rope_head_dim is None else qk_rope_head_dim
        d_v = d_n if v_head_dim is None else v_head_dim
        rank = 4 * d_n if kv_lora_rank is None else kv_lora_rank
        sizes = {"kv_lora_rank": rank, "qk_nope_head_dim": d_n, "qk_rope_head_dim": d_r, "v_head_dim": d_v}
        for name, size in {**sizes, "q_lora_rank": 1 if q_lora_rank is None else q_lora_rank}.items():
            if size < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {size}")
        if d_r % 2:
            raise ArgumentError(f"qk_rope_head_dim: rotary embedding turns pairs of channels, {d_r} is odd")
        self.dim, self.num_heads, self.causal = dim, num_heads, legitimate(self, causal)
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = d_n, d_r, d_v
        self.bias, self.rope_theta, self.norm_eps, self.absorbed = bias, rope_theta, norm_eps, absorbed
        self.scale = (d_n + d_r) ** -0.5 if scale is None else scale
        if q_lora_rank is None:
            self.q_proj: nn.Module = nn.Linear(dim, num_heads * (d_n + d_r), bias=False)
        else:
            self.q_proj = nn.Sequential(
                nn.Linear(dim, q_lora_rank, bias=bias),
                nn.RMSNorm(q_lora_rank, eps=norm_eps),
                nn.Linear(q_lora_rank, num_heads * (d_n + d_r), bias=False),
            )
        self.latent_proj = nn.Linear(dim, rank, bias=bias)
        self.latent_norm = nn.RMSNorm(rank, eps=norm_eps)
        self.k_rope_proj = nn.Linear(dim, d_r, bias=bias)
        self.k_up_proj = nn.Linear(rank, num_heads * d_n, bias=False)
        self.v_up_proj = nn.Linear(rank, num_heads * d_v, bias=False)
        self.o_proj = nn.Linear(num_heads * d_v, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """As `Mechanism.forward`.

        Args:
            rotary: cos and sin (..., N, d_r) of x in place of those of ``rope_theta``.
        """
        self._check(x, context, valid, dim=self.dim)
        self._check_rotary(x, context, rotary)
        source = x if context is None else context
        state = KV(self._rope_key(source, 0, rotary), self.latent_norm(self.latent_proj(source)).unsqueeze(1), valid)
        return self._expanded(*self._query(x, 0, rotary), state, visible(x.shape[1], self.causal, valid))

    def stream(
        self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Tensor, KV]:
        """As `Mechanism.stream`; the state's ``key`` is k_pe (B, 1, M, d_r), its ``value`` the latents (B, 1, M, r)."""
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        self._check_rotary(x, None, rotary)
        past = seen(state)
        latent = self.latent_norm(self.latent_proj(x)).unsqueeze(1)
        state = KV.append(state, self._rope_key(x, past, rotary), latent, valid)
        mix = self._absorbed if self.absorbed else self._expanded
        return mix(*self._query(x, past, rotary), state, visible(x.shape[1], True, state.valid, past)), state

    def _expanded(self, q_nope: Tensor, q_pe: Tensor, state: KV, mask: Mask | None) -> Tensor:
        latent = state.value.squeeze(1)
        k_nope = split_heads(self.k_up_proj(latent), self.num_heads)
        v = split_heads(self.v_up_proj(latent), self.num_heads)
        k = torch.cat([k_nope, state.key.expand(-1, self.num_heads, -1, -1)], -1)
        out = attention(torch.cat([q_nope, q_pe], -1), k, v, mask=mask, scale=self.scale)
        return self.o_proj(merge_heads(out))

    def _absorbed(self, q_nope: Tensor, q_pe: Tensor, state: KV, mask: Mask | None) -> Tensor:
        q_latent = self._into_latents(q_nope)
        out = attend_to_latents(q_latent, q_pe, state.value, state.key, mask, self.scale)
        return self._out_of_latents(out)

    def _into_latents(self, q_nope: Tensor) -> Tensor:
        """q_nope W_ukᵀ, (B, H, N, r)."""
        return q_nope @ rearrange(self.k_up_proj.weight, "(h d) r -> h d r", h=self.num_heads)

    def _out_of_latents(self, mixed: Tensor) -> Tensor:
        """Σ_h mixed_h W_uv,h Wo_h, from (B, H, N, r)."""
        v_up = rearrange(self.v_up_proj.weight, "(h d) r -> h r d", h=self.num_heads)
        return self.o_proj(merge_heads(mixed @ v_up))

    def _query(self, x: Tensor, past: int, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        q = split_heads(self.q_proj(x), self.num_heads)
        q_nope, q_pe = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        return q_nope, self._rotated(q_pe, past, rotary)

    def _rope_key(self, source: Tensor, past: int, rotary: Rotary | None) -> Tensor:
        return self._rotated(self.k_rope_proj(source).unsqueeze(1), past, rotary)

    def _rotated(self, x: Tensor, past: int, rotary: Rotary | None) -> Tensor:
        if rotary is not None:
            cos, sin = (t if t.dim() == 2 else t.unsqueeze(-3) for t in rotary)
            return rotate(x, cos, sin)
        assert not isinstance(self.rope_theta, str)
        return rotate_tokens(x, self.rope_theta, past)

    def _check_rotary(self, x: Tensor, context: Tensor | None, rotary: Rotary | None) -> None:
        if rotary is None:
            if self.rope_theta == "given":
                raise ArgumentError("rotary: the angles of this model are scaled; give their cos and sin")
            return
        if context is not None:
            raise ArgumentError("rotary: these angles belong to x; a context needs rope_theta")
        expected = (x.shape[1], self.qk_rope_head_dim)
        if any(t.dim() not in (2, 3) or tuple(t.shape[-2:]) != expected for t in rotary):
            shapes = " and ".join(str(tuple(t.shape)) for t in rotary)
            raise ShapeError(f"rotary: expected cos and sin (..., {expected[0]}, {expected[1]}), got {shapes}")

    def _arguments(self) -> dict[str, Any]:
        """What builds another module of this shape."""
        names = "dim num_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim bias rope_theta"
        return {name: getattr(self, name) for name in (*names.split(), "scale", "norm_eps", "absorbed", "causal")}

    @classmethod
    def from_official(
        cls,
        state_dict: dict[str, Tensor],
        *,
        hidden_size: int = 7168,
        num_attention_heads: int = 128,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        q_lora_rank: int | None = 1536,
        attention_bias: bool = False,
        rope_interleave: bool = True,
        rope_theta: float = 10_000.0,
        rope_parameters: dict[str, Any] | None = None,
        **other_fields: Any,
    ) -> "MultiHeadLatentAttention":
        """The attention of transformers' DeepSeek-V3, from the fields of its config and with their defaults.

        Fields that the attention does not read are ignored. ``rms_norm_eps`` is one of them: the latents
        are normalised with 1e-6 whatever it says.
        """
        rope = {"rope_theta": rope_theta, **(rope_parameters or {})}
        plain = rope.get("rope_type", "default") == "default"
        scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        if not plain and (mscale := rope.get("mscale_all_dim", 0)) and rope["factor"] > 1:
            scale *= (0.1 * mscale * math.log(rope["factor"]) + 1.0) ** 2  # YaRN
        module = cls(
            hidden_size,
            num_attention_heads,
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            bias=attention_bias,
            rope_theta=rope["rope_theta"] if plain else "given",
            scale=scale,
        )
        state = dict(state_dict)
        d_n, d_r, d_v, rank = qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank
        split_rows(state, "kv_a_proj_with_mqa", ("latent_proj", "k_rope_proj"), (rank, d_r))
        if (up := state.pop("kv_b_proj.weight", None)) is not None:
            k_up, v_up = up.unflatten(0, (num_attention_heads, d_n + d_v)).split([d_n, d_v], 1)
            state |= {"k_up_proj.weight": k_up.flatten(0, 1), "v_up_proj.weight": v_up.flatten(0, 1)}
        if rope_interleave:  # pairs (0, 1), (2, 3) … of the weights' rows become our (0, d/2), (1, 1 + d/2) …
            halves = torch.cat([torch.arange(0, d_r, 2), torch.arange(1, d_r, 2)])
            for name in {"k_rope_proj.weight", "k_rope_proj.bias"} & state.keys():
                state[name] = state[name][halves]
            rows = torch.cat([torch.arange(d_n), d_n + halves])
            for name in {"q_proj.weight", "q_b_proj.weight"} & state.keys():
                state[name] = state[name].unflatten(0, (num_attention_heads, d_n + d_r))[:, rows].flatten(0, 1)
        renamed = {
            "q_a_proj": "q_proj.0",
            "q_a_layernorm": "q_proj.1",
            "q_b_proj": "q_proj.2",
            "kv_a_layernorm": "latent_norm",
        }
        load_strictly(module, state, renamed)
        return module


def attend_to_latents(
    q_latent: Tensor, q_pe: Tensor, latent: Tensor, k_pe: Tensor, mask: Mask | None, scale: float
) -> Tensor:
    """``softmax(scale (q_latent · c + q_pe · k_pe) | mask) c``: the latent is key and value at once.

    Args:
        q_latent: (B, H, N, s).
        q_pe: (B, H, N, d_r).
        latent: (B, G, M, s), where G divides H; heads in groups, as in grouped-query attention.
        k_pe: (B, 1, M, d_r), shared.

    Returns:
        (B, H, N, s).
    """
    key = torch.cat([latent, k_pe.expand(-1, latent.shape[1], -1, -1)], -1)
    return attention(torch.cat([q_latent, q_pe], -1), key, latent, mask=mask, scale=scale)
