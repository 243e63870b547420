"""BAM: a mixture of experts made of several dense language models (arXiv:2408.08274).

branch      copies of a seed model (`BAM(..., num_experts=1)`) are trained on one domain each
attend      their attention layers become experts, mixed softly
mix         their feed-forward layers become experts, one per token; everything else is averaged (`upcycle`)
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError
from regard.layers import SwiGLU
from regard.layers.moe import SparseMoE, TopKRouter, router_losses
from regard.mechanisms import Mechanism, SoftmaxAttention
from regard.mechanisms.moe.bam import SoftMixtureOfAttention
from regard.models.language.model import LanguageModel

__all__ = ["BAM", "ParallelMoEBlock", "router_losses", "upcycle"]

Attention = Literal["experts", "average"]


class ParallelMoEBlock(nn.Module):
    """``x + mixer(h) + mlp(h)`` with ``h = LN(x)``: attention and feed-forward layer read the same."""

    def __init__(self, dim: int, mixer: Mechanism, mlp: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim, bias=False)
        self.mixer, self.mlp = mixer, mlp

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        return x + self.mixer(h, valid=valid) + self._feed_forward(h, valid)

    def stream(self, x: Tensor, state: Any, valid: Tensor | None = None) -> tuple[Tensor, Any]:
        h = self.norm(x)
        mixed, state = self.mixer.stream(h, state, valid=valid)
        return x + mixed + self._feed_forward(h, valid), state

    def _feed_forward(self, h: Tensor, valid: Tensor | None) -> Tensor:
        return self.mlp(h, valid=valid) if isinstance(self.mlp, SparseMoE) else self.mlp(h)


class BAM(LanguageModel):
    """A decoder of parallel blocks; ids (B, N) to logits (B, N, vocab_size). Streams and generates.

    Train with ``loss + router_losses(model)``.

    Args:
        vocab_size, dim, depth, num_heads, num_kv_heads, head_dim: sizes.
        hidden_dim: inner width of each SwiGLU expert, 2 dim by default.
        num_experts: E; 1 is a dense model, without routers: the seed.
        top_k: feed-forward experts per token.
        normalise_top_k: their weights add up to 1; as published they do not.
        attention: "experts" is BAM; "average" has one attention layer per block, as Branch-Train-MiX
            (arXiv:2403.07816).
        share_kv: attention experts share keys and values.
        attention_top_k: of the attention experts, see `SoftMixtureOfAttention`; None is soft.
        rope_theta: base of the rotary angles; None for no positions.
        tie_embeddings: the output shares the embedding's weights.
        max_length: longest sequence, None for any.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "bam-small": {"vocab_size": 256_000, "dim": 1024, "depth": 6, "num_heads": 8, "num_experts": 4},
        "bam-large": {
            "vocab_size": 256_000,
            "dim": 2304,
            "depth": 18,
            "num_heads": 18,
            "num_kv_heads": 6,
            "hidden_dim": 9216,
            "num_experts": 4,
            "tie_embeddings": True,
        },
    }

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        num_experts: int = 4,
        top_k: int = 1,
        normalise_top_k: bool = False,
        attention: Attention = "experts",
        share_kv: bool = False,
        attention_top_k: int | None = None,
        rope_theta: float | None = 10_000.0,
        tie_embeddings: bool = False,
        max_length: int | None = None,
    ):
        if attention not in ("experts", "average"):
            raise ArgumentError(f"attention: expected experts or average, got {attention!r}")
        if attention == "average" and (share_kv or attention_top_k is not None):
            raise ArgumentError("share_kv, attention_top_k: are for attention='experts'")
        if depth < 1:
            raise ArgumentError(f"depth: expected at least 1, got {depth}")
        super().__init__(vocab_size, dim, depth=0, norm="layer", tie_embeddings=tie_embeddings, max_length=max_length)
        hidden = 2 * dim if hidden_dim is None else hidden_dim
        self.norm = nn.LayerNorm(dim, bias=False)
        self.num_experts = num_experts

        def block() -> ParallelMoEBlock:
            mixer: Mechanism
            if num_experts == 1 or attention == "average":
                mixer = SoftmaxAttention(dim, num_heads, num_kv_heads, head_dim, rope_theta=rope_theta)
            else:
                mixer = SoftMixtureOfAttention(
                    dim, num_heads, num_experts, num_kv_heads, head_dim, share_kv, attention_top_k, rope_theta
                )
            router = TopKRouter(dim, num_experts, top_k, normalise_top_k)
            experts = [SwiGLU(dim, hidden) for _ in range(num_experts)]
            return ParallelMoEBlock(dim, mixer, experts[0] if num_experts == 1 else SparseMoE(router, experts))

        self.blocks = nn.ModuleList(block() for _ in range(depth))


@torch.no_grad()
def upcycle(
    dense_models: Sequence[BAM],
    share_kv: bool = False,
    attention: Attention = "experts",
    *,
    top_k: int = 1,
    normalise_top_k: bool = False,
    attention_top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> BAM:
    """The mixture of dense models (`BAM` with ``num_experts=1``), usually the seed and its specialised copies.

    Attention and feed-forward layers become experts in the given order, norms and embeddings are averaged uniformly,
    routers are drawn from N(0, 0.02²). The other arguments are those of `BAM`.

    Raises:
        ArgumentError: fewer than two models, models of different sizes, or models that are mixtures already.
    """
    if len(dense_models) < 2 or any(not isinstance(m, BAM) or m.num_experts != 1 for m in dense_models):
        raise ArgumentError("dense_models: expected two or more BAM models with num_experts=1")
    states = [model.state_dict() for model in dense_models]
    shapes = [{name: t.shape for name, t in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ArgumentError("dense_models: expected models of the same sizes")
    if attention not in ("experts", "average"):
        raise ArgumentError(f"attention: expected experts or average, got {attention!r}")

    layers: list[Any] = list(zip(*(model.blocks for model in dense_models), strict=True))  # each layer in all models
    first, mixer = dense_models[0], layers[0][0].mixer
    mixture = BAM(
        first.vocab_size,
        first.embedding.embedding_dim,
        len(first.blocks),
        mixer.num_heads,
        mixer.num_kv_heads,
        mixer.head_dim,
        layers[0][0].mlp.gate_proj.out_features,
        len(dense_models),
        top_k,
        normalise_top_k,
        attention,
        share_kv,
        attention_top_k,
        mixer.rope_theta,
        first.head.weight is first.embedding.weight,
        first.max_length,
    ).to(first.embedding.weight)
    experts = (".mixer.", ".mlp.") if attention == "experts" else (".mlp.",)
    shared = [name for name in states[0] if not any(part in name for part in experts)]
    mixture.load_state_dict({n: torch.stack([state[n] for state in states]).mean(0) for n in shared}, strict=False)
    block: Any
    for block, dense in zip(mixture.blocks, layers, strict=True):
        if attention == "experts":
            mixers = [b.mixer for b in dense]
            block.mixer = SoftMixtureOfAttention.from_dense(mixers, share_kv, attention_top_k, generator)
        nn.init.normal_(block.mlp.router.gate.weight, std=0.02, generator=generator)
        for expert, b in zip(block.mlp.experts, dense, strict=True):
            expert.load_state_dict(b.mlp.state_dict())
    return mixture
