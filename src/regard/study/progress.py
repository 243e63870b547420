"""How far a comparison is."""

from collections.abc import Callable
from dataclasses import dataclass

#: tokens of a prompt that take about as long as decoding one
_PROMPT_TOKENS_PER_STEP = 32


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of work, about the time of decoding one token each, and what is being done."""

    method: str
    task: str
    done: float
    total: float


class Plan:
    """Counts the forwards of a comparison; a stage that ends early gives the rest of its units.

    Args:
        total: units of all stages.
        report: called after each forward.
    """

    def __init__(self, total: float, report: Callable[[Progress], None] | None) -> None:
        self._total, self._report = total, report
        self._method, self._task = "", ""
        self._done = self._end = 0.0

    def stage(self, method: str, task: str, units: float) -> None:
        """The stage before is over; this one takes `units`."""
        self._method, self._task = method, task
        self._done = self._end
        self._end += units
        self.advance(0)

    def advance(self, tokens: int) -> None:
        """One forward of `tokens` is done."""
        self._done = min(self._end, self._done + (units(tokens) if tokens > 1 else tokens))
        if self._report is not None:
            self._report(Progress(self._method, self._task, self._done, self._total))


def units(prompt: int, steps: int = 0) -> float:
    """Units of reading a prompt and decoding some tokens after it."""
    return max(1.0, prompt / _PROMPT_TOKENS_PER_STEP) + steps
