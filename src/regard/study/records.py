"""The plain records a comparison ends in; all of it can be written as JSON."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from regard.study.machine import Machine


@dataclass(frozen=True)
class Settings:
    """What was compared, and how.

    Attributes:
        model: its name, and `parameters` how many it has.
        text: where the text came from.
        context: tokens read before anything is measured.
        continuation: tokens of the text whose perplexity is measured after it.
        generate: tokens of dense's own continuations, half of them after the context, half after the continuation.
        passkeys: how many are hidden. seed: draws them.
        repeats: how often each method's times were taken.
    """

    model: str
    parameters: int
    text: str
    context: int
    continuation: int
    generate: int
    passkeys: int
    seed: int
    repeats: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Recall:
    """One passkey: where it stood (0 start, 1 end of the context), and whether it came back."""

    name: str
    depth: float
    correct: bool


@dataclass(frozen=True)
class Picture:
    """The attention pattern of one layer, mean over heads; the last column is for keys beyond the prompt.

    Attributes:
        edges: token positions between which the bins lie.
        prompt: per bin of queries, the mass on each bin of keys.
        decoded: the same for single tokens that followed, and `tokens` what they were.
        target: position of the passkey the tokens ask for, or None.
    """

    layer: int
    edges: tuple[int, ...]
    prompt: list[list[float]]
    decoded: list[list[float]]
    tokens: list[str]
    target: int | None


@dataclass
class Result:
    """What one method did. Every figure was measured in this run; None where there is none.

    Attributes:
        name, method: the method's name, and its name with its settings; parameters: all of them.
        error: why it could not run on this model.
        loss, perplexity: mean negative log likelihood of the text after the context, and its exponential.
        perplexity_change: difference to dense.
        agreement: share of dense's own greedy tokens that this method would have chosen too.
        cache_bytes: what the cache holds after the prompt.
        prefill_seconds, decode_seconds: reading the prompt, and one token (median) after it.
        prefill_ratio, decode_ratio: the same over dense measured right before and after.
        peak_bytes: most memory while reading and going on, beyond the model itself.
        pictures: attention patterns of some layers.
    """

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    loss: float | None = None
    perplexity: float | None = None
    perplexity_change: float | None = None
    recalls: list[Recall] = field(default_factory=list)
    agreement: float | None = None
    cache_bytes: int | None = None
    prefill_seconds: float | None = None
    prefill_ratio: float | None = None
    decode_seconds: float | None = None
    decode_ratio: float | None = None
    peak_bytes: int | None = None
    pictures: list[Picture] = field(default_factory=list)

    @property
    def recalled(self) -> int:
        """Number of passkeys that came back."""
        return sum(recall.correct for recall in self.recalls)


@dataclass(frozen=True)
class Clock:
    """Dense, timed again before and after every method: the times the ratios refer to, and how steady they were."""

    prefill_seconds: list[float]
    decode_seconds: list[float]


@dataclass
class Comparison:
    """Methods side by side; `results[0]` is dense, the untouched model."""

    settings: Settings
    machine: Machine
    results: list[Result]
    clock: Clock
    seconds: float
    created: str

    @property
    def dense(self) -> Result:
        return self.results[0]

    def table(self) -> RenderableType:
        """The results for the terminal: ``rich.print(comparison.table())``."""
        from regard.study.table import table

        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as numbers, strings, lists and dicts; numbers that are not finite become None."""
        return _plain(asdict(self))

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def report(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing else: table, plots, attention patterns, settings."""
        from regard.study.report import render

        Path(path).write_text(render(self), encoding="utf-8")


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(name): _plain(part) for name, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case _:
            return repr(value)
