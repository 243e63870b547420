"""StreamingLLM (arXiv:2309.17453): keep the first tokens, the attention sinks, and the most recent ones.

The three ways of making room, as the slots that stay of K held (S = start_size, R = recent_size):

    evict               K > S + R:      [0, S) and [K - R, K)
    evict_for_space(n)  K + n > S + R:  [0, S) and [K - R + n, K)
    evict_range(a, b)                   [0, a) and [b, K)
"""

import torch
from torch import Tensor

from regard.cache.layer import TrackedLayer
from regard.errors import ArgumentError


def evict(length: int, start_size: int, recent_size: int) -> Tensor:
    """The slots that stay after a forward, in order."""
    return _ends(length, start_size, length - recent_size)


def evict_for_space(length: int, num_coming: int, start_size: int, recent_size: int) -> Tensor:
    """The slots that stay so that `num_coming` more tokens fit into `start_size + recent_size`, in order."""
    if length + num_coming <= start_size + recent_size:
        return torch.arange(length)
    return _ends(length, start_size, length - recent_size + num_coming)


def evict_range(length: int, start: int, end: int) -> Tensor:
    """The slots that stay when [start, end) goes."""
    if not 0 <= start <= end <= length:
        raise ArgumentError(f"expected 0 <= start <= end <= {length} (the slots held), got start={start}, end={end}")
    return _ends(length, start, end)


def _ends(length: int, start: int, end: int) -> Tensor:
    """[0, start) and [end, length), or everything where the two meet."""
    if end <= start:
        return torch.arange(length)
    return torch.cat((torch.arange(min(start, length)), torch.arange(min(end, length), length)))


class SinkLayer(TrackedLayer):
    """Keys before rotation and values of the first `start_size` and the last `recent_size` tokens.

    Every head holds the same tokens. In a padded batch each row keeps its own first and last real tokens, and padding
    only as long as there is room for it.
    """

    def __init__(self, start_size: int, recent_size: int) -> None:
        super().__init__(raw_keys=True)
        self.start_size, self.recent_size = start_size, recent_size

    def evict(self) -> None:
        """Shrink to `start_size + recent_size` slots."""
        if self.length > self.start_size + self.recent_size:
            self.keep(self._kept(evict(self.length, self.start_size, self.recent_size)))

    def evict_for_space(self, num_coming: int) -> None:
        """Make room for `num_coming` tokens before they come, so that the limit holds with them."""
        kept = evict_for_space(self.length, num_coming, self.start_size, self.recent_size)
        if len(kept) < self.length:
            self.keep(self._kept(kept))

    def evict_range(self, start: int, end: int) -> None:
        """Drop the slots [start, end)."""
        kept = evict_range(self.length, start, end)
        assert self.keys is not None
        self.keep(kept.to(self.keys.device)[None, None])

    def _kept(self, kept: Tensor) -> Tensor:
        """`kept`, the slots of a row without padding, as slots of each row (B or 1, 1, len(kept))."""
        assert self.slots is not None
        valid = self.slots.valid
        if valid is None:
            return kept.to(self.slots.positions.device)[None, None]
        # the same number of slots for each row: its sinks first, then its tokens from the newest to the oldest
        token = valid.cumsum(-1)
        age = torch.arange(self.length, 0, -1, device=valid.device).expand_as(token)
        order = torch.where(valid, torch.where(token <= self.start_size, 0, age), self.length + age)
        return order.argsort(dim=-1, stable=True)[..., : len(kept)].sort(dim=-1).values
