"""What the cache policies have in common."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.cache import Slots, TrackedLayer
from regard.errors import ArgumentError, Unsupported
from regard.positions import rotate, unrotate
from regard.sites import Call, Method, Site


@dataclass(kw_only=True)
class CachePolicy(Method):
    """A method that brings its own cache layers for the model's layers with full context.

    Layers of the model that slide a window of their own keep it, and their own cache layers.
    """

    def acts_on(self, site: Site) -> bool:
        return super().acts_on(site) and site.window is None

    def prepare(self, model: nn.Module, sites: list[Site]) -> None:
        if not any(self.acts_on(site) for site in sites):
            raise Unsupported(
                f"{self.name} acts on layers with full context; this model has none among those asked for"
            )

    def cache(self, layers: list[Any], sites: list[Site]) -> list[Any]:
        from transformers.cache_utils import DynamicLayer

        acting = [site for site in sites if self.acts_on(site)]
        for site in acting:
            if type(layers[site.layer]) is not DynamicLayer:
                raise Unsupported(
                    f"{self.name} replaces growing cache layers, but {site.name} has a "
                    f"{type(layers[site.layer]).__name__}"
                )
        for site, layer in zip(acting, self.new_layers(acting), strict=True):
            layers[site.layer] = layer
        return layers

    def new_layers(self, sites: list[Site]) -> list[TrackedLayer]:
        """Empty cache layers for the sites the policy acts on."""
        raise NotImplementedError


def check_budget(budget: float | None) -> None:
    """Refuse a share of the prompt that is none."""
    if budget is not None and not 0 < budget <= 1:
        raise ArgumentError(f"budget must be a share of the prompt, above 0 and at most 1, got {budget}")


def slot_positions(slots: Slots) -> Tensor:
    """Positions counted inside the cache, over real tokens: (B or 1, Hk or 1, K)."""
    if slots.valid is None:
        return torch.arange(slots.positions.shape[-1], device=slots.positions.device)[None, None]
    return (slots.valid.cumsum(-1) - 1).clamp_min(0)


def rotate_keys(call: Call, positions: Tensor, *, same_everywhere: bool) -> tuple[Tensor, Tensor]:
    """Rotate the call's raw keys to `positions` (B or 1, Hk or 1, M); returns the angles, for the queries.

    Args:
        same_everywhere: all sites the method acts on have these positions in this forward, so that the angles need
            computing only once.
    """
    rotary = call.site.need_rotary("a cache of keys before rotation")
    memo = call.step.memo if same_everywhere else {}
    place = (rotary.layer_type, positions.shape)
    if place not in memo:
        memo[place] = rotary.angles(positions, call.key)
    call.key = rotate(call.key, *memo[place])
    return memo[place]


def rotate_to_slots(call: Call) -> None:
    """Give the call's queries and raw keys the rotation of their slots in place of that of their place in the text."""
    layer, step = call.layer, call.step
    assert step.cos is not None
    assert step.sin is not None
    per_head = layer.slots.valid is not None and layer.slots.valid.shape[1] > 1
    cos, sin = rotate_keys(call, slot_positions(layer.slots), same_everywhere=not per_head)
    n = call.query.shape[2]
    cos, sin = cos[:, :, -n:], sin[:, :, -n:]
    if cos.shape[1] > 1:
        cos, sin = (x.repeat_interleave(call.num_groups, dim=1) for x in (cos, sin))
    call.query = rotate(unrotate(call.query, step.cos, step.sin), cos, sin)
