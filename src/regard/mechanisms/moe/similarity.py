"""Expert choices averaged over related tokens: similar ones, or those the block's attention looked at."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError, ShapeError
from regard.layers import SwiGLU
from regard.layers.moe import Routing, SparseMoE
from regard.masks import Mask
from regard.mechanisms.base import KV, Mechanism, Pattern, legitimate, seen, visible


class _Router(nn.Module):
    """What each token would choose by itself, ``r(u) = softmax(u W_r + b_r)``."""

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ArgumentError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")
        self.top_k = top_k
        self.gate = nn.Linear(dim, num_experts)

    def votes(self, u: Tensor) -> Tensor:
        """r(u), (B, N, E)."""
        return self.gate(u).softmax(-1)

    def choose(self, probs: Tensor, u: Tensor, valid: Tensor | None) -> Routing:
        return Routing.choose(probs, self.gate(u), self.top_k, True, valid)


class SimilarityAwareRouter(_Router):
    """Routing by a graph of similar tokens (arXiv:2505.00792).

        P(e|i) = Σ_j S_ij r_e(u_j),    S = softmax_j(u_i W_s u_jᵀ / (τ √C)),    w_e = P(e|i) / Σ_{e' in top-k} P(e'|i)

    u (B, N, C) to a `Routing`. S is attention whose values are the votes r(u_j), so nothing of size N×N is stored.
    ``W_s`` starts as the identity. Written from the paper's abstract; the equations are this project's reading.

    Args:
        dim, num_experts, top_k: C, E, k.
        temperature: τ.
        rank: W_s = A Bᵀ with A, B (C, rank); None for a full matrix.
        causal: only earlier tokens and the token itself have a say.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        temperature: float = 1.0,
        rank: int | None = None,
        causal: bool = False,
    ):
        super().__init__(dim, num_experts, top_k)
        if temperature <= 0:
            raise ArgumentError(f"temperature: expected more than 0, got {temperature}")
        if rank is not None and rank < 1:
            raise ArgumentError(f"rank: expected at least 1 or None, got {rank}")
        self.causal, self.scale = causal, dim**-0.5 / temperature
        self.query = nn.Linear(dim, dim if rank is None else rank, bias=False)
        self.key = nn.Identity() if rank is None else nn.Linear(dim, rank, bias=False)
        if rank is None:
            nn.init.eye_(self.query.weight)
        else:  # A = B with E[A Bᵀ] = 1
            nn.init.normal_(self.query.weight, std=rank**-0.5)
            self.key.load_state_dict(self.query.state_dict())

    def forward(self, u: Tensor, *, valid: Tensor | None = None) -> Routing:
        return self.stream(u, valid=valid)[0]

    def stream(self, u: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Routing, KV]:
        """The routing of the next tokens; the state holds what similarities and votes need of those before."""
        past = seen(state)
        state = KV.append(state, self.key(u).unsqueeze(1), self.votes(u).unsqueeze(1), valid)
        mask = visible(u.shape[1], self.causal, state.valid, past)
        probs = attention(self.query(u).unsqueeze(1), state.key, state.value, mask=mask, scale=self.scale)
        return self.choose(probs.squeeze(1), u, valid), state


