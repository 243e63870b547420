"""What heads with spans of their own see, as one mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard import masks
from regard.errors import ArgumentError
from regard.masks import Mask


@dataclass(frozen=True, repr=False)
class Spans(Mask):
    """Causal, and head h sees the keys ``k < sinks[h]`` and ``q - k < windows[h]``.

    It is `per_head` of ``sliding_window(windows[h], causal=True) | (causal() & sinks(sinks[h]))``, all heads at once.
    """

    windows: tuple[int, ...]
    sinks: tuple[int, ...]

    @property
    def heads(self) -> int:  # type: ignore[override]
        return len(self.windows)

    def __call__(self, b: Tensor | int, h: Tensor | int, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        window, sink = (torch.tensor(x, device=k_idx.device)[h] for x in (self.windows, self.sinks))
        gap = q_idx - k_idx
        return (gap >= 0) & ((gap < window) | (k_idx < sink))

    def rect(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        window, sink = (torch.tensor(x)[None, :, None] for x in (self.windows, self.sinks))
        some = (k0 < q1) & ((q0 - k1 + 1 < window) | (k0 < sink))
        # of the pairs, those of the last query and the first key beyond the sink are the farthest apart
        near = (q1 - 1 - k0.clamp(min=sink) < window) | (k1 <= sink)
        return some, (k1 - 1 <= q0) & near

    def __repr__(self) -> str:
        return f"spans(windows={list(self.windows)}, sinks={list(self.sinks)})"


def span_mask(spans: Sequence[int], sinks: Sequence[int], length: int, num_groups: int = 1) -> Mask:
    """Causal, and head h sees the first ``sinks[h]`` keys and the last ``spans[h] - sinks[h]``, its own included.

    Args:
        length: number of keys; a head whose span covers it is simply causal.
        num_groups: query heads in a row that share a span.
    """
    if len(spans) != len(sinks) or any(not 0 <= sink < span for span, sink in zip(spans, sinks, strict=True)):
        raise ArgumentError(f"spans must exceed their sinks, head by head, got {list(spans)} and {list(sinks)}")
    windows = [length if span >= length else span - sink for span, sink in zip(spans, sinks, strict=True)]
    if min(windows) >= length:
        return masks.causal()
    if len(set(zip(windows, sinks, strict=True))) == 1:
        return masks.sliding_window(windows[0], causal=True) | (masks.causal() & masks.sinks(sinks[0]))
    # a head that sees everything needs no sink of its own
    kept = [0 if window >= length else sink for window, sink in zip(windows, sinks, strict=True)]
    return Spans(*(tuple(value for value in values for _ in range(num_groups)) for values in (windows, kept)))
