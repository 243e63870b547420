"""LongHeads on pretrained models: the method and its cache layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import masks
from regard.cache import TrackedLayer
from regard.errors import Unsupported
from regard.methods.language.longheads.attention import LongHeadsConfig, chunk_features, longheads_attention
from regard.positions import unrotate
from regard.sites import Call, Method, Rotary, Site


class ChunkedLayer(TrackedLayer):
    """All keys as they were before rotation, all values, and the chunk keys LongHeads chooses by.

    Attributes:
        chunk_key: (B, H, floor(M / w), D), one per whole chunk.
        pending: (B, H, M mod w, D) raw queries of the unfinished chunk, from which its chunk key will be made.
    """

    def __init__(self, window_size: int) -> None:
        super().__init__(raw_keys=True)
        self.window_size = window_size
        self.chunk_key: Tensor | None = None
        self.pending: Tensor | None = None

    def absorb(self, query: Tensor, rotary: Rotary, scale: float) -> Tensor:
        """Take the raw queries of the newest tokens; returns the chunk keys of all chunks that are whole now."""
        assert self.keys is not None
        assert self.values is not None
        if self.pending is None or self.chunk_key is None:
            self.pending, self.chunk_key = query[:, :, :0], query[:, :, :0]
        pending = torch.cat((self.pending, query), dim=2)
        new = pending.shape[2] // self.window_size * self.window_size
        if new:
            start = self.chunk_key.shape[2] * self.window_size
            whole = slice(start, start + new)
            _, chunk_key = chunk_features(
                pending[:, :, :new], self.keys[:, :, whole], self.values[:, :, whole], rotary, self.window_size, scale
            )
            self.chunk_key = torch.cat((self.chunk_key, chunk_key), dim=2)
        self.pending = pending[:, :, new:].clone()  # a view would keep all queries alive
        return self.chunk_key

    def _map_batch(self, function: Any) -> None:
        super()._map_batch(function)
        if self.pending is not None and self.chunk_key is not None:
            self.pending, self.chunk_key = function(self.pending), function(self.chunk_key)

    def reset(self) -> None:
        super().reset()
        self.chunk_key = self.pending = None


@dataclass(kw_only=True)
class LongHeads(Method):
    """Let every head attend to a fixed number of chunks that it chooses itself, at positions the model knows.

    Extends a rotary model beyond its trained length without training, at linear cost: a query attends to at most
    `atten_length` keys. Texts no longer than `begin_selective_length` are untouched. Everything stays in the cache, the
    keys as they were before rotation, so memory is that of the dense model plus one chunk key per chunk and query head.

    Layers that slide a window of their own keep it. Padding is refused: chunks are counted from the first token.

    Args:
        window_size: tokens per chunk (the paper's runs use 256 at a trained length of 4096).
        atten_length: the most keys a query attends to; at most the model's trained length.
        begin_selective_length: position from which queries choose; `atten_length`, rounded down to whole chunks, by
            default.
        include_self: a query sees its own token, in prompts as in decoding, as the paper means it; then decoding
            continues exactly what one long forward gives. False is the published code, see `LongHeadsConfig`.
    """

    name: ClassVar[str] = "longheads"
    window_size: int = 64
    atten_length: int = 1024
    begin_selective_length: int | None = None
    include_self: bool = True

    def __post_init__(self) -> None:
        begin = self.begin_selective_length
        if begin is None:
            begin = self.atten_length // max(1, self.window_size) * self.window_size
        self.config = LongHeadsConfig(self.window_size, self.atten_length, begin, self.include_self)

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        acting = [site for site in sites if self.acts_on(site)]
        if not acting:
            raise Unsupported(
                f"{self.name} acts on layers with full context; this model has none among those asked for"
            )
        for site in acting:
            site.need_rotary(self.name)

    def acts_on(self, site: Site) -> bool:
        return super().acts_on(site) and site.window is None

    def cache(self, layers: list[Any], sites: list[Site]) -> list[Any]:
        for site in sites:
            if self.acts_on(site):
                layers[site.layer] = ChunkedLayer(self.window_size)
        return layers

    def attend(self, call: Call) -> Tensor:
        if call.step.valid is not None:
            raise Unsupported(f"{self.name} counts chunks from the first token and does not support padded batches")
        if call.bias is not None or call.mask != masks.causal().shift(call.past):
            raise Unsupported(f"{self.name} chooses keys itself and needs a plain causal mask, got {call.mask!r}")
        rotary = call.site.need_rotary(self.name)
        cos, sin = call.step.cos, call.step.sin
        assert cos is not None  # a site with a rotary embedding gets its angles
        assert sin is not None
        query = unrotate(call.query, cos, sin)
        if isinstance(call.layer, ChunkedLayer):
            key, chunk_key = call.key, call.layer.absorb(query, rotary, call.scale)
        else:
            key = unrotate(call.key, cos, sin)
            whole = slice(key.shape[2] // self.window_size * self.window_size)
            _, chunk_key = chunk_features(
                query[:, :, whole], key[:, :, whole], call.value[:, :, whole], rotary, self.window_size, call.scale
            )
        return longheads_attention(query, key, call.payload, chunk_key, rotary, self.config, call.scale)
