"""What a user watches next."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.tasks.corpora import Ratings, movielens
from regard.tasks.sequence import Batch, Split, generator


@dataclass(frozen=True)
class NextItem:
    """The next film of a MovieLens user, from the last ``length`` ones; leave-one-out as in SASRec (arXiv:1808.09781).

    A user's last film is for tests, all before it for training. Items are the tokens.
    Score: NDCG@10 over all items but those of the history: ``1 / log2(rank + 2)`` of the true one, rank from 0, or 0
    below the tenth place.
    """

    length: int = 19
    cutoff: int = 10
    data: Ratings | None = None
    name: ClassVar[str] = "next item"
    metric: ClassVar[str] = "NDCG@10"

    def __post_init__(self) -> None:
        if self.length < 1 or self.cutoff < 1:
            raise ArgumentError(f"length and cutoff: expected at least 1, got {self.length} and {self.cutoff}")

    def __repr__(self) -> str:
        return f"NextItem(length={self.length}, cutoff={self.cutoff})"

    @cached_property
    def _ratings(self) -> Ratings:
        found = movielens() if self.data is None else self.data
        if short := [len(items) for items in found.users if len(items) <= self.length]:
            raise ArgumentError(f"length: {len(short)} users have no more than {self.length} items")
        return found

    @property
    def vocab_size(self) -> int:
        return self._ratings.num_items

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> Batch:
        g, users = generator(split, index, seed), self._ratings.users
        windows = []
        for _ in range(batch_size):
            items = users[int(torch.randint(len(users), (), generator=g))]
            last = len(items) - 1  # where a test's target stands
            start = last - self.length
            if split == "train":
                start = int(torch.randint(max(1, start), (), generator=g))
            windows.append(items[start : start + self.length + 1])
        rows = torch.stack(windows)
        weights = torch.ones(batch_size, self.length)
        if split == "test":
            weights[:, :-1] = 0.0
        return Batch(rows[:, :-1], rows[:, 1:], weights)

    def score(self, logits: Tensor, batch: Batch) -> float:
        return sum(self._gains(logits, batch)) / len(batch.ids)

    def _gains(self, logits: Tensor, batch: Batch) -> list[float]:
        last, target = logits[:, -1].float(), batch.targets[:, -1:]
        wanted = last.gather(1, target)
        others = last.scatter(1, batch.ids, -torch.inf)
        ranks = (others > wanted).sum(1).tolist()
        return [1 / math.log2(rank + 2) if rank < self.cutoff else 0.0 for rank in ranks]
