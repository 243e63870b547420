"""StreamingLLM (arXiv:2309.17453): endless generation from the first tokens and a window, at positions of the cache."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from regard.cache import SinkLayer, TrackedLayer
from regard.errors import ArgumentError
from regard.methods.language.policy import CachePolicy, check_budget, rotate_to_slots
from regard.sites import Call, Site


@dataclass(kw_only=True)
class StreamingLLM(CachePolicy):
    """Hold the first `start_size` and the last `recent_size` tokens, at rotary positions counted inside the cache.

    Memory and time per token are constant, and no position beyond the cache's size is ever used, so the text may be
    longer than the model can read. A prompt attends fully before anything is dropped, as in the published code; its
    peak is that of the dense model, one layer at a time. What has been dropped is forgotten.

    Needs a model with rotary embedding. Keys are cached before rotation, which is undone on the model's rotated keys at
    the cost of one more rounding.

    Args:
        start_size: first tokens that stay, the attention sinks.
        recent_size: last tokens that stay.
        budget: hold this share of the prompt in all, sinks included, in place of `recent_size`; 1 drops nothing. The
            prompt is what has come up to the last forward of several tokens.
    """

    name: ClassVar[str] = "streaming-llm"
    start_size: int = 4
    recent_size: int = 508
    budget: float | None = None

    def __post_init__(self) -> None:
        for argument, least in (("start_size", 0), ("recent_size", 1)):
            if getattr(self, argument) < least:
                raise ArgumentError(f"{argument} must be at least {least}, got {getattr(self, argument)}")
        check_budget(self.budget)

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        super().prepare(model, sites)
        for site in sites:
            if self.acts_on(site):
                site.need_rotary(self.name)

    def new_layers(self, sites: list[Site]) -> list[TrackedLayer]:
        return [SinkLayer(self.start_size, self.recent_size) for _ in sites]

    def qkv(self, call: Call) -> None:
        if isinstance(call.layer, SinkLayer):
            rotate_to_slots(call)

    def after(self, call: Call) -> None:
        layer = call.layer
        if not isinstance(layer, SinkLayer) or self.budget == 1:
            return
        if self.budget is not None and (call.is_prefill or layer.seen == 1):
            layer.recent_size = max(1, int(self.budget * layer.seen) - self.start_size)
        layer.evict()
