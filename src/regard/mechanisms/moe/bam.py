"""BAM's mixture of attention: experts that are whole attention layers, mixed softly per token."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError
from regard.layers import per_head, split_heads
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible
from regard.mechanisms.softmax import SoftmaxAttention
from regard.positions import rotate_tokens


class SoftMixtureOfAttention(Mechanism):
    """Soft mixture of attention experts of BAM (arXiv:2408.08274).

        y_i = Σ_e g_ie MHA_e(x)_i,      g_i = softmax(x_i W_a),      MHA_e(x)_i = Wo_e [softmax(q_eh k_ehᵀ / √D) v_eh]_h

    x (B, N, C) to (B, N, C). Exact, all E experts run on all tokens: the heads of all experts are one attention call,
    scaled by their expert's gate before one output projection. Cost O(E N² C); the cache holds E keys and values per
    head, with ``share_kv`` one.

    Args:
        dim, num_heads, num_kv_heads, head_dim: of each expert.
        num_experts: E.
        share_kv: all experts read the same keys and values.
        top_k: keep only so many of a token's gates, as they are, and zero the rest (the paper's ablation, worse than
            soft; saves nothing); None is soft.
        rope_theta: base of the rotary angles; None leaves positions out.
        causal: whether tokens see only earlier ones and themselves.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self", "cross"})
    cost: ClassVar[str] = "O(E N² C)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_experts: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        share_kv: bool = False,
        top_k: int | None = None,
        rope_theta: float | None = None,
        causal: bool = True,
    ):
        super().__init__()
        self.dim, self.causal = dim, legitimate(self, causal)
        self.head_dim, self.num_kv_heads = per_head(dim, num_heads, head_dim, num_kv_heads)
        if num_experts < 1:
            raise ArgumentError(f"num_experts: expected at least 1, got {num_experts}")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ArgumentError(f"top_k: expected 1 to {num_experts} (num_experts) or None, got {top_k}")
        self.num_heads, self.num_experts, self.share_kv, self.top_k = num_heads, num_experts, share_kv, top_k
        self.rope_theta = rope_theta
        inner, self.kv_heads = num_experts * num_heads * self.head_dim, self.num_kv_heads
        self.kv_heads *= 1 if share_kv else num_experts
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.q_proj = nn.Linear(dim, inner, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        k, v = self._kv(x if context is None else context)
        return self._mix(x, k, v, valid)

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        past = seen(state)
        state = KV.append(state, *self._kv(x, past), valid)
        return self._mix(x, state.key, state.value, state.valid, past), state

    def gates(self, x: Tensor) -> Tensor:
        """(B, N, E) weights of the experts."""
        g = self.router(x).softmax(-1)
        if self.top_k is None:
            return g
        kept = g.topk(self.top_k, dim=-1)
        return torch.zeros_like(g).scatter(-1, kept.indices, kept.values)

    def _kv(self, source: Tensor, past: int = 0) -> tuple[Tensor, Tensor]:
        k = split_heads(self.k_proj(source), self.kv_heads)
        return rotate_tokens(k, self.rope_theta, past), split_heads(self.v_proj(source), self.kv_heads)

    def _mix(self, x: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, past: int = 0) -> Tensor:
        # query heads that share a key head must stand together: g is the key head, r the query head in its group
        heads = "g e r" if self.share_kv else "e g r"
        sizes = {"e": self.num_experts, "g": self.num_kv_heads}
        q = rearrange(self.q_proj(x), f"b n (e g r d) -> b ({heads}) n d", d=self.head_dim, **sizes)
        mask = visible(x.shape[1], self.causal, valid, past)
        y = attention(rotate_tokens(q, self.rope_theta, past), k, v, mask=mask)
        y = rearrange(y, f"b ({heads}) n d -> b n e (g r d)", **sizes)
        return self.o_proj((y * self.gates(x).unsqueeze(-1)).flatten(2))

    @classmethod
    def from_dense(
        cls,
        layers: Sequence[SoftmaxAttention],
        share_kv: bool = False,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> "SoftMixtureOfAttention":
        """Experts that are given attention layers, behind a new random router; keys and values averaged if shared.

        Raises:
            ArgumentError: the layers differ in more than their weights, or have something that experts have not.
        """
        first = layers[0]
        shapes = [{name: p.shape for name, p in layer.state_dict().items()} for layer in layers]
        same = all(
            (a.num_heads, a.rope_theta, a.causal) == (first.num_heads, first.rope_theta, first.causal) for a in layers
        )
        if not same or any(shape != shapes[0] for shape in shapes):
            raise ArgumentError("layers: expected attention layers of one configuration")
        if len(shapes[0]) != 4 or any(layer.window_size is not None for layer in layers):
            raise ArgumentError("layers: expected layers without biases, qk_norm and window_size")
        module = cls(
            first.dim,
            first.num_heads,
            len(layers),
            first.num_kv_heads,
            first.head_dim,
            share_kv,
            top_k,
            first.rope_theta,
            first.causal,
        ).to(first.q_proj.weight)
        with torch.no_grad():
            nn.init.normal_(module.router.weight, std=0.02, generator=generator)
            module.q_proj.weight.copy_(torch.cat([a.q_proj.weight for a in layers]))
            module.o_proj.weight.copy_(torch.cat([a.o_proj.weight for a in layers], 1))
            for name in ("k_proj", "v_proj"):
                weights = [getattr(a, name).weight for a in layers]
                getattr(module, name).weight.copy_(torch.stack(weights).mean(0) if share_kv else torch.cat(weights))
        return module
