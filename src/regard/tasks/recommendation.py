"""What a user watches next."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.tasks.corpora import Ratings, movielens
from regard.tasks.metrics import ndcg
from regard.tasks.sequence import Batch, Split, generator


@dataclass(frozen=True)
class NextItem:
    """The next film of a MovieLens user, from the last ``length`` ones; leave-one-out as in SASRec (arXiv:1808.09781).

    A user's last film is for tests, all before it for training. Items are the tokens: films rated at least
    ``min_ratings`` times. Users with no more than ``length`` of them are left out.
    Score: NDCG@10 over all items but those of the history: ``1 / log2(rank + 2)`` of the true one, rank from 0, or 0
    below the tenth place.
    """

    length: int = 19
    cutoff: int = 10
    min_ratings: int = 20
    data: Ratings | None = None
    name: ClassVar[str] = "next item"
    metric: ClassVar[str] = "NDCG@10"

    def __post_init__(self) -> None:
        if self.length < 1 or self.cutoff < 1:
            raise ArgumentError(f"length and cutoff: expected at least 1, got {self.length} and {self.cutoff}")

    def __repr__(self) -> str:
        return f"NextItem(length={self.length}, cutoff={self.cutoff}, min_ratings={self.min_ratings})"

    @cached_property
    def _ratings(self) -> Ratings:
        found = movielens(self.min_ratings) if self.data is None else self.data
        enough = tuple(items for items in found.users if len(items) > self.length)
        if not enough:
            raise ArgumentError(f"length: no user has more than {self.length} items")
        return found._replace(users=enough)

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
        unseen = logits[:, -1].float().scatter(1, batch.ids, -torch.inf)
        return ndcg(unseen, batch.targets[:, -1], self.cutoff)
