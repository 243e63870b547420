"""H2O (arXiv:2306.14048): keep the keys that received the most attention so far, and the most recent ones.

    s_j  = Σ over all queries so far of their attention weight on key j
    keep = the hh_size best of s[: K - recent_size], and the last recent_size       when K > hh_size + recent_size

`HeavyHitterLayer` drops the other keys. `HeavyHitterMask` is the published simulation, which only masks them.
"""

from typing import Any

import torch
from torch import Tensor

from regard.cache.layer import TrackedLayer


def accumulate(scores: Tensor | None, received: Tensor) -> Tensor:
    """Add what the keys (..., K) received now to the scores (..., K - n) of those that were there before."""
    if scores is None:
        return received
    return received + torch.nn.functional.pad(scores, (0, received.shape[-1] - scores.shape[-1]))


def heavy_hitters(scores: Tensor, hh_size: int, recent_size: int) -> Tensor:
    """The slots that stay, (..., hh_size + recent_size) of the scores' (..., K), in order."""
    length = scores.shape[-1]
    recent = torch.arange(max(length - recent_size, 0), length, device=scores.device)
    older = scores[..., : length - len(recent)]
    heavy = older.topk(min(hh_size, older.shape[-1]), dim=-1).indices.sort(dim=-1).values
    return torch.cat((heavy, recent.expand(*scores.shape[:-1], -1)), dim=-1)


class HeavyHitterLayer(TrackedLayer):
    """The keys and values of each head's own heavy hitters and of the last `recent_size` tokens.

    In a padded batch each row keeps its own recent real tokens, and padding only as long as there is room for it.

    Args:
        hh_size, recent_size: how many of either, per key-value head; may be changed at any time.
        normalise: judge a key by what it received per query, not in total; total scores favour old tokens.
        raw_keys: as in `TrackedLayer`.

    Attributes:
        scores: (B, Hk, K) attention received by each slot so far.
        observations: (B, Hk or 1, K) number of queries it could have come from; kept to normalise only.
    """

    def __init__(self, hh_size: int, recent_size: int, normalise: bool = False, raw_keys: bool = False) -> None:
        super().__init__(raw_keys)
        self.hh_size, self.recent_size, self.normalise = hh_size, recent_size, normalise
        self.scores: Tensor | None = None
        self.observations: Tensor | None = None

    def observe(self, received: Tensor, num_queries: int) -> None:
        """Add the attention (B, Hk, K) that the slots received from the newest `num_queries` tokens."""
        self.scores = accumulate(self.scores, received)
        if self.normalise:
            self.observations = accumulate(self.observations, self._queries_after(num_queries))

    def evict(self) -> None:
        """Shrink to `hh_size + recent_size` slots."""
        if self.length <= self.hh_size + self.recent_size:
            return
        assert self.slots is not None
        assert self.scores is not None
        worth = self.scores
        if self.observations is not None:
            worth = worth / self.observations.clamp_min(1)
        valid = self.slots.valid
        if valid is None:
            self.keep(heavy_hitters(worth, self.hh_size, self.recent_size))
        else:  # the same number of slots for each row: its own recent tokens first, padding last
            recent = valid & (valid.flip(-1).cumsum(-1).flip(-1) <= self.recent_size)
            worth = worth.masked_fill(~valid, -torch.inf).masked_fill(recent, torch.inf)
            self.keep(heavy_hitters(worth, self.hh_size + self.recent_size, 0))

    def keep(self, index: Tensor) -> None:
        super().keep(index)
        assert self.keys is not None
        index = index.expand(*self.keys.shape[:2], -1)
        if self.scores is not None:
            self.scores = self.scores.gather(-1, index)
        if self.observations is not None:
            self.observations = self.observations.expand(*index.shape[:2], -1).gather(-1, index)

    def _queries_after(self, num_queries: int) -> Tensor:
        """(B, Hk or 1, K): how many of the newest queries are real and see each slot."""
        assert self.slots is not None
        valid = self.slots.valid
        if valid is None:
            valid = torch.ones_like(self.slots.positions[:, :1], dtype=torch.bool)
        queries = valid.clone()
        queries[..., : self.length - num_queries] = False
        return queries.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)

    def _map_batch(self, function: Any) -> None:
        super()._map_batch(function)
        if self.scores is not None:
            self.scores = function(self.scores)
        if self.observations is not None:
            self.observations = function(self.observations)

    def reset(self) -> None:
        super().reset()
        self.scores = self.observations = None


class HeavyHitterMask:
    """H2O simulated on a cache that keeps everything: `mask` says what each query head may see in the next step.

    Follows the published simulation to the letter: the budgets are shares of the first forward's length, and one slot
    fewer than `recent_budget` is kept besides the coming token, because the next step's mask already counts it.

    Args:
        heavy_ratio, recent_ratio: shares of the first forward's length kept as heavy hitters and as recent tokens.

    Attributes:
        mask: (B, H, 1, K + 1), 1 where the next token may look, 0 elsewhere; None before the first update.
        budgets: (heavy, recent) numbers of slots; None before the first update.
    """

    def __init__(self, heavy_ratio: float, recent_ratio: float) -> None:
        self.heavy_ratio, self.recent_ratio = heavy_ratio, recent_ratio
        self.budgets: tuple[int, int] | None = None
        self.scores: Tensor | None = None
        self.mask: Tensor | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """The step's logits (B, H, N, K) with the lowest value where the mask forbids."""
        if self.mask is None:
            return logits
        return logits * self.mask + (1 - self.mask) * torch.finfo(logits.dtype).min

    def update(self, weights: Tensor) -> None:
        """Take the weights (B, H, N, K) of the step, one token long after the first, and decide the next mask."""
        length = weights.shape[-1]
        if self.budgets is None:
            self.budgets = int(self.heavy_ratio * length), int(self.recent_ratio * length)
        heavy, recent = self.budgets
        scores = accumulate(self.scores, weights.sum(2))
        mask = scores.new_ones(*scores.shape[:-1], length + 1)
        if length > heavy + recent:
            mask[..., : length + 1 - recent] = 0
            best = scores[..., : length - recent].topk(heavy, dim=-1).indices
            mask.scatter_(-1, best, 1)
        self.mask = mask.unsqueeze(2)
        forgotten = mask[..., :length] == 0
        forgotten[..., length - recent :] = False
        self.scores = scores.masked_fill(forgotten, 0.0)
