"""Passkey retrieval: numbers hidden at several depths of a long text, asked for one after the other.

The format was chosen by trying: with real prose around them, SmolLM2-135M-Instruct gives back more than nine in ten
four-digit keys in 2048 tokens when each has a name of its own kind, is stated twice, and is asked for in a question
that starts its own answer. (Keys that differ in one word, "the pass key for Oslo", it confuses.) One reading of the
text serves all questions.
"""

import random
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

from regard.errors import ArgumentError
from regard.tasks.text import opening, tokenize

NAMES = (
    "door code",
    "flight number",
    "bank pin",
    "locker number",
    "phone extension",
    "invoice number",
    "room number",
    "bus line",
    "parking space",
    "order number",
    "member number",
    "radio channel",
)
_NEEDLE = "The {name} is {key}. Remember that the {name} is {key}."
_QUESTION = "\n\nWhat is the {name}? The {name} is"
_DIGITS = 4
_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Passkey:
    """One hidden number.

    Attributes:
        name, key: what it is called, and the number as text.
        start, stop: the tokens of the haystack that state it.
        depth: where that is, from 0 (start) to 1 (end).
        question, answer: tokens to feed after the haystack, and tokens that must follow.
    """

    name: str
    key: str
    start: int
    stop: int
    depth: float
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class PasskeyTask:
    """A haystack of token ids with its passkeys, from the first to the last depth."""

    haystack: tuple[int, ...]
    passkeys: tuple[Passkey, ...]

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that all questions begin with; they need to be fed only once."""
        first, *rest = (passkey.question for passkey in self.passkeys)
        alike = (all(other[i : i + 1] == (token,) for other in rest) for i, token in enumerate(first))
        return first[: sum(takewhile(bool, alike))]


def passkey_task(tokenizer: Any, text: str, length: int, count: int, seed: int = 0) -> PasskeyTask:
    """Hide `count` passkeys at even depths between the paragraphs of `text`, `length` tokens together.

    Args:
        tokenizer: of the model to test.
        text: what hides them; only paragraphs too long to get near the depths are divided.
        length: tokens of the haystack.
        count: number of passkeys, up to `len(NAMES)`.
        seed: draws the numbers and the order of their names.

    Raises:
        ArgumentError: more passkeys than names, no room for them, or too little text.
    """
    if not 1 <= count <= len(NAMES):
        raise ArgumentError(f"passkeys must be between 1 and {len(NAMES)}, got {count}")
    rng = random.Random(seed)
    names = rng.sample(NAMES, count)
    keys = ["".join(rng.choices("0123456789", k=_DIGITS)) for _ in names]
    needles = [
        tokenize(tokenizer, _SEPARATOR + _NEEDLE.format(name=name, key=key))
        for name, key in zip(names, keys, strict=True)
    ]
    start = opening(tokenizer)
    room = length - len(start) - sum(map(len, needles))
    if room < 0:
        raise ArgumentError(
            f"context of {length} tokens is too short for {count} passkeys, which take {length - room}; "
            "use a longer context or fewer passkeys"
        )
    pieces = _pieces(tokenizer, text, room, longest=max(1, room // (2 * count)))
    ends = [0, *accumulate(map(len, pieces))]
    haystack, passkeys, used = list(start), [], 0
    for i, (name, key, needle) in enumerate(zip(names, keys, needles, strict=True)):
        wanted = (i + 0.5) / count * room
        place = min(range(used, len(ends)), key=lambda end: abs(ends[end] - wanted))
        haystack += [token for piece in pieces[used:place] for token in piece]
        question, answer = _question(tokenizer, name, key)
        at = len(haystack)
        passkeys.append(Passkey(name, key, at, at + len(needle), at / length, question, answer))
        haystack += needle
        used = place
    haystack += [token for piece in pieces[used:] for token in piece]
    return PasskeyTask(tuple(haystack), tuple(passkeys))


def _pieces(tokenizer: Any, text: str, room: int, longest: int) -> list[list[int]]:
    """The first `room` tokens of `text`: its paragraphs, those of more than `longest` tokens in parts."""
    pieces: list[list[int]] = []
    left = room
    for i, paragraph in enumerate(text.split(_SEPARATOR)):
        if left == 0:
            break
        tokens = tokenize(tokenizer, (_SEPARATOR if i else "") + paragraph, left)
        pieces += [tokens[j : j + longest] for j in range(0, len(tokens), longest)]
        left -= len(tokens)
    if left > 0:
        raise ArgumentError(
            f"text has {room - left} tokens, expected at least {room} to hide the passkeys in; "
            "use a longer text or a shorter context"
        )
    return pieces


def _question(tokenizer: Any, name: str, key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Question and answer as tokens, split where the tokens of the question alone and with its answer part."""
    question = _QUESTION.format(name=name)
    alone, answered = tokenize(tokenizer, question), tokenize(tokenizer, f"{question} {key}")
    shared = next((i for i, (a, b) in enumerate(zip(alone, answered, strict=False)) if a != b), len(alone))
    return tuple(answered[:shared]), tuple(answered[shared:])
