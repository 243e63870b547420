"""Small tasks that tell sequence mechanisms apart: recall, copying, a needle, and real text byte by byte.

Each is a frozen dataclass with ``vocab_size``, ``length`` and ``batch(split, index, batch_size, seed)``, which gives
token ids, targets and weights, all (B, N). Position t predicts ``targets[:, t]`` from ``ids[:, :t + 1]``; only
positions of weight 1 count. The same arguments always give the same batch; train and test never share a seed.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.tasks.metrics import negative_log_likelihood
from regard.tasks.text import english

Split = Literal["train", "test"]
_TEST_SHARE = 0.1  # of a text, at its end


class Batch(NamedTuple):
    """ids, targets (B, N) long; weights (B, N) float32, 1 where the prediction counts; one per row where all of it has
    one class (`regard.tasks.classification`)."""

    ids: Tensor
    targets: Tensor
    weights: Tensor


class SequenceTask(Protocol):
    """What a study needs of a task; classification tasks have ``num_classes`` too."""

    metric: ClassVar[str]

    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> Batch: ...
    def score(self, logits: Tensor, batch: Batch) -> float: ...


def accuracy(logits: Tensor, batch: Batch) -> float:
    """The share of the positions that count whose most likely token is the target."""
    hit = (logits.argmax(-1) == batch.targets).to(batch.weights.dtype)
    return float((hit * batch.weights).sum() / batch.weights.sum())


def bits(logits: Tensor, batch: Batch) -> float:
    """Mean -log2 p of the targets at the positions that count; bits per byte where tokens are bytes."""
    loss = negative_log_likelihood(logits, batch.targets)
    return float((loss * batch.weights).sum() / batch.weights.sum() / torch.log(torch.tensor(2.0)))


def generator(split: str, index: int, seed: int) -> torch.Generator:
    """Of one batch; train and test never share one."""
    if split not in ("train", "test"):
        raise ArgumentError(f"split: expected 'train' or 'test', got {split!r}")
    if not (0 <= index < 2**31 and 0 <= seed < 2**31):
        raise ArgumentError(f"index and seed: expected numbers from 0 to 2**31 - 1, got {index} and {seed}")
    # The CPU's generator reads only the low 32 bits of its seed: 31 of a hash, and one that keeps the splits apart.
    mixed = int.from_bytes(blake2b(f"{seed} {index}".encode(), digest_size=4).digest()) >> 1
    return torch.Generator().manual_seed(2 * mixed + (split == "test"))


def _distinct(rows: int, count: int, below: int, g: torch.Generator) -> Tensor:
    """(rows, count) numbers from 0 to below - 1, no two alike in a row, in random order."""
    return torch.rand(rows, below, generator=g).argsort(1)[:, :count]


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall (after arXiv:2312.04927): pairs of key and value, then every key once again.

    The keys come back in random order, each followed by its value, and the value is to be predicted at the key.
    Score: `accuracy` at those keys; guessing among the values gives 1 / ``values``.
    """

    pairs: int = 8
    keys: int = 32
    values: int = 32
    name: ClassVar[str] = "recall"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys or self.values < 2:
            raise ArgumentError(
                f"pairs: expected 1 to keys={self.keys} and at least 2 values, got {self.pairs} and {self.values}"
            )

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values

    @property
    def length(self) -> int:
        return 4 * self.pairs

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> Batch:
        g = generator(split, index, seed)
        keys = _distinct(batch_size, self.pairs, self.keys, g)
        values = torch.randint(self.keys, self.vocab_size, keys.shape, generator=g)
        pairs = torch.stack([keys, values], 2)
        order = _distinct(batch_size, self.pairs, self.pairs, g)
        again = pairs.gather(1, order[:, :, None].expand(-1, -1, 2))
        ids = torch.cat([pairs, again], 1).flatten(1)
        weights = torch.zeros(ids.shape)
        weights[:, 2 * self.pairs :: 2] = 1.0
        return Batch(ids, ids.roll(-1, 1), weights)

    def score(self, logits: Tensor, batch: Batch) -> float:
        return accuracy(logits, batch)


