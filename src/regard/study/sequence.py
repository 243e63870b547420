"""The same small model, trained with one mechanism after the other on the same tasks under the same budget.

A cell is one mechanism on one task, or its cost. Each finished cell is a file in the results' folder and is not run
again, so a study resumes where it stopped, and several processes may share one folder (give them other mechanisms).
"""

import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard import catalog
from regard.errors import ArgumentError, MissingExtra, Unsupported, require
from regard.mechanisms import Mechanism, state_bytes
from regard.mechanisms.registry import create_mixer, module_class
from regard.models.language import LanguageModel
from regard.tasks.classification import Genres
from regard.tasks.metrics import negative_log_likelihood
from regard.tasks.recommendation import NextItem
from regard.tasks.sequence import AssociativeRecall, ByteText, Needle, SelectiveCopying, SequenceTask

#: small enough that softmax learns each of them in half a minute on one core
TASKS: tuple[SequenceTask, ...] = (
    AssociativeRecall(pairs=4, keys=16, values=16),
    SelectiveCopying(count=4, span=28, symbols=8),
    Needle(length=64, digits=2),
    Needle(length=64, digits=2, text="generated"),
    ByteText(length=128),
    Genres(length=256),
    NextItem(),
)

#: arguments where the defaults are made for sequences much longer than these tasks'
CONFIGS: dict[str, dict[str, Any]] = {
    "core-context-attention": {"group_size": 4, "local_size": 16},
    "dynamic-mask-attention": {"window_size": 16},
    "hyper-attention": {"block_size": 32, "sample_size": 32, "min_seq_len": 64},
    "landmark-attention": {"block_size": 8},
    "titans": {"chunk_size": 16},
}
#: what the study leaves out, and why
LEFT_OUT: dict[str, str] = {
    "deconstructing-attention/decoupled": "is softmax attention until its model supplies another source",
    "sparsifiner": "has a fixed number of tokens, those of an image",
    "vmoba": "has a fixed grid, that of a video",
}
COST_LENGTH = 512
_TEST_BATCHES = 16
_OFFERED = {"dim": 16, "num_heads": 2, "max_length": 64, "num_layers": 1, "layer_idx": 0}
_REPEATS = 7

