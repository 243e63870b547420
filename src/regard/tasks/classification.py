"""Which kind of text a passage comes from."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.tasks.corpora import brown
from regard.tasks.sequence import Batch, Split, accuracy, generator

#: the Brown corpus' categories in four groups; the first letter of a sample's number follows the same order
GENRES: dict[str, tuple[str, ...]] = {
    "press": ("news", "editorial", "reviews"),
    "prose": ("religion", "hobbies", "lore", "belles_lettres", "government"),
    "learned": ("learned",),
    "fiction": ("fiction", "mystery", "science_fiction", "adventure", "romance", "humor"),
}


@dataclass(frozen=True)
class Genres:
    """Passages of the Brown corpus, byte by byte, to be told apart as press, general prose, learned or fiction.

    Every group is drawn equally often, and every fifth sample is for tests alone. The model gives one vector of logits
    per passage. Score: `accuracy`; guessing gives 0.25.
    """

    length: int = 256
    name: ClassVar[str] = "genres"
    metric: ClassVar[str] = "accuracy"
    vocab_size: ClassVar[int] = 128
    num_classes: ClassVar[int] = len(GENRES)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ArgumentError(f"length: expected at least 1, got {self.length}")

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> Batch:
        """ids (B, length), targets and weights (B,)."""
        g = generator(split, index, seed)
        targets = torch.randint(self.num_classes, (batch_size,), generator=g)
        texts = _texts(split)
        rows = []
        for target in targets.tolist():
            text = texts[target]
            if self.length > len(text):
                raise ArgumentError(f"length: the {split} text has {len(text)} bytes, got {self.length}")
            start = int(torch.randint(len(text) - self.length + 1, (), generator=g))
            rows.append(text[start : start + self.length])
        return Batch(torch.stack(rows), targets, torch.ones(batch_size))

    def score(self, logits: Tensor, batch: Batch) -> float:
        return accuracy(logits, batch)


@cache
def _texts(split: Split) -> tuple[Tensor, ...]:
    """The bytes of each group's samples in a row."""
    found = []
    for categories in GENRES.values():
        samples = [d.text for d in brown() if d.category in categories]
        chosen = [t for i, t in enumerate(samples) if (i % 5 == 0) == (split == "test")]
        found.append(torch.tensor(list(" ".join(chosen).encode("ascii", "replace"))))
    return tuple(found)
