"""Doge: a language model of dynamic mask attention (arXiv:2508.02124)."""

import math
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import SwiGLU, load_strictly
from regard.mechanisms.sparse.dynamic_mask import DynamicMaskAttention, Kept, official_arguments
from regard.models.language.model import LanguageState


class RetrievalExperts(nn.Module):
    """A shared SwiGLU and the k best of K² experts of one neuron each, found by product keys.

        g = [g1, g2] = W x in R^2K,   score(a, b) = g1_a + g2_b
        y = SwiGLU(x) + Σ_{e in top k} softmax(score)_e SiLU(d_e·x) u_e

    Args:
        dim, hidden_dim, bias: of the SwiGLU.
        num_experts: of which ⌊√·⌋² can be found.
        top_k: experts per token.
        mixed: read all first halves g1 and then all g2 out of one list of the batch's logits, as published; a token's
            experts then depend on other tokens, later ones too. For parity only.
    """

    def __init__(
        self, dim: int, hidden_dim: int, num_experts: int, top_k: int, bias: bool = False, mixed: bool = False
    ):
        super().__init__()
        self.num_keys, self.top_k, self.mixed = math.isqrt(max(num_experts, 0)), top_k, mixed
        if not 1 <= top_k <= self.num_keys**2:
            raise ArgumentError(f"top_k: expected 1 to {self.num_keys**2} (⌊√num_experts⌋²), got {top_k}")
        self.shared = SwiGLU(dim, hidden_dim, bias)
        self.router_gate = nn.Linear(dim, 2 * self.num_keys, bias=False)
        self.down_embed, self.up_embed = nn.Embedding(num_experts, dim), nn.Embedding(num_experts, dim)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router_gate(x)
        first, second = logits.view(2, *x.shape[:2], -1) if self.mixed else logits.chunk(2, -1)
        scores = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)
        scores, experts = scores.topk(self.top_k, dim=-1)
        inner = F.silu(torch.einsum("bnkc,bnc->bnk", self.down_embed(experts), x)) * scores.softmax(-1)
        return self.shared(x) + torch.einsum("bnk,bnkc->bnc", inner, self.up_embed(experts))


class DogeBlock(nn.Module):
    """``x = a ∘ x + attention(norm(x))``, then ``x = b ∘ x + mlp(norm(x))``, with learned a, b in R^C."""

    def __init__(self, attention: DynamicMaskAttention, mlp: nn.Module, norm_eps: float):
        super().__init__()
        dim = attention.dim
        self.norm1, self.mixer, self.residual1 = nn.RMSNorm(dim, norm_eps), attention, nn.Parameter(torch.ones(dim))
        self.norm2, self.mlp, self.residual2 = nn.RMSNorm(dim, norm_eps), mlp, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.residual1 * x + self.mixer(self.norm1(x), valid=valid)
        return self.residual2 * x + self.mlp(self.norm2(x))

    def stream(self, x: Tensor, state: Kept | None, valid: Tensor | None = None) -> tuple[Tensor, Kept]:
        mixed, state = self.mixer.stream(self.norm1(x), state, valid=valid)
        x = self.residual1 * x + mixed
        return self.residual2 * x + self.mlp(self.norm2(x)), state


class Doge(nn.Module, PyTorchModelHubMixin):
    """Token ids (B, N) to logits (B, N, vocab_size).

    Args:
        vocab_size, dim, depth, hidden_dim: sizes.
        num_heads, num_kv_heads, head_dim, window_size, bias, bias_form, ties, rope_theta: see `DynamicMaskAttention`.
        mlp_bias: of the feed-forward layers.
        norm_eps: of all norms.
        num_experts, top_k: feed-forward layers are `RetrievalExperts`; None for a SwiGLU.
        mixed_routing: see `RetrievalExperts`.
        tie_embeddings: the output shares the embedding's weights.
    """

    def __init__(
        self,
        vocab_size: int = 32_768,
        dim: int = 1024,
        depth: int = 32,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden_dim: int = 2048,
        window_size: int = 2048,
        bias: bool = False,
        bias_form: str = "exp",
        ties: str = "later",
        rope_theta: float | None = 10_000.0,
        norm_eps: float = 1e-6,
        mlp_bias: bool = False,
        num_experts: int | None = None,
        top_k: int = 64,
        mixed_routing: bool = False,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        self.mixed_routing = mixed_routing and num_experts is not None

        def mlp() -> nn.Module:
            if num_experts is None:
                return SwiGLU(dim, hidden_dim, mlp_bias)
            return RetrievalExperts(dim, hidden_dim, num_experts, top_k, mlp_bias, mixed_routing)

        def mixer() -> DynamicMaskAttention:
            return DynamicMaskAttention(
                dim, num_heads, num_kv_heads, head_dim, window_size, bias, True, bias_form, ties, rope_theta, norm_eps
            )

        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(DogeBlock(mixer(), mlp(), norm_eps) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        if tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self._embed(ids)
        for block in self.blocks:
            x = block(x, valid)
        return self.head(self.norm(x))

    def stream(
        self, ids: Tensor, state: LanguageState | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, LanguageState]:
        """Logits of the next n tokens (B, n), and the state to continue from.

        Raises:
            Unsupported: experts that depend on later tokens (``mixed_routing``).
        """
        if self.mixed_routing:
            raise Unsupported("mixed_routing: experts depend on later tokens; build the model with mixed_routing=False")
        x, states = self._embed(ids), []
        for block, before in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            assert isinstance(block, DogeBlock)
            x, after = block.stream(x, before, valid)
            states.append(after)
        length = 0 if state is None else state.length
        return self.head(self.norm(x)), LanguageState(tuple(states), length + ids.shape[1])

    def _embed(self, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"ids: expected integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        return self.embedding(ids)

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], **official_kwargs: Any) -> "Doge":
        """``DogeForCausalLM`` of transformers, from the arguments of ``DogeConfig``; besides them, ``ties``."""
        if (act := official_kwargs.get("hidden_act", "silu")) != "silu":
            raise Unsupported(f"hidden_act: only silu is known, got {act!r}")
        experts = official_kwargs.get("num_experts", 16_384) if official_kwargs.get("is_moe") else None
        depth, tied = official_kwargs.get("num_hidden_layers", 32), official_kwargs.get("tie_word_embeddings", False)
        model = cls(
            vocab_size=official_kwargs.get("vocab_size", 32_768),
            depth=depth,
            hidden_dim=official_kwargs.get("intermediate_size", 2048),
            mlp_bias=official_kwargs.get("mlp_bias", False),
            num_experts=experts,
            top_k=official_kwargs.get("num_experts_per_tok", 64),
            mixed_routing=experts is not None,
            tie_embeddings=tied,
            **official_arguments(official_kwargs),
        )
        state = dict(state_dict)
        if tied:
            state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        names = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "head"}
        for layer in range(depth):
            old, new = f"model.layers.{layer}", f"blocks.{layer}"
            names |= {
                f"{old}.self_attn": f"{new}.mixer",
                f"{old}.mlp": f"{new}.mlp",
                f"{old}.input_layernorm": f"{new}.norm1",
                f"{old}.post_attention_layernorm": f"{new}.norm2",
                f"{old}.input_residual": f"{new}.residual1",
                f"{old}.post_attention_residual": f"{new}.residual2",
            }
            if experts is not None:
                names |= {f"{old}.mlp.{part}_proj": f"{new}.mlp.shared.{part}_proj" for part in ("gate", "up", "down")}
        load_strictly(model, state, names)
        return model
