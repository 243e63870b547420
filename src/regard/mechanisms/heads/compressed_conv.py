"""Compressed convolutional attention (CCA): the whole attention in a narrower latent space."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.attention import attention
from regard.errors import ArgumentError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.base import KV, Mechanism, Pattern, check_rate, visible
from regard.positions import rotate, rotate_tokens


class CCAState(NamedTuple):
    """What decoding needs.

    Attributes:
        kv: normalised, rotated keys and values so far, (B, G, M, D) each.
        latent: (B, t0 + t1 - 2, (H + G)·D), the last projected queries and keys before the convolutions.
        delayed: (B, 1, G·D/2), the last token's half of the values, which the next token uses.
    """

    kv: KV
    latent: Tensor
    delayed: Tensor


class CompressedConvAttention(Mechanism):
    """Queries, keys and values are projected down, mixed by two short causal convolutions, and attend there.

    From arXiv:2510.04476. H query heads and G key heads of size D, H·D < C:

        q0, k0 = x Wq, x Wk                      (N, H·D), (N, G·D)
        qc, kc = conv_t1(conv_t0([q0, k0]))      depthwise, then one dense filter per head; causal
        m_h    = (q0_h + k0_g(h)) / 2            the q-k mean
        q = qc + m,  k_g = kc_g + mean of m over the heads of g
        v      = [x Wv1, x_prev Wv2]             half of the channels come from the token before
        q ← √D q / ‖q‖,  k ← τ_g √D k / ‖k‖      then rotary positions on the first part of each head
        y      = Wo [softmax(q_h k_gᵀ / √D) v_g]_h

    x (B, N, C) to (B, N, C), causal, exact. The cache holds 2·G·D numbers per token. The halves of v are split over all
    channels, not inside each head: with G = 2, head 0 is the current token and head 1 the one before.

    Args:
        dim: C.
        num_heads, num_kv_heads, head_dim: H, G and D; D defaults to C / (2 H), a compression of two.
        kernel_sizes: t0 and t1.
        qk_mean, value_shift: the paper's ablations, on by default.
        rope_theta: base of the rotary angles; None leaves positions out.
        rope_fraction: share of each head that is rotated.
        window_size: see only the last so many tokens; None for all.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal-self"})
    cost: ClassVar[str] = "O(N² H D), a factor of H D / C of multi-head attention"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kernel_sizes: tuple[int, int] = (2, 2),
        qk_mean: bool = True,
        value_shift: bool = True,
        rope_theta: float | None = None,
        rope_fraction: float = 0.5,
        window_size: int | None = None,
    ):
        super().__init__()
        half = max(1, dim // (2 * num_heads)) if num_heads > 0 else None
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim or half, num_kv_heads)
        if len(kernel_sizes) != 2 or min(kernel_sizes) < 1:
            raise ArgumentError(f"kernel_sizes: expected two numbers of at least 1, got {kernel_sizes}")
        self.dim, self.num_heads, self.causal = dim, num_heads, True
        self.rope_theta, self.window_size = rope_theta, window_size
        self.rotary_dim = int(check_rate("rope_fraction", rope_fraction) * self.head_dim) // 2 * 2
        self.qk_mean, self.value_shift = qk_mean, value_shift
        self.reach = sum(kernel_sizes) - 2
        width, kv_width = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if kv_width % 2:
            raise ArgumentError(f"head_dim: num_kv_heads x head_dim must be even, got {kv_width}")
        channels, heads = width + kv_width, num_heads + self.num_kv_heads
        self.q_proj = nn.Linear(dim, width, bias=False)
        self.k_proj = nn.Linear(dim, kv_width, bias=False)
        self.v_proj_current, self.v_proj_delayed = (nn.Linear(dim, kv_width // 2, bias=False) for _ in range(2))
        self.conv_depthwise = nn.Conv1d(channels, channels, kernel_sizes[0], groups=channels)
        self.conv_grouped = nn.Conv1d(channels, channels, kernel_sizes[1], groups=heads)
        self.temperature = nn.Parameter(torch.ones(self.num_kv_heads))
        self.o_proj = nn.Linear(width, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `Mechanism.forward`; ``angles``, cos and sin (..., N, rotary dim), replace those of positions 0..N-1."""
        self._check(x, context, valid, dim=self.dim)
        return self._attend(x, None, valid, angles)[0]

    def stream(
        self, x: Tensor, state: CCAState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, CCAState]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        return self._attend(x, state, valid, None)

    def _attend(
        self, x: Tensor, state: CCAState | None, valid: Tensor | None, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, CCAState]:
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        q, k, v, latent, delayed = self.compress(x, state)
        q, k = self.normalize(q, k)
        past = 0 if state is None else state.kv.key.shape[2]
        if angles is None:
            q, k = (rotate_tokens(t, self.rope_theta, past, self.rotary_dim) for t in (q, k))
        else:
            q, k = rotate(q, *angles), rotate(k, *angles)
        kv = KV.append(None if state is None else state.kv, k, v, valid)
        mask = visible(x.shape[1], True, kv.valid, past, self.window_size)
        out = attention(q, kv.key, kv.value, mask=mask)
        return self.o_proj(merge_heads(out)), CCAState(kv, latent, delayed)

    def compress(self, x: Tensor, state: CCAState | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q (B, H, N, D), k and v (B, G, N, D) before normalisation; then the parts of the next state."""
        q0, k0 = self.q_proj(x), self.k_proj(x)
        u = torch.cat([q0, k0], dim=-1)
        before = u.new_zeros(u.shape[0], self.reach, u.shape[2]) if state is None else state.latent
        padded = torch.cat([before, u], dim=1)
        mixed = self.conv_grouped(self.conv_depthwise(padded.mT)).mT
        q, k = mixed.split((q0.shape[-1], k0.shape[-1]), dim=-1)
        q, k = split_heads(q, self.num_heads), split_heads(k, self.num_kv_heads)
        if self.qk_mean:
            groups = self.num_heads // self.num_kv_heads
            q0, k0 = split_heads(q0, self.num_heads), split_heads(k0, self.num_kv_heads)
            mean = (q0 + k0.repeat_interleave(groups, dim=1)) / 2
            q, k = q + mean, k + mean.unflatten(1, (self.num_kv_heads, groups)).mean(2)
        late = self.v_proj_delayed(x)
        delayed = late[:, -1:]
        if self.value_shift:
            first = torch.zeros_like(delayed) if state is None else state.delayed
            late = torch.cat([first, late[:, :-1]], dim=1)
        v = split_heads(torch.cat([self.v_proj_current(x), late], dim=-1), self.num_kv_heads)
        return q, k, v, padded[:, padded.shape[1] - self.reach :], delayed

    def normalize(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of length √D, keys of length τ √D."""
        eps, length = torch.finfo(q.dtype).eps, self.head_dim**0.5
        q, k = (length * F.normalize(t, dim=-1, eps=eps) for t in (q, k))
        return q, k * self.temperature[:, None, None].to(k.dtype)

    @classmethod
    def from_compression(
        cls, dim: int, mha_heads: int, query_factor: int, kv_factor: int, **config: Any
    ) -> "CompressedConvAttention":
        """From a multi-head attention of ``mha_heads`` heads: queries and keys compressed by so much."""
        head_dim, _ = per_head(dim, mha_heads)
        for name, factor in (("query_factor", query_factor), ("kv_factor", kv_factor)):
            if factor < 1 or mha_heads % factor:
                raise ArgumentError(f"{name}: {factor} does not divide {mha_heads} heads")
        return cls(dim, mha_heads // query_factor, mha_heads // kv_factor, head_dim, **config)

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "CompressedConvAttention":
        """``ZayaAttention`` of transformers; its rotary angles are an input there, so give ``angles`` to `forward`."""
        module = cls(
            dim=official_kwargs["hidden_size"],
            num_heads=official_kwargs["num_attention_heads"],
            num_kv_heads=official_kwargs["num_key_value_heads"],
            head_dim=official_kwargs["head_dim"],
            kernel_sizes=(official_kwargs["cca_time0"], official_kwargs["cca_time1"]),
        )
        names = {f"qkv_proj.{name}": name for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")}
        names |= {f"qkv_proj.conv_qk_{kind}": f"conv_{kind}" for kind in ("depthwise", "grouped")}
        load_strictly(module, state_dict, {**names, "qk_norm.temp": "temperature"})
        return module
