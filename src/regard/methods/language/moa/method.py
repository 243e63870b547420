"""MoA on pretrained models: every key-value head with a span of its own, in the prompt and while generating."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard import masks
from regard.cache import SpanLayer, TrackedLayer
from regard.errors import ArgumentError, Unsupported
from regard.masks import Mask
from regard.methods.language.moa.plan import MoAPlan
from regard.methods.language.moa.spans import span_mask
from regard.methods.language.policy import CachePolicy
from regard.sites import Call, Site


@dataclass(kw_only=True)
class MoA(CachePolicy):
    """Let each key-value head see, and hold, the first tokens and as many recent ones as its own rule says.

    The rule is ``span(N) = alpha + beta · N``; N is the prompt (the tokens that come with the empty cache) and
    `max_new`. Query heads that share a key-value head share its span. The prompt is read under a mask; later tokens see
    what one forward over the whole text would let them see, of what is held. What has been dropped is forgotten, and a
    text that outgrows N keeps its spans.

    Held is the sum of the spans, without gaps between heads; while a layer attends, its keys and values exist in
    another form, every head as wide as the widest. A prompt is first taken in whole, one layer at a time. Windows are
    exact to the token; the published kernels widen them to blocks in the prompt.

    Batches with padding are refused, as are masks that are more than causal; the published code supports neither. A
    layer that slides a window of its own is left alone.

    Args:
        plan: the rules, or the path of a JSON file of them, see `MoAPlan`; by default one rule for all heads.
        density: without a plan, the share of N that every head holds: the window of StreamingLLM at the positions of
            the text.
        max_new: tokens expected after the prompt (1024 in the published code).
        length: N itself, in place of the prompt and `max_new`; for prompts that come in pieces.
        block_size: without a plan, tokens of the sink, and what spans are rounded up to.
    """

    name: ClassVar[str] = "moa"
    plan: MoAPlan | str | Path | None = None
    density: float = 0.5
    max_new: int = 0
    length: int | None = None
    block_size: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.plan, MoAPlan | str | Path | None):
            raise ArgumentError(f"plan must be a MoAPlan or the path of one, got {type(self.plan).__name__}")
        if not 0 < self.density <= 1:
            raise ArgumentError(f"density must be above 0 and at most 1, got {self.density}")
        if self.max_new < 0:
            raise ArgumentError(f"max_new must be at least 0, got {self.max_new}")
        if self.block_size < 1:
            raise ArgumentError(f"block_size must be at least 1, got {self.block_size}")
        if self.length is not None and self.length < 1:
            raise ArgumentError(f"length must be at least 1, got {self.length}")

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        super().prepare(model, sites)
        layers, heads = 1 + max(site.index for site in sites), _kv_heads(sites[0])
        plan = MoAPlan.from_json(self.plan) if isinstance(self.plan, str | Path) else self.plan
        if plan is None:
            plan = MoAPlan.uniform(layers, heads, beta=self.density, block_size=self.block_size)
        if plan.shape != (layers, heads):
            raise ArgumentError(
                f"plan has {plan.shape[0]} layers of {plan.shape[1]} heads, expected {layers} layers of {heads} "
                "key-value heads"
            )
        self._rules = plan

    def new_layers(self, sites: list[Site]) -> list[TrackedLayer]:
        return [SpanLayer() for _ in sites]

    def qkv(self, call: Call) -> None:
        # not at stage `mask`: that is for masks that count keys by position, and here some may have been dropped
        if call.step.valid is not None:
            raise Unsupported(f"{self.name} reads batches without padding only")
        if call.bias is not None or call.mask != masks.causal().shift(call.past):
            raise Unsupported(f"{self.name} works under a plain causal mask, {call.site.name} has {call.mask!r}")
        layer = call.layer if isinstance(call.layer, SpanLayer) else None
        if layer is not None and layer.spans is not None:
            spans, sinks = layer.spans, layer.sinks
        else:
            spans, sinks = self._spans(call)
            if layer is not None:
                layer.set_spans(spans, sinks)
        if layer is None or layer.counts is None:
            mask = span_mask(spans, sinks, call.key.shape[2], call.num_groups)
            call.mask = mask.shift(call.past) if call.past else mask
        else:
            call.mask = _seen(call, layer, spans, sinks)

    def after(self, call: Call) -> None:
        if isinstance(call.layer, SpanLayer):
            call.layer.evict(call.query.shape[2])

    def _spans(self, call: Call) -> tuple[list[int], list[int]]:
        """The spans of a layer's heads and their sinks, for a text that begins with this call."""
        where = (id(self), "spans")
        if where not in call.step.memo:
            length = (call.key.shape[2], self.max_new) if self.length is None else (self.length, 0)
            call.step.memo[where] = self._rules.spans(*length).tolist(), self._rules.sinks(*length).tolist()
        spans, sinks = call.step.memo[where]
        return spans[call.site.index], sinks[call.site.index]


def _seen(call: Call, layer: SpanLayer, spans: list[int], sinks: list[int]) -> Mask:
    """The slots each new token sees, in a layer that has dropped some."""
    n = call.query.shape[2]
    place = layer.places(n)[:, None]
    query = torch.arange(layer.seen - n, layer.seen, device=place.device)[:, None]
    span, sink = (torch.tensor(x, device=place.device)[:, None, None] for x in (spans, sinks))
    seen: Tensor = (place >= 0) & (place <= query) & ((place < sink) | (query - place < span - sink))
    seen = seen.repeat_interleave(call.num_groups, dim=0)
    return masks.padding(seen.transpose(0, 1)) if n == 1 else masks.from_dense(seen)


def _kv_heads(site: Site) -> int:
    config: Any = site.module.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