class AttentionAwareRouter(_Router):
    """Routing by what the block's own attention saw (arXiv:2505.00792).

        P(e|i) = Σ_h π_h Σ_j A_hij r_e(u_j)

    With ``posterior``, A_hij is replaced by the probability that head h and token j produced u_i,

        Ā_hij ∝ π_h A_hij exp(-|u_i - m_hj|² / 2σ²),     m_hj = Wo_h v_hj,     Σ_hj Ā_hij = 1.

    A is never stored: it is attention again with the same queries and keys, and votes as values. The posterior is
    attention too, with queries [q √D⁻¹, u/σ², 1] and keys [k, m, -|m|²/2σ²], its heads weighted by their evidence.
    Written from the paper's abstract; the equations are this project's reading.

    Args:
        dim, num_experts, top_k: C, E, k.
        num_heads: of the attention; needed for a learned mix.
        head_mix: π, "mean" or "learned".
        posterior: see above.
        sigma: σ.
        detach_attention: the router's gradient does not change the attention.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        num_heads: int | None = None,
        head_mix: Literal["mean", "learned"] = "mean",
        posterior: bool = False,
        sigma: float = 1.0,
        detach_attention: bool = False,
    ):
        super().__init__(dim, num_experts, top_k)
        if head_mix not in ("mean", "learned"):
            raise ArgumentError(f"head_mix: expected mean or learned, got {head_mix!r}")
        if head_mix == "learned" and num_heads is None:
            raise ArgumentError("num_heads: a learned head_mix needs it")
        if sigma <= 0:
            raise ArgumentError(f"sigma: expected more than 0, got {sigma}")
        self.posterior, self.sigma, self.detach_attention = posterior, sigma, detach_attention
        self.head_logits = nn.Parameter(torch.zeros(num_heads or 0)) if head_mix == "learned" else None

    def forward(
        self,
        u: Tensor,
        query: Tensor,
        key: Tensor,
        messages: Tensor | None = None,
        *,
        votes: Tensor | None = None,
        mask: Mask | None = None,
        valid: Tensor | None = None,
    ) -> Routing:
        """The routing.

        Args:
            u: (B, N, C), what the experts get.
            query, key: (B, H, N, D) and (B, Hk, M, D) of the attention, rotated.
            messages: (B, H, M, C), the m of the posterior.
            votes: (B, M, E) of the keys' tokens; u's own by default.
            mask: of the attention.
            valid: (B, N) bool, for the losses; what may be seen is the mask's business.
        """
        if self.posterior and (messages is None or messages.shape[1] != query.shape[1]):
            got = None if messages is None else tuple(messages.shape)
            raise ShapeError(f"messages: the posterior needs (B, {query.shape[1]}, M, C), got {got}")
        if self.head_logits is not None and len(self.head_logits) != query.shape[1]:
            raise ShapeError(f"query: expected {len(self.head_logits)} heads, got {query.shape[1]}")
        if self.detach_attention:
            query, key, messages = query.detach(), key.detach(), None if messages is None else messages.detach()
        heads = query.shape[1]
        prior = u.new_zeros(heads) if self.head_logits is None else self.head_logits
        value = (self.votes(u) if votes is None else votes).unsqueeze(1).expand(-1, key.shape[1], -1, -1)
        mixed = attention(query, key, value, mask=mask, return_lse=True)
        weights = prior.softmax(0)[:, None].expand(mixed.lse.shape)
        if messages is not None and self.posterior:
            s = self.sigma**-2
            query = query * query.shape[-1] ** -0.5
            shared = (u * s).unsqueeze(1).expand(-1, heads, -1, -1)
            query = torch.cat([query, shared, torch.ones_like(query[..., :1])], -1)
            repeated = key.repeat_interleave(heads // key.shape[1], 1)
            key = torch.cat([repeated, messages, messages.square().sum(-1, keepdim=True) * (-s / 2)], -1)
            value = value[:, :1].expand(-1, heads, -1, -1)
            evidence, mixed = mixed.lse, attention(query, key, value, mask=mask, scale=1.0, return_lse=True)
            unseen = evidence == -torch.inf  # padding without any key
            weights = (torch.where(unseen, 0.0, mixed.lse - evidence) + prior[:, None]).softmax(1)
        probs = (mixed.out * weights.unsqueeze(-1).to(mixed.out.dtype)).sum(1)
        return self.choose(probs, u, valid)


class SimilarityAwareMoE(Mechanism):
    """A mixture of experts whose routing mixes tokens (arXiv:2505.00792): `SimilarityAwareRouter`, SwiGLU experts.

        y_i = Σ_{e in top-k of P(.|i)} w_e g_e(u_i),      P(e|i) = Σ_j softmax_j(u_i W_s u_jᵀ / (τ √C)) r_e(u_j)

    u (B, N, C) to y (B, N, C). It takes the place of a feed-forward layer, after attention and norm; with N = 1 it is
    the usual mixture of experts. Experts run on their tokens only. Cost O(N² (C + E) + N C²): experts O(k N C²).

    Args:
        dim: C.
        num_experts, top_k: E, k.
        hidden_dim: inner width of an expert.
        temperature: τ.
        rank: of W_s, None for a full matrix.
        causal: only earlier tokens and the token itself have a say.
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal-self"})
    cost: ClassVar[str] = "O(N² (C + E) + k N C²)"
    state: ClassVar = "growing"

    def __init__(
        self,
        dim: int,
        num_experts: int = 4,
        top_k: int = 2,
        hidden_dim: int | None = None,
        temperature: float = 1.0,
        rank: int | None = None,
        causal: bool = True,
    ):
        super().__init__()
        self.dim, self.causal = dim, legitimate(self, causal)
        router = SimilarityAwareRouter(dim, num_experts, top_k, temperature, rank, causal)
        self.moe = SparseMoE(router, [SwiGLU(dim, hidden_dim) for _ in range(num_experts)])

    def forward(self, x: Tensor, context: Tensor | None = None, *, valid: Tensor | None = None) -> Tensor:
        self._check(x, context, valid, dim=self.dim)
        return self.moe(x, valid=valid)

    def stream(self, x: Tensor, state: KV | None = None, *, valid: Tensor | None = None) -> tuple[Tensor, KV]:
        self._check(x, valid=valid, dim=self.dim, streaming=True)
        assert isinstance(self.moe.router, SimilarityAwareRouter)
        routing, state = self.moe.router.stream(x, state, valid=valid)
        return self.moe.mix(x, routing), state
