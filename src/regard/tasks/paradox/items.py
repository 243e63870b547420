"""Records of the generative AI paradox's protocol, one item at one hardness each."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from regard.errors import ArgumentError


@dataclass(frozen=True)
class ParadoxItem:
    """The record of one item at one hardness.

    Attributes:
        id, domain, input, reference: the task; the reference is the right candidate.
        candidates: in the order they were shown in, see `shuffled`.
        hardness: of the wrong candidates: "easy" (other items') or "hard" (near misses).
        seed: the order was drawn with.
        generation, generation_score: what was produced, and its quality from 0 to 1; None where it has none.
        selected: index of the picked candidate; None for an answer that names none, which counts as wrong.
        questions, answers, answer_scores: about the generation.
    """

    id: str
    domain: str
    input: str
    reference: str
    candidates: tuple[str, ...]
    hardness: Literal["easy", "hard"]
    seed: int = 0
    generation: str | None = None
    generation_score: float | None = None
    selected: int | None = None
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    answer_scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.candidates.count(self.reference) != 1:
            raise ArgumentError(f"candidates of item {self.id!r} must hold the reference once, got {self.candidates}")
        if self.hardness not in ("easy", "hard"):
            raise ArgumentError(f"hardness must be 'easy' or 'hard', got {self.hardness!r}")
        if self.selected is not None and not 0 <= self.selected < len(self.candidates):
            raise ArgumentError(f"selected must be one of 0..{len(self.candidates) - 1} or None, got {self.selected}")

    @property
    def selection_score(self) -> float:
        """1 if the reference was picked, 0 if not, NaN if the answer could not be read."""
        if self.selected is None:
            return float("nan")
        return float(self.candidates[self.selected] == self.reference)


def shuffled(reference: str, distractors: Sequence[str], seed: int) -> tuple[str, ...]:
    """The candidates in an order drawn with the seed."""
    return tuple(random.Random(seed).sample([reference, *distractors], len(distractors) + 1))


def write_records(path: str | Path, items: Iterable[ParadoxItem]) -> None:
    """One JSON object a line."""
    Path(path).write_text("".join(json.dumps(asdict(item)) + "\n" for item in items), encoding="utf-8")


def read_records(path: str | Path) -> list[ParadoxItem]:
    """What `write_records` wrote.

    Raises:
        ArgumentError: a line is no such record.
    """
    known, items = {field.name for field in fields(ParadoxItem)}, []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or set(record) != known:
                raise ValueError(f"expected the fields {', '.join(sorted(known))}")
        except ValueError as error:
            raise ArgumentError(f"path: line {number} of {str(path)!r} is no record: {error}") from error
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        items.append(ParadoxItem(**given))
    return items
