"""ComplexFormer: queries and keys as complex numbers whose angles are weighed per head and frequency."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError
from regard.layers import load_strictly, merge_heads, per_head, split_heads
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible


class ComplexAttention(Mechanism):
    """Complex vector attention (ComplexFormer, arXiv:2505.10222).

        q_e = |q|_e exp(i φ_e) from channels e and e + D/2, likewise k
        s_mn = scale Σ_e |q|_me |k|_ne cos(δ_he (φq_me - φk_ne) + b_he + (m - n) g_e),     g_e = θ^(-2e/D)
        y = Wo [softmax(s) v]_h

    x (B, N, C) to (B, N, C). With δ = 1 and b = 0 this is rotary attention. The cosine of a difference is a dot product
    of size D, ``[|q| cos a, |q| sin a]·[|k| cos a', |k| sin a']`` with a = δ φq + b + m g and a' = δ φk + n g, so it
    runs on any softmax kernel; exact up to 1e-9 inside the magnitude, as published. Where δ is no integer the score
    jumps when a phase passes ±π.

    Args:
        dim, num_heads: C and H; head_dim C / H is even.
        rope_theta: base θ of the frequencies.
        scale: factor on the scores; the published code has none.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N² C)"
    state: ClassVar = "growing"
    frequencies: Tensor

    def __init__(
        self, dim: int, num_heads: int = 8, rope_theta: float | None = 10_000.0, scale: float = 1.0, causal: bool = True
    ):
        super().__init__()
        self.head_dim, _ = per_head(dim, num_heads)
        if self.head_dim % 2:
            raise ArgumentError(f"num_heads: complex numbers need an even head_dim, got {self.head_dim}")
        self.dim, self.num_heads, self.scale, self.causal = dim, num_heads, scale, legitimate(self, causal)
        half = self.head_dim // 2
        frequencies = torch.zeros(half)  # no rope_theta, no positions
        if rope_theta is not None:
            frequencies = rope_theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(proj.weight)
        self.delta = nn.Parameter(torch.randn(num_heads, half) * half**-0.5)
        self.phase_bias = nn.Parameter(torch.zeros(num_heads, half))

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        q, k, v = self.prepare(x)
        out = attention(q, k, v, mask=visible(x.shape[1], self.causal, valid), scale=self.scale)
        return self.o_proj(merge_heads(out))

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        q, k, v = self.prepare(x, past)
        state = KV.append(state, k, v, valid)
        mask = visible(x.shape[1], True, state.valid, past)
        return self.o_proj(merge_heads(attention(q, state.key, state.value, mask=mask, scale=self.scale))), state

    def prepare(self, x: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys whose plain dot products are the scores, and the values: (B, H, N, D) each."""
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        positions = torch.arange(past, past + x.shape[1], device=x.device)
        turn = positions[:, None] * self.frequencies.to(torch.promote_types(x.dtype, torch.float32))
        return as_vectors(q, self.delta, turn, self.phase_bias), as_vectors(k, self.delta, turn), v

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "ComplexAttention":
        """``ComplexMultiHeadAttentionV2``; its frequencies come with the weights."""
        module = cls(official_kwargs["d_model"], official_kwargs["num_heads"])
        frequencies = [state_dict.pop(name) for name in ("g", "relative_pos_encoding.g") if name in state_dict]
        if frequencies:
            module.frequencies = frequencies[0].float()
        names = {f"W_{name}": f"{name}_proj" for name in "qkvo"}
        load_strictly(module, state_dict, {**names, "delta_params": "delta", "bias_params": "phase_bias"})
        return module


def as_vectors(x: Tensor, delta: Tensor, turn: Tensor, bias: Tensor | None = None) -> Tensor:
    """``|x| [cos a, sin a]`` with ``a = δ φ + turn (+ bias)``.

    Args:
        x: (B, H, N, D), the first half of the channels real parts, the second imaginary.
        delta, bias: (H, D/2).
        turn: (N, D/2).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    real, imaginary = x.to(wide).chunk(2, dim=-1)
    magnitude = (real.square() + imaginary.square() + 1e-9).sqrt()
    nothing = (real == 0) & (imaginary == 0)  # has no phase; any will do, but its gradient must not be NaN
    phase = torch.atan2(imaginary, torch.where(nothing, 1.0, real))
    angle = delta[:, None].to(wide) * phase + turn
    if bias is not None:
        angle = angle + bias[:, None].to(wide)
    return torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1).to(x.dtype)
