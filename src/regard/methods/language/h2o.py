"""H2O (arXiv:2306.14048): keep the keys that received the most attention so far, and the most recent ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from regard.attention import received
from regard.cache import HeavyHitterLayer, TrackedLayer
from regard.errors import ArgumentError, Unsupported
from regard.methods.language.policy import CachePolicy, check_budget, rotate_to_slots
from regard.sites import Call, Site


@dataclass(kw_only=True)
class H2O(CachePolicy):
    """Hold, per key-value head, the heavy hitters and the most recent tokens.

    The score of a key is the attention it has received in all, summed over the query heads that share it. Scores come
    from column sums over the log-sum-exp; the matrix of weights never exists. The prompt attends fully before anything
    is dropped.

    Args:
        budget: hold this share of the prompt, half of it heavy hitters, half recent tokens (the paper's setting is
            0.2); 1 drops nothing. The prompt is what has come up to the last forward of several tokens.
        hh_size, recent_size: hold these numbers of tokens in place of a share; both or neither.
        positions: "absolute" leaves keys at their positions in the text; "slot" counts inside the cache, as
            StreamingLLM does, for texts longer than the model can read.
        normalise: judge a key by what it received per query, not in total; total scores favour old tokens.
    """

    name: ClassVar[str] = "h2o"
    needs_lse: ClassVar[bool] = True
    budget: float = 0.25
    hh_size: int | None = None
    recent_size: int | None = None
    positions: Literal["absolute", "slot"] = "absolute"
    normalise: bool = False

    def __post_init__(self) -> None:
        if (self.hh_size is None) != (self.recent_size is None):
            raise ArgumentError(
                f"hh_size and recent_size go together, got hh_size={self.hh_size}, recent_size={self.recent_size}"
            )
        for argument, least in (("hh_size", 0), ("recent_size", 1)):
            value = getattr(self, argument)
            if value is not None and value < least:
                raise ArgumentError(f"{argument} must be at least {least}, got {value}")
        if self.positions not in ("absolute", "slot"):
            raise ArgumentError(f"positions must be 'absolute' or 'slot', got {self.positions!r}")
        check_budget(self.budget)

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        super().prepare(model, sites)
        for site in sites:
            if self.positions == "slot" and self.acts_on(site):
                site.need_rotary(f"{self.name}(positions='slot')")

    def new_layers(self, sites: list[Site]) -> list[TrackedLayer]:
        hh_size, recent_size = self.hh_size or 0, self.recent_size or 1
        return [HeavyHitterLayer(hh_size, recent_size, self.normalise, self.positions == "slot") for _ in sites]

    def qkv(self, call: Call) -> None:
        if isinstance(call.layer, HeavyHitterLayer) and self.positions == "slot":
            rotate_to_slots(call)

    def after(self, call: Call) -> None:
        layer = call.layer
        if not isinstance(layer, HeavyHitterLayer) or (self.hh_size is None and self.budget == 1):
            return
        if self.hh_size is None and (call.is_prefill or layer.seen == 1):
            total = max(1, int(self.budget * layer.seen))
            layer.hh_size, layer.recent_size = total // 2, total - total // 2
        layer.observe(_received(call), call.query.shape[2])
        layer.evict()


def _received(call: Call) -> Tensor:
    """Attention received by each key from the call's real queries: (B, Hk, M)."""
    if call.weights is not None:
        per_head = call.weights.detach()
        if call.step.valid is not None:
            per_head = per_head * call.step.valid[:, None, :, None]
        per_head = per_head.sum(2)
    elif call.lse is not None:
        lse = call.lse.detach()
        if call.step.valid is not None:  # exp(s - inf) = 0
            lse = lse.masked_fill(~call.step.valid[:, None], float("inf"))
        per_head = received(
            call.query.detach(), call.key.detach(), lse, mask=call.mask, bias=call.bias, scale=call.scale
        )
    else:
        raise Unsupported("h2o scores keys by the attention they receive, which the method that replaces it hides")
    return per_head.unflatten(1, (-1, call.num_groups)).sum(2)
