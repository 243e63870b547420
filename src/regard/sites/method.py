"""What a method is: a dataclass that overrides the stages of an attention site it wants to act at."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from regard.masks import Mask

if TYPE_CHECKING:
    from regard.sites.call import Call
    from regard.sites.site import Kind, Site


@dataclass(kw_only=True)
class Method:
    """Something done to a pretrained model's attention at run time.

    Subclasses are dataclasses whose fields are the method's parameters and which override some of the stages below.
    A stage that is not overridden costs nothing; only overriding `scores` or `weights` makes the weights exist.

    | stage | sees | may do |
    |---|---|---|
    | `hidden` | hidden states entering the attention module (B, N, C) | return others |
    | `qkv` | the `Call`: rotated query (B, H, N, D), key and value (B, Hk, M, ·) | change them in place of the call |
    | `mask` | the `Call` | return a `Mask` that is intersected with the model's own |
    | `attend` | the `Call` | replace the attention computation, return (B, H, N, Dv) |
    | `scores` | scaled logits (B, H, N, M) before masking | return others |
    | `weights` | normalised weights (B, H, N, M) | return others |
    | `heads` | head outputs (B, H, N, Dv) before the output projection | return others |
    | `after` | the finished `Call`, with `out` and (if `needs_lse`) `lse` | observe, prune the cache layer |
    | `output` | the attention module's output (B, N, C) | return others |
    | `cache` | transformers cache layers, one per layer | replace some |
    | `logits` | the model's logits | return others |

    Args:
        layers: indices of the sites to act on, which are the layers where each has one; all by default.
    """

    name: ClassVar[str] = "method"
    #: which attention it is meant for; on a model that has none of these it is refused
    kinds: ClassVar[frozenset["Kind"]] = frozenset({"decoder"})
    #: `after` reads `call.lse`
    needs_lse: ClassVar[bool] = False
    layers: Sequence[int] | None = field(default=None)

    def prepare(self, model: nn.Module, sites: "list[Site]") -> None:
        """Called once on entering `regard.apply`, before any hook is installed: check the fit, set up state.

        Args:
            sites: those of the method's kinds.
        """

    def acts_on(self, site: "Site") -> bool:
        """Whether this method does anything at `site`."""
        return site.kind in self.kinds and (self.layers is None or site.index in self.layers)

    def hidden(self, site: "Site", hidden_states: Tensor) -> Tensor:
        raise NotImplementedError

    def qkv(self, call: "Call") -> None:
        raise NotImplementedError

    def mask(self, call: "Call") -> Mask | None:
        raise NotImplementedError

    def attend(self, call: "Call") -> Tensor:
        raise NotImplementedError

    def scores(self, call: "Call", scores: Tensor) -> Tensor:
        raise NotImplementedError

    def weights(self, call: "Call", weights: Tensor) -> Tensor:
        raise NotImplementedError

    def heads(self, call: "Call", out: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, call: "Call") -> None:
        raise NotImplementedError

    def output(self, site: "Site", hidden_states: Tensor) -> Tensor:
        raise NotImplementedError

    def cache(self, layers: list[Any], sites: "list[Site]") -> list[Any]:
        raise NotImplementedError

    def logits(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def overrides(self, stage: str) -> bool:
        """Whether this method acts at the named stage."""
        return getattr(type(self), stage) is not getattr(Method, stage)

    def __str__(self) -> str:
        """``name(field=value, ...)`` with the fields that differ from their defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init and getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name
