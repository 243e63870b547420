"""Transformers with a mixture of experts in every block, routed token by token or by a graph of tokens."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from regard.attention import attention
from regard.errors import ArgumentError
from regard.layers import SwiGLU, merge_heads
from regard.layers.moe import SparseMoE, TopKRouter
from regard.mechanisms import SoftmaxAttention
from regard.mechanisms.base import KV, seen, visible
from regard.mechanisms.moe.similarity import AttentionAwareRouter, SimilarityAwareRouter
from regard.models.language.model import LanguageModel

ROUTINGS = ("token", "similarity", "attention", "posterior")


class RoutedState(NamedTuple):
    """What a block carries along: keys and values, and the router's keys and votes (only votes if attention routes)."""

    kv: KV
    router: Any


class RoutedBlock(nn.Module):
    """``x + mixer(norm(x))``, then ``x + moe(norm(x))``; an `AttentionAwareRouter` learns what the mixer saw."""

    def __init__(self, dim: int, mixer: SoftmaxAttention, moe: SparseMoE):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.mixer, self.moe = mixer, moe

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self._run(x, None, valid)[0]

    def stream(self, x: Tensor, state: RoutedState | None, valid: Tensor | None = None) -> tuple[Tensor, RoutedState]:
        return self._run(x, state, valid)

    def _run(self, x: Tensor, state: RoutedState | None, valid: Tensor | None) -> tuple[Tensor, RoutedState]:
        before, votes = (None, None) if state is None else state
        past, h, mixer, router = seen(before), self.norm1(x), self.mixer, self.moe.router
        q, k, v = mixer.qkv(h, h, past)
        kv = KV.append(before, k, v, valid)
        mask = visible(x.shape[1], mixer.causal, kv.valid, past)
        x = x + mixer.o_proj(merge_heads(attention(q, kv.key, kv.value, mask=mask)))
        u = self.norm2(x)
        if isinstance(router, SimilarityAwareRouter):
            routing, votes = router.stream(u, votes, valid=valid)
        elif isinstance(router, AttentionAwareRouter):
            votes = router.votes(u) if votes is None else torch.cat([votes, router.votes(u)], 1)
            messages = self._messages(kv.value) if router.posterior else None
            routing = router(u, q, kv.key, messages, votes=votes, mask=mask, valid=valid)
        else:
            routing = router(u, valid=valid)
        return x + self.moe.mix(u, routing), RoutedState(kv, votes)

    def _messages(self, value: Tensor) -> Tensor:
        """(B, H, M, C): what each head would write if it attended to one token only."""
        heads = self.mixer.num_heads
        value = value.repeat_interleave(heads // value.shape[1], 1)
        return value @ self.mixer.o_proj.weight.T.unflatten(0, (heads, -1))


class MoELanguageModel(LanguageModel):
    """A transformer over token ids with experts in every block; ids (B, N) to logits. Streams and generates if causal.

    Add ``regard.layers.moe.router_losses(model)`` to the loss.

    Args:
        vocab_size, dim, depth, num_heads, num_kv_heads, head_dim: sizes.
        routing: "token" (the usual one), "similarity" or "attention" (arXiv:2505.00792), or "posterior", the latter's
            other form.
        num_experts, top_k: of each block; weights of the chosen add up to 1.
        hidden_dim: inner width of each expert.
        temperature, rank: of "similarity", see `SimilarityAwareRouter`.
        head_mix, sigma, detach_attention: of "attention" and "posterior", see `AttentionAwareRouter`.
        rope_theta: base of the rotary angles; None for no positions.
        tie_embeddings: the output shares the embedding's weights.
        causal: decoder or encoder.
        num_classes: classify the sequence instead of predicting tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        routing: Literal["token", "similarity", "attention", "posterior"] = "similarity",
        num_experts: int = 4,
        top_k: int = 2,
        hidden_dim: int | None = None,
        temperature: float = 1.0,
        rank: int | None = None,
        head_mix: Literal["mean", "learned"] = "mean",
        sigma: float = 1.0,
        detach_attention: bool = False,
        rope_theta: float | None = 10_000.0,
        tie_embeddings: bool = True,
        causal: bool = True,
        num_classes: int | None = None,
    ):
        if routing not in ROUTINGS:
            raise ArgumentError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
        super().__init__(
            vocab_size, dim, depth=0, tie_embeddings=tie_embeddings, causal=causal, num_classes=num_classes
        )

        def block() -> RoutedBlock:
            router: nn.Module
            if routing == "token":
                router = TopKRouter(dim, num_experts, top_k, normalise_top_k=True, bias=True)
            elif routing == "similarity":
                router = SimilarityAwareRouter(dim, num_experts, top_k, temperature, rank, causal)
            else:
                posterior = routing == "posterior"
                router = AttentionAwareRouter(
                    dim, num_experts, top_k, num_heads, head_mix, posterior, sigma, detach_attention
                )
            mixer = SoftmaxAttention(dim, num_heads, num_kv_heads, head_dim, rope_theta=rope_theta, causal=causal)
            return RoutedBlock(dim, mixer, SparseMoE(router, [SwiGLU(dim, hidden_dim) for _ in range(num_experts)]))

        self.blocks = nn.ModuleList(block() for _ in range(depth))
