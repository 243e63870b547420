"""Picking one of several candidates: by likelihood, or by the letter in an answer."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.tasks.metrics import negative_log_likelihood
from regard.tasks.text import opening, tokenize

#: in brackets; or a word of its own, where "A" is no article
_LETTER = re.compile(r"(?<=\()[A-Za-z](?=\))|\b(?:[B-Z]|A(?!\s+(?!or\b|and\b)[a-z]))\b")


class Selection(NamedTuple):
    """The picked candidate, and the scores of all."""

    selected: int
    scores: Tensor


@torch.no_grad()
def select_by_likelihood(
    model: Any,
    tokenizer: Any,
    context: str | Sequence[int],
    candidates: Sequence[str] | Sequence[Sequence[int]],
    normalise: bool = True,
) -> Selection:
    """Pick the candidate that a language model finds likeliest after the context, ``Σ_i log p(token_i)`` over its n
    tokens, divided by n; in nats. One forward per candidate; a tie goes to the first.

    Args:
        model: called with ids (1, N), returns something with ``logits`` (1, N, V).
        tokenizer: of the model; None where context and candidates are token ids.
        context, candidates: texts, tokenized apart (a candidate brings its leading space), or token ids.
        normalise: divide by n.

    Raises:
        ArgumentError: no candidates, or a context or a candidate without tokens.
    """

    def ids(given: str | Sequence[int]) -> list[int]:
        return tokenize(tokenizer, given) if isinstance(given, str) else list(given)

    start, ends = ids(context), [ids(candidate) for candidate in candidates]
    if isinstance(context, str):
        start = opening(tokenizer) + start
    if not start or not ends or not all(ends):
        raise ArgumentError("context and candidates: expected tokens in all of them, and at least one candidate")
    scores = []
    for end in ends:
        logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
        total = -negative_log_likelihood(logits, torch.tensor(end)).sum()
        scores.append(total / len(end) if normalise else total)
    picked = torch.stack(scores)
    return Selection(int(picked.argmax()), picked)


def read_letter(answer: str, choices: int) -> int | None:
    """The option that an answer such as "B", "(b)" or "Answer: B." names: its index; None where it names none or two.

    A letter counts as the whole answer, in brackets, or as a word of its own in capitals ("A cat" is none).
    """
    alone = answer.strip(" \n.:()")
    found = (
        [alone]
        if len(alone) == 1
        else re.findall(r"(?<=\()[A-Za-z](?=\))|\b(?:[B-Z]|A(?!\s+(?!or\b|and\b)[a-z]))\b", answer)
    )
    letters = {ord(letter.upper()) - ord("A") for letter in found}
    named = {letter for letter in letters if 0 <= letter < choices}
    return named.pop() if len(named) == 1 else None
