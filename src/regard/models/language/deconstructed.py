"""Language models in which some layers' attention gives up a principle (arXiv:2510.11602)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.linear.deconstructed import DecoupledQKAttention
from regard.models.language.model import Block, LanguageModel

_SLUG = "deconstructing-attention"

#: what replaces attention, as a mixer of `LanguageModel`
VARIANTS: dict[str, str] = {
    "standard": "softmax",
    "mlp": f"{_SLUG}/mlp",
    "approximate": _SLUG,
    "non-approximate": f"{_SLUG}/key-gated",
    "random-qk": f"{_SLUG}/decoupled",
    "fixed-qk": f"{_SLUG}/decoupled",
    "static-qk": f"{_SLUG}/decoupled",
}

#: which layers (from 1, of L) keep standard attention
PLACEMENTS: dict[str, Callable[[int, int], bool]] = {
    "uniform": lambda layer, depth: False,
    "even": lambda layer, depth: layer % 2 == 0,
    "odd": lambda layer, depth: layer % 2 == 1,
    "top": lambda layer, depth: layer <= depth // 2,
    "middle": lambda layer, depth: depth // 4 < layer <= depth - depth // 4,
    "bottom": lambda layer, depth: layer > depth // 2,
    "quarter": lambda layer, depth: layer % 4 == 0,
    "first": lambda layer, depth: layer == 1,
    "last": lambda layer, depth: layer == depth,
    "bilateral": lambda layer, depth: layer in (1, depth),
}


class DeconstructedLM(nn.Module, PyTorchModelHubMixin):
    """A `LanguageModel` with a variant of attention in all or some layers; ids (B, N) to logits (B, N, vocab_size).

    "random-qk" and "fixed-qk" run a second stream through the same layers, from constant noise or from one constant
    token sequence; its hidden states give queries and keys to the variant's layers, so attention there is the same for
    every input. "static-qk" takes queries and keys from the token embeddings in every layer.

    What the paper leaves open: noise has the embeddings' std 0.02, the second stream passes the same norms, rotary
    positions act wherever queries meet keys, and "top", "middle" and "bottom" are halves of the layers, from the input.

    Args:
        vocab_size, dim, depth, num_heads: of the model.
        variant: see `VARIANTS`.
        placement: which layers keep standard attention, see `PLACEMENTS`.
        max_length: longest input; of the constant stream.
        fixed_ids: (max_length,) token ids for "fixed-qk".
        seed: of the noise.
        config: further arguments of `LanguageModel`.
    """

    stream_start: Tensor
    fixed_ids: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 6,
        num_heads: int = 4,
        variant: str = "approximate",
        placement: str = "uniform",
        max_length: int = 1024,
        fixed_ids: list[int] | None = None,
        seed: int = 0,
        **config: Any,
    ):
        super().__init__()
        for name, value, known in (("variant", variant, VARIANTS), ("placement", placement, PLACEMENTS)):
            if value not in known:
                raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if (variant == "fixed-qk") != (fixed_ids is not None) or (fixed_ids and len(fixed_ids) < max_length):
            raise ArgumentError(f"fixed_ids: needed by 'fixed-qk' alone, at least {max_length} ids")
        self.variant, self.max_length = variant, max_length
        keeps = PLACEMENTS[placement]
        mixers: list[Any] = ["softmax" if keeps(i, depth) else VARIANTS[variant] for i in range(1, depth + 1)]
        self.model = LanguageModel(vocab_size, dim, depth, mixers, num_heads, **config)
        if variant == "random-qk":
            noise = torch.randn(1, max_length, dim, generator=torch.Generator().manual_seed(seed)) * 0.02
            self.register_buffer("stream_start", noise)
        if fixed_ids is not None:
            self.register_buffer("fixed_ids", torch.tensor(fixed_ids[:max_length]))

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        if ids.dim() != 2 or ids.shape[1] > self.max_length:
            raise ShapeError(f"ids: expected (B, at most {self.max_length}), got {tuple(ids.shape)}")
        x = self.model.embedding(ids)
        second = self._second(x, ids.shape[1])
        for block in self.model.blocks:
            assert isinstance(block, Block)
            if isinstance(block.mixer, DecoupledQKAttention):
                assert second is not None
                x = x + block.mixer(block.norm1(x), valid=valid, source=block.norm1(second))
                x = x + block.mlp(block.norm2(x))
            else:
                x = block(x, valid)
            if self.variant in ("random-qk", "fixed-qk") and second is not None:
                second = block(second)
        return self.model.head(self.model.norm(x))

    def _second(self, x: Tensor, length: int) -> Tensor | None:
        if self.variant == "random-qk":
            return self.stream_start[:, :length].to(x.dtype)
        if self.variant == "fixed-qk":
            return self.model.embedding(self.fixed_ids[None, :length])
        return x if self.variant == "static-qk" else None


def skip_variant_layers(model: DeconstructedLM) -> DeconstructedLM:
    """A copy that has only the layers with standard attention: what a hybrid is without its variant."""
    smaller = copy.deepcopy(model)
    kept = [
        block for block, mixer in zip(smaller.model.blocks, smaller.model.mixers, strict=True) if mixer == "softmax"
    ]
    smaller.model.blocks = nn.ModuleList(kept)
    smaller.model.mixers = ["softmax"] * len(kept)
    return smaller
