"""MoA (arXiv:2406.14909): every head holds its own number of tokens, the first ones and the most recent ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard.cache.layer import Slots, TrackedLayer
from regard.errors import ArgumentError


class SpanLayer(TrackedLayer):
    """Keys (rotated) and values of the first ``sinks[h]`` and the last ``spans[h] - sinks[h]`` tokens of each head h.

    Between forwards the heads lie one after the other in one tensor (B, 1, Σ_h K_h, D) with K_h = min(seen, spans[h]),
    so what is held is the sum of the spans. `update` returns (B, Hk, max_h K_h + N, D) for the time of the attention:
    heads that hold fewer tokens are filled up before the new ones with anything, which `places` tells to be masked.

    Every row of a batch holds the same places in its text, so there must be no padding.

    Attributes:
        spans, sinks: tokens per key-value head; set before the first `evict`.
        counts: tokens held per head, in a layer that has dropped some; None in one that holds everything.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[int] | None = None
        self.sinks: list[int] = []
        self.counts: list[int] | None = None
        self._open = True  # as (B, Hk, K, D), not as (B, 1, Σ K_h, D)

    def set_spans(self, spans: Sequence[int], sinks: Sequence[int]) -> None:
        """Decide how much each head holds; once, for spans that grow later cannot bring back what was dropped."""
        if len(spans) != len(sinks) or any(not 0 <= sink < span for span, sink in zip(spans, sinks, strict=True)):
            raise ArgumentError(f"spans must exceed their sinks, head by head, got {list(spans)} and {list(sinks)}")
        if self.spans is None:
            self.spans, self.sinks = list(spans), list(sinks)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._open:
            self._unpack()
        return super().update(key_states, value_states, *args, **kwargs)

    def places(self, num_new: int) -> Tensor:
        """(Hk, K) place in the text of every slot that `update` returned with its new tokens; -1 for filling."""
        assert self.slots is not None
        device = self.slots.positions.device
        before = self.seen - num_new
        new = torch.arange(before, self.seen, device=device)
        if self.counts is None:
            return torch.arange(self.seen, device=device)[None]
        counts, sinks = (torch.tensor(x, device=device)[:, None] for x in (self.counts, self.sinks))
        slot = torch.arange(max(self.counts), device=device)
        held = torch.where(slot < sinks, slot, before - counts + slot).masked_fill(slot >= counts, -1)
        return torch.cat((held, new.expand(len(held), -1)), dim=1)

    def evict(self, num_new: int) -> None:
        """Shrink every head to its span, after the attention to `num_new` new tokens."""
        assert self.spans is not None
        assert self.slots is not None
        assert self.keys is not None
        assert self.values is not None
        place = self.places(num_new)
        spans, sinks = (torch.tensor(x, device=place.device)[:, None] for x in (self.spans, self.sinks))
        kept = (place >= 0) & ((place < sinks) | (place >= self.seen - spans + sinks))
        if self.counts is None and bool(kept.all()):
            return
        rows = kept.expand(len(self.spans), -1).flatten().nonzero()[:, 0]
        heads = self.keys.shape[1]
        self.keys, self.values = (x.flatten(1, 2)[:, None, rows] for x in (self.keys, self.values))
        positions = self.slots.positions.expand(-1, heads, -1).flatten(1)
        self.slots = Slots(positions[:, None, rows], None)
        self.counts, self._open = kept.sum(1).tolist(), False

    def _unpack(self) -> None:
        assert self.counts is not None
        assert self.slots is not None
        assert self.keys is not None
        assert self.values is not None
        device = self.keys.device
        counts = torch.tensor(self.counts, device=device)[:, None]
        slot = torch.arange(max(self.counts), device=device)
        table = torch.where(slot < counts, counts.cumsum(0) - counts + slot, 0)
        self.keys, self.values = self.keys[:, 0, table], self.values[:, 0, table]
        self.slots = Slots(self.slots.positions[:, 0, table], None)
        self._open = True

    def keep(self, index: Tensor) -> None:
        raise ArgumentError("a layer whose heads hold different numbers of tokens cannot keep equally many of each")

    def reset(self) -> None:
        super().reset()
        self.spans, self.sinks, self.counts, self._open = None, [], None, True