@dataclass(frozen=True)
class SelectiveCopying:
    """Selective copying (after arXiv:2312.00752): symbols strewn among blanks, to be given back in their order.

    Token 0 is the blank and 1 asks for the next symbol. Score: `accuracy` of the symbols given back; guessing gives
    1 / ``symbols``.
    """

    count: int = 8
    span: int = 56
    symbols: int = 14
    name: ClassVar[str] = "copying"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.span or self.symbols < 2:
            raise ArgumentError(
                f"count: expected 1 to span={self.span} and at least 2 symbols, got {self.count} and {self.symbols}"
            )

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def length(self) -> int:
        return self.span + self.count

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> Batch:
        g = generator(split, index, seed)
        places = _distinct(batch_size, self.count, self.span, g).sort(1).values
        symbols = torch.randint(2, self.vocab_size, places.shape, generator=g)
        ids = torch.zeros(batch_size, self.length, dtype=torch.long)
        ids.scatter_(1, places, symbols)
        ids[:, self.span :] = 1
        targets, weights = ids.clone(), torch.zeros(ids.shape)
        targets[:, self.span :] = symbols
        weights[:, self.span :] = 1.0
        return Batch(ids, targets, weights)

    def score(self, logits: Tensor, batch: Batch) -> float:
        return accuracy(logits, batch)


@cache
def _bytes() -> Tensor:
    return torch.tensor(list(english().encode("ascii", "replace")))


def _windows(split: Split, length: int, batch_size: int, g: torch.Generator) -> Tensor:
    """(B, length) bytes of the manual; the end of the text is for tests alone."""
    text = _bytes()
    cut = int(len(text) * (1 - _TEST_SHARE))
    text = text[:cut] if split == "train" else text[cut:]
    if length > len(text):
        raise ArgumentError(f"length: the {split} text has {len(text)} bytes, got {length}")
    start = torch.randint(len(text) - length + 1, (batch_size, 1), generator=g)
    return text[start + torch.arange(length)]


def _sentences(split: Split, length: int, batch_size: int, g: torch.Generator) -> Tensor:
    """(B, length) bytes of generated text; train and test differ by their generators alone."""
    subjects = ("door", "river", "clock", "garden", "letter", "road", "window", "song")
    verbs = ("waits", "turns", "opens", "sleeps", "falls", "shines", "stays", "returns")
    rows = []
    for _ in range(batch_size):
        drawn = torch.randint(8, (length // 12 + 2, 2), generator=g).tolist()
        text = " ".join(f"the {subjects[s]} {verbs[v]}." for s, v in drawn)
        rows.append(list(text.encode())[:length])
    return torch.tensor(rows)


@dataclass(frozen=True)
class ByteText:
    """Next-byte prediction on Python's manual (`regard.tasks.english`), its last tenth held out.

    Score: `bits` per byte; below 8, the lower the better.
    """

    length: int = 256
    name: ClassVar[str] = "bytes"
    metric: ClassVar[str] = "bits"
    vocab_size: ClassVar[int] = 128

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ArgumentError(f"length: expected at least 1, got {self.length}")

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> Batch:
        window = _windows(split, self.length + 1, batch_size, generator(split, index, seed))
        return Batch(window[:, :-1], window[:, 1:], torch.ones(batch_size, self.length))

    def score(self, logits: Tensor, batch: Batch) -> float:
        return bits(logits, batch)


@dataclass(frozen=True)
class Needle:
    """A key of several digits hidden at a random place of a text, to be given back at the end.

    The text is real, `ByteText`'s, or "generated": sentences of three words drawn at random, such as "the door waits.".

    Token 128 stands before the needle and again where it is asked for; digits are the bytes 48 to 57, after a mark.
    Score: `accuracy` of the digits; guessing gives 0.1.
    """

    length: int = 256
    digits: int = 4
    text: Literal["real", "generated"] = "real"
    metric: ClassVar[str] = "accuracy"
    vocab_size: ClassVar[int] = 129

    @property
    def name(self) -> str:
        return "needle" if self.text == "real" else "needle (generated)"

    def __post_init__(self) -> None:
        if self.text not in ("real", "generated"):
            raise ArgumentError(f"text: expected 'real' or 'generated', got {self.text!r}")
        if self.digits < 1 or self.length < 2 * self.digits + 1:
            raise ArgumentError(f"length: expected at least 2 * digits + 1, got {self.length} for {self.digits} digits")

    def batch(self, split: Split, index: int, batch_size: int, seed: int = 0) -> Batch:
        g = generator(split, index, seed)
        make = _windows if self.text == "real" else _sentences
        window = make(split, self.length + 1, batch_size, g)
        mark = torch.full((batch_size, 1), 128)
        key = torch.randint(48, 58, (batch_size, self.digits), generator=g)
        needle = torch.cat([mark, key], 1)
        asked = self.length - self.digits  # where the second mark stands
        place = torch.randint(asked - self.digits, (batch_size, 1), generator=g)
        window.scatter_(1, place + torch.arange(self.digits + 1), needle)
        window[:, asked:] = needle
        weights = torch.zeros(batch_size, self.length)
        weights[:, asked:] = 1.0
        return Batch(window[:, :-1], window[:, 1:], weights)

    def score(self, logits: Tensor, batch: Batch) -> float:
        return accuracy(logits, batch)
