"""A transformer for token sequences whose mixers are named, the same or another one in every layer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from regard.errors import ArgumentError, ShapeError, Unsupported
from regard.layers import MLP, SwiGLU
from regard.mechanisms import Mechanism
from regard.mechanisms.registry import create_mixer

NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
MLPS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "gelu": MLP}
POSITIONS = ("rotary", "learned", "none")

Mixer = str | tuple[str, Mapping[str, Any]] | Sequence[Any]


class LanguageState(NamedTuple):
    """What a decoder carries from token to token.

    Attributes:
        layers: one streaming state per layer, see `Mechanism.stream`.
        length: tokens seen, padding included.
    """

    layers: tuple[Any, ...]
    length: int


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, mixer: Mechanism, dim: int, norm: type[nn.Module], mlp: type[nn.Module], hidden_dim: int | None):
        super().__init__()
        self.norm1, self.mixer = norm(dim), mixer
        self.norm2, self.mlp = norm(dim), mlp(dim, hidden_dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x + self.mixer(self.norm1(x), valid=valid)
        return x + self.mlp(self.norm2(x))

    def stream(self, x: Tensor, state: Any, valid: Tensor | None = None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.stream(self.norm1(x), state, valid=valid)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), state


class LanguageModel(nn.Module, PyTorchModelHubMixin):
    """A pre-norm transformer over token ids, causal (a decoder) or not (an encoder).

        model = LanguageModel(256, dim=128, depth=4, mixers=["softmax", "lightning-attention"])
        logits = model(ids)                                   # (B, N) to (B, N, 256)

    Args:
        vocab_size: token ids are 0 .. vocab_size - 1.
        dim: width C.
        depth: number of layers.
        mixers: the mechanism of every layer by its name in the catalogue or "softmax", or a list of them that is
            repeated until all layers have one. With arguments: ``("softmax", {"window_size": 64})``.
        num_heads, num_kv_heads, head_dim: for the mixers that have such arguments.
        mlp: "swiglu" (arXiv:2002.05202) or "gelu".
        hidden_dim: width of the feed-forward layers; by default as many parameters as a ratio of 4.
        norm: "rms" or "layer".
        positions: "rotary" (in the mixers that know it), "learned" (added to the embeddings) or "none".
        rope_theta: base of the rotary angles.
        max_length: longest sequence; needed for learned positions.
        tie_embeddings: the output shares the embedding's weights.
        causal: decoder or encoder.
        num_classes: classify the sequence instead of predicting tokens: the mean over its real tokens, then a linear
            layer.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 4,
        mixers: Mixer = "softmax",
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mlp: str = "swiglu",
        hidden_dim: int | None = None,
        norm: str = "rms",
        positions: str = "rotary",
        rope_theta: float = 10_000.0,
        max_length: int | None = None,
        tie_embeddings: bool = True,
        causal: bool = True,
        num_classes: int | None = None,
    ):
        super().__init__()
        for name, value, known in (("norm", norm, NORMS), ("mlp", mlp, MLPS), ("positions", positions, POSITIONS)):
            if value not in known:
                raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if positions == "learned" and max_length is None:
            raise ArgumentError("max_length: learned positions need one")
        self.vocab_size, self.max_length, self.causal = vocab_size, max_length, causal
        offered = {
            "dim": dim,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "rope_theta": rope_theta if positions == "rotary" else None,
            "max_length": max_length,
            "num_layers": depth,
        }
        offered = {name: value for name, value in offered.items() if value is not None or name == "rope_theta"}
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(max_length or 0, dim) if positions == "learned" else None
        stack = _stack(mixers, depth)
        self.mixers = [name for name, _ in stack]
        self.blocks = nn.ModuleList(
            Block(
                create_mixer(name, causal=causal, defaults={**offered, "layer_idx": layer}, **config),
                dim,
                NORMS[norm],
                MLPS[mlp],
                hidden_dim,
            )
            for layer, (name, config) in enumerate(stack)
        )
        self.norm = NORMS[norm](dim)
        self.head = nn.Linear(dim, vocab_size if num_classes is None else num_classes, bias=num_classes is not None)
        self.classifies = num_classes is not None
        nn.init.normal_(self.embedding.weight, std=0.02)
        if tie_embeddings and not self.classifies:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits of the next token at every position, or of the classes.

        Args:
            ids: (B, N) int64.
            valid: (B, N) bool, False marks padding.

        Returns:
            (B, N, vocab_size), or (B, num_classes).
        """
        x = self._embed(ids, 0)
        for block in self.blocks:
            x = block(x, valid)
        x = self.norm(x)
        return self.head(_mean(x, valid) if self.classifies else x)

    def stream(
        self, ids: Tensor, state: LanguageState | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, LanguageState]:
        """Logits of the next n tokens (B, n) of sequences, and the state to continue from; any n ≥ 1.

        Raises:
            Unsupported: an encoder, or a mixer that cannot stream.
        """
        if not self.causal or self.classifies:
            raise Unsupported("only a decoder (causal=True, num_classes=None) streams")
        length = 0 if state is None else state.length
        x = self._embed(ids, length)
        states = []
        for block, before in zip(self.blocks, state.layers if state else [None] * len(self.blocks), strict=True):
            x, after = cast(Block, block).stream(x, before, valid)
            states.append(after)
        return self.head(self.norm(x)), LanguageState(tuple(states), length + ids.shape[1])

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue sequences: greedy at temperature 0, sampled otherwise.

        Args:
            ids: (B, N) prompts; shorter ones are padded on the left, with ``valid`` (B, N) False there.
            max_new_tokens: how many to add.
            temperature: of the sampling.
            top_k: sample among the k likeliest tokens only.
            generator: makes sampling repeatable.

        Returns:
            (B, N + max_new_tokens).
        """
        if temperature < 0:
            raise ArgumentError(f"temperature: expected 0 or more, got {temperature}")
        logits, state = self.stream(ids, None, valid)
        for step in range(max_new_tokens):
            new = _sample(logits[:, -1], temperature, top_k, generator)
            ids = torch.cat([ids, new], 1)
            if step + 1 < max_new_tokens:
                logits, state = self.stream(new, state)
        return ids

    def _embed(self, ids: Tensor, past: int) -> Tensor:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"ids: expected integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        if self.max_length is not None and past + ids.shape[1] > self.max_length:
            raise ArgumentError(f"ids: {past + ids.shape[1]} tokens are more than max_length = {self.max_length}")
        x = self.embedding(ids)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(past, past + ids.shape[1], device=ids.device))
        return x


def _stack(mixers: Mixer, depth: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Name and arguments of every layer's mixer."""
    one = isinstance(mixers, str) or (len(mixers) == 2 and isinstance(mixers[1], Mapping))
    listed: list[Any] = [mixers] if one else list(mixers)
    if not listed or depth % len(listed):
        raise ArgumentError(f"mixers: {len(listed)} of them do not divide the {depth} layers")
    stack: list[tuple[str, Mapping[str, Any]]] = [(m, {}) if isinstance(m, str) else (m[0], m[1]) for m in listed]
    return stack * (depth // len(listed))


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return x.mean(1)
    weights = valid.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
