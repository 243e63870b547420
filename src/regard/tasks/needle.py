"""A needle in a haystack: a sentence hidden in a text it has nothing to do with, and a question about it.

The question may start its own answer (`primed`), without which models as small as SmolLM2-135M-Instruct do not answer
at all: then what is asked for is only the copying, which is what retrieval heads are about.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from regard.errors import ArgumentError
from regard.tasks.rouge import rouge1_recall
from regard.tasks.text import opening, tokenize

_QUESTION = "Based on the content of the book, Question: {question}\nAnswer:"
_BUFFER = 200  # tokens of the length that are left to question and answer


@dataclass(frozen=True)
class Needle:
    """A sentence that ends in the answer to a question.

    Attributes:
        text: the sentence. question: about it. answer: the words at its end that answer.
    """

    text: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not self.answer or not self.text.endswith(self.answer) or self.answer == self.text:
            raise ArgumentError(f"answer: expected the last words of {self.text!r}, got {self.answer!r}")

    @property
    def lead(self) -> str:
        """What stands before the answer."""
        return self.text.removesuffix(self.answer).rstrip()


@dataclass(frozen=True)
class NeedleRun:
    """One question to a model.

    Attributes:
        needle: what is hidden.
        prompt: token ids of the haystack with the needle, and of the question.
        span: first and one past the last token of the answer inside the prompt.
        depth: where the needle was put, from 0 (start) to 1 (end).
    """

    needle: Needle
    prompt: tuple[int, ...]
    span: tuple[int, int]
    depth: float

    def recall(self, response: str) -> float:
        """The share of the answer's words that the response has (ROUGE-1 recall of stems)."""
        return rouge1_recall(self.needle.answer, response)


def needle_in_haystack(
    tokens: Sequence[int],
    needle: Sequence[int],
    depth: float,
    length: int,
    sentence_end_ids: Collection[int],
    *,
    buffer: int = _BUFFER,
) -> tuple[list[int], int]:
    """Hide a needle behind the end of a sentence.

    The haystack and the needle have ``length - buffer`` tokens together (fewer where the haystack is shorter). The
    needle goes to place ``int(haystack · depth)`` and from there back to the nearest end of a sentence, to the start
    where there is none; at depth 1 to the end.

    Args:
        tokens, needle: token ids.
        depth: from 0 to 1.
        length: tokens in all, those for question and answer (``buffer``) included.
        sentence_end_ids: tokens that end a sentence.

    Returns:
        The tokens, and the place of the needle's first.

    Raises:
        ArgumentError: a depth outside 0..1, or no room for the needle.
    """
    if not 0 <= depth <= 1:
        raise ArgumentError(f"depth must be from 0 to 1, got {depth}")
    room = length - buffer - len(needle)
    if room < 0 or not needle:
        raise ArgumentError(
            f"length: {length} tokens without {buffer} for the question do not hold a needle of {len(needle)}"
        )
    hay = list(tokens[:room])
    place = int(len(hay) * depth)
    if depth < 1:
        while place and hay[place - 1] not in sentence_end_ids:
            place -= 1
    return [*hay[:place], *needle, *hay[place:]], place


def needle_run(
    tokenizer: Any, text: str, needle: Needle, length: int, depth: float, *, primed: bool = False
) -> NeedleRun:
    """The prompt, of exactly `length` tokens, that asks for a needle hidden in `text`; see `needle_in_haystack`.

    Args:
        tokenizer: of the model to ask.
        primed: end the prompt with the needle's own words before the answer.

    Raises:
        ArgumentError: as `needle_in_haystack`, or the text is too short.
    """
    begin = opening(tokenizer)
    words, before = tokenize(tokenizer, f" {needle.text}"), tokenize(tokenizer, f" {needle.lead}")
    question = _QUESTION.format(question=needle.question) + (f" {needle.lead}" if primed else "")
    asked = tokenize(tokenizer, f"\n{question}")
    room = length - len(begin) - len(asked)
    hay = tokenize(tokenizer, text, max(0, room - len(words)))
    if len(hay) < room - len(words):
        raise ArgumentError(f"text has {len(hay)} tokens, expected {room - len(words)}; use a longer text")
    ends = {token for mark in (".", " .") for token in tokenize(tokenizer, mark)[-1:]}
    tokens, place = needle_in_haystack(hay, words, depth, room, ends, buffer=0)
    shared = next((i for i, (a, b) in enumerate(zip(before, words, strict=False)) if a != b), len(before))
    start = len(begin) + place
    return NeedleRun(needle, (*begin, *tokens, *asked), (start + shared, start + len(words)), depth)