Report = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """The budget, equal for all mechanisms.

    Attributes:
        steps: of training per task.
        tokens: per step; a task of length n trains on tokens / n sequences at a time.
        dim, depth, num_heads: of the model.
        lr: the largest, of a one-cycle schedule.
        seed: of weights and data.
    """

    steps: int = 800
    tokens: int = 1024
    dim: int = 64
    depth: int = 2
    num_heads: int = 4
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def batch_size(self, task: SequenceTask) -> int:
        return max(1, self.tokens // task.length)


@dataclass(frozen=True)
class Cell:
    """A result; ``error`` says why there are no numbers.

    Attributes:
        mixer: name of the mechanism. config: arguments other than its defaults.
        task: name of the task, or "cost".
        numbers: of a task its ``score`` on sequences never trained on, and the ``seconds`` of training; of "cost"
            ``parameters`` of a model without embeddings, ``forward`` and ``backward`` time over softmax's, and where it
            streams ``decode`` time over softmax's and ``state``, bytes per token after `COST_LENGTH` tokens.
    """

    mixer: str
    task: str
    numbers: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def all_mixers() -> tuple[str, ...]:
    """Softmax, and every mechanism of the catalogue that works and mixes the tokens of one sequence; see `LEFT_OUT`."""
    found = ["softmax"]
    for system in catalog.systems(status="works"):
        for name, part in ((system.slug, None), *((f"{system.slug}/{p}", p) for p in system.parts)):
            cls = system.load(part)
            if name not in LEFT_OUT and isinstance(cls, type) and issubclass(cls, Mechanism):
                found.append(name)
    return tuple(found)


def run_sequence(
    mixers: Sequence[str],
    settings: Settings,
    folder: Path,
    tasks: Sequence[SequenceTask] = TASKS,
    report: Report = lambda mixer, task, step, steps: None,
) -> list[Cell]:
    """All cells, those already in ``folder`` unchanged; ``report`` is called at every step.

    A mechanism that may not mix causally is trained only on the tasks that classify a whole sequence. A cell that fails
    holds the error, its traceback is printed to stderr, and it is tried again the next time.

    Raises:
        ArgumentError: the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    configured = json.dumps({**asdict(settings), "tasks": [repr(task) for task in tasks]}, indent=1)
    about = folder / "settings.json"
    if about.exists() and about.read_text() != configured:
        raise ArgumentError(f"folder: {str(folder)!r} holds results of other settings; name another one")
    about.write_text(configured)
    cells = []
    for mixer in mixers:
        causal = is_causal(mixer)
        jobs: list[tuple[str, Callable[[], dict[str, float]]]] = [
            (task.name, partial(_train, mixer, task, settings, report)) for task in tasks if causal or _classes(task)
        ]
        jobs.append(("cost", partial(_cost, mixer, settings)))
        cells += [_cell(folder, mixer, name, job) for name, job in jobs]
    return cells


def _cell(folder: Path, mixer: str, task: str, job: Callable[[], dict[str, float]]) -> Cell:
    path = folder / f"{mixer.replace('/', '.')}--{task.replace(' ', '-')}.json"
    if path.exists() and (old := Cell(**json.loads(path.read_text()))).error is None:
        return old
    try:
        cell = Cell(mixer, task, job(), CONFIGS.get(mixer, {}))
    except Exception as error:  # one that fails must not cost the results of the others
        if not isinstance(error, MissingExtra | ArgumentError):
            traceback.print_exc()
        cell = Cell(mixer, task, error=" ".join(f"{type(error).__name__}: {error}".split()))
    fresh = path.with_suffix(".new")  # renamed when whole, so an interruption cannot leave half a file
    fresh.write_text(json.dumps(asdict(cell), indent=1))
    fresh.replace(path)
    return cell


def _train(mixer: str, task: SequenceTask, settings: Settings, report: Report) -> dict[str, float]:
    accelerator = require("accelerate", "train").Accelerator(cpu=True)
    size = settings.batch_size(task)
    task.batch("train", 0, 1, settings.seed)  # data that is missing is found out first
    model: Any = _model(mixer, task, settings)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, settings.steps, pct_start=0.1)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    start = time.perf_counter()
    for step in range(settings.steps):
        ids, targets, weights = task.batch("train", step, size, settings.seed)
        loss = (negative_log_likelihood(model(ids), targets) * weights).sum() / weights.sum()
        if not torch.isfinite(loss):
            raise ArithmeticError(f"the loss is {float(loss)} at step {step}")
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(mixer, task.name, step + 1, settings.steps)
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        tests = [task.batch("test", i, size, settings.seed) for i in range(_TEST_BATCHES)]
        score = sum(task.score(model(batch.ids), batch) for batch in tests) / len(tests)
    return {"score": score, "seconds": seconds}


def _cost(mixer: str, settings: Settings) -> dict[str, float]:
    """Times against softmax's by turns, medians of the ratios; one sequence for decoding."""
    task = ByteText(COST_LENGTH)
    ids = task.batch("test", 0, 2, settings.seed).ids
    own = _model(mixer, task, settings).eval()
    softmax = _model("softmax", task, settings, own.causal).eval()
    numbers: dict[str, float] = {"parameters": sum(p.numel() for p in own.blocks.parameters())}
    with torch.no_grad():
        numbers["forward"] = _ratio(lambda: own(ids), lambda: softmax(ids))
    numbers["backward"] = _ratio(lambda: own(ids).sum().backward(), lambda: softmax(ids).sum().backward())
    if own.causal and all(block.mixer.state is not None for block in own.blocks):  # type: ignore[union-attr]
        with torch.no_grad():
            states = [model.stream(ids[:1])[1] for model in (own, softmax)]
            numbers["state"] = state_bytes(states[0]) / COST_LENGTH
            new = ids[:1, :1]
            numbers["decode"] = _ratio(lambda: own.stream(new, states[0]), lambda: softmax.stream(new, states[1]), 41)
    return numbers


def _ratio(run: Callable[[], Any], baseline: Callable[[], Any], repeats: int = _REPEATS) -> float:
    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    run(), baseline()  # warm
    return statistics.median(seconds(run) / seconds(baseline) for _ in range(repeats))


def _model(mixer: str, task: SequenceTask, settings: Settings, causal: bool | None = None) -> LanguageModel:
    """A decoder where the mechanism may be causal, else an encoder, which has to classify."""
    torch.manual_seed(settings.seed)
    config: Mapping[str, Any] = CONFIGS.get(mixer, {})
    causal = is_causal(mixer) if causal is None else causal
    classes = _classes(task)
    return LanguageModel(
        task.vocab_size,
        settings.dim,
        settings.depth,
        (mixer, config),
        settings.num_heads,
        max_length=task.length + 1,  # one more is decoded to measure the cost
        causal=causal,
        num_classes=classes if classes or causal else 1,
    )


@cache
def is_causal(mixer: str) -> bool:
    """Whether a mechanism, with its arguments in the study, is legitimate in a decoder.

    Raises:
        ArgumentError: it needs further arguments, or does not mix the tokens of a sequence.
    """
    if "causal-self" not in _class(mixer).patterns:
        create_mixer(mixer, causal=False, defaults=_OFFERED, **CONFIGS.get(mixer, {}))
        return False
    try:
        create_mixer(mixer, causal=True, defaults=_OFFERED, **CONFIGS.get(mixer, {}))
    except Unsupported:  # only in another of its variants
        return False
    return True


def _classes(task: SequenceTask) -> int | None:
    return getattr(task, "num_classes", None)


def _class(mixer: str) -> type[Mechanism]:
    cls = module_class(mixer)
    if not issubclass(cls, Mechanism):
        raise ArgumentError(f"mixers: {mixer!r} does not mix the tokens of a sequence")
    return cls
