"""The cache layer policies build on: it knows which token each slot holds, and can drop slots.

transformers' `Cache` is a list of layers; a policy puts `TrackedLayer`s (or subclasses) in place of the layers that
hold the full context. `regard.apply` calls `begin` with the forward's positions, angles and padding before the model
calls `update`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.positions import unrotate

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicLayer
else:
    DynamicLayer = require("transformers", "cache keys and values of transformers models").cache_utils.DynamicLayer


@dataclass
class Slots:
    """What the key slots of a layer hold.

    Attributes:
        positions: (B, Hk or 1, K) token position of each slot, as the model counted it.
        valid: (B, Hk or 1, K) False where the slot holds padding, or None when none does.
    """

    positions: Tensor
    valid: Tensor | None

    def map(self, function: Any) -> "Slots":
        return Slots(function(self.positions), None if self.valid is None else function(self.valid))


class TrackedLayer(DynamicLayer):
    """A growing cache layer that tracks its slots and can drop some.

    Args:
        raw_keys: keep keys as they were before rotary embedding; `update` then returns raw keys too, and the policy
            rotates them (needs `regard.apply`, which knows the angles).
    """

    is_croppable = False

    def __init__(self, raw_keys: bool = False) -> None:
        super().__init__()
        self.raw_keys = raw_keys
        self.slots: Slots | None = None
        self.seen = 0
        self._step: Any = None

    def begin(self, step: Any) -> None:
        """Take the positions (B or 1, N), angles and padding of the tokens the next `update` brings."""
        self._step = step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys (B, Hk, N, D) and values (B, Hk, N, Dv); returns all that are kept, new ones last."""
        step, batch, n = self._step, key_states.shape[0], key_states.shape[2]
        if step is None:
            raise ArgumentError(f"{type(self).__name__} works inside `with regard.apply(model, ...)` only")
        if self.raw_keys:
            key_states = unrotate(key_states, step.cos, step.sin)
        new = Slots(
            step.positions.to(torch.int32).expand(batch, n)[:, None],
            None if step.valid is None else step.valid[:, None],
        )
        self.slots = new if self.slots is None else _append(self.slots, new)
        self.seen += n
        self._step = None
        return super().update(key_states, value_states)

    def keep(self, index: Tensor) -> None:
        """Keep only the slots `index` (B or 1, Hk or 1, K), in that order; the heads may keep different ones."""
        assert self.slots is not None
        assert self.keys is not None
        assert self.values is not None
        self.slots = self.slots.map(lambda x: _pick(x, index))
        rows = index.expand(*self.keys.shape[:2], -1)[..., None]
        self.keys = self.keys.gather(2, rows.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, rows.expand(-1, -1, -1, self.values.shape[-1]))

    @property
    def length(self) -> int:
        """Number of slots held."""
        return 0 if self.slots is None else self.slots.positions.shape[-1]

    def get_seq_length(self) -> int:
        """Tokens seen so far, kept or not: what the model counts positions from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if nothing had been dropped: the model makes one mask for all its layers, and the others hold everything.

        `regard.apply` makes the mask of a layer that dropped keys from its slots.
        """
        return self.seen + query_length, 0

    # --- batch bookkeeping (beam search, sampling several sequences) ---------------------------------------------

    def _map_batch(self, function: Any) -> None:
        """Apply `function` to every tensor this layer holds, all of which have the batch first."""
        if self.slots is not None:
            self.slots = self.slots.map(function)
            self.keys, self.values = function(self.keys), function(self.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda x: x[indices])

    def reset(self) -> None:
        super().reset()
        self.slots, self.seen, self._step = None, 0, None

    def crop(self, tokens_to_remove: int) -> None:
        raise ArgumentError(f"{type(self).__name__} drops tokens as it goes and cannot be rolled back by crop()")


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x (B, Hk or 1, M) at index (B or 1, Hk or 1, K), heads broadcast against each other."""
    heads = max(x.shape[1], index.shape[1])
    return x.expand(-1, heads, -1).gather(-1, index.expand(x.shape[0], heads, -1))


def _append(old: Slots, new: Slots) -> Slots:
    """Slots of old followed by new, the new ones the same for all heads."""

    def cat(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b.expand(-1, a.shape[1], -1)), dim=-1)

    if old.valid is None and new.valid is None:
        valid = None
    else:
        valid = cat(
            *(torch.ones_like(s.positions, dtype=torch.bool) if s.valid is None else s.valid for s in (old, new))
        )
    return Slots(cat(old.positions, new.positions), valid)
