"""The same small model, trained with one mechanism after the other on the same tasks under the same budget.

A cell is one mechanism on one task, or its cost; several processes may share one folder (give them other mechanisms).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.errors import ArgumentError, Unsupported
from regard.mechanisms import Mechanism, state_bytes
from regard.mechanisms.registry import create_mixer, module_class
from regard.models.language import LanguageModel
from regard.study.cells import Cell, Outcome, Report, cell, open_folder, ratio, train
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
    "titans/memory-as-context": "is attention beside the memory of `titans`, at twice its time",
    "titans/memory-as-gate": "is attention beside the memory of `titans`, at twice its time",
    "titans/memory-as-layer": "is attention after the memory of `titans`, at twice its time",
    "vmoba": "has a fixed grid, that of a video",
}
COST_LENGTH = 512
_TEST_BATCHES = 16
_OFFERED = {"dim": 16, "num_heads": 2, "max_length": 64, "num_layers": 1, "layer_idx": 0}
_REPEATS = 7


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

    Numbers of a task: its ``score`` on sequences never trained on, and the ``seconds`` of training; of "cost"
    ``parameters`` of a model without embeddings, ``forward`` and ``backward`` time over softmax's, and where it streams
    ``decode`` time over softmax's and ``state``, bytes per token after `COST_LENGTH` tokens. A mechanism that may not
    mix causally is trained only on the tasks that classify a whole sequence.

    Raises:
        ArgumentError: the folder holds results of other settings.
    """
    open_folder(folder, {**asdict(settings), "tasks": [repr(task) for task in tasks]})
    cells = []
    for mixer in mixers:
        causal = is_causal(mixer)
        jobs: list[tuple[str, Callable[[], Outcome]]] = [
            (task.name, partial(_train, mixer, task, settings, report)) for task in tasks if causal or _classes(task)
        ]
        jobs.append(("cost", partial(_cost, mixer, settings)))
        cells += [cell(folder, mixer, name, CONFIGS.get(mixer, {}), job) for name, job in jobs]
    return cells


def _train(mixer: str, task: SequenceTask, settings: Settings, report: Report) -> Outcome:
    size = settings.batch_size(task)
    task.batch("train", 0, 1, settings.seed)  # data that is missing is found out first

    def loss(model: Any, step: int) -> Tensor:
        ids, targets, weights = task.batch("train", step, size, settings.seed)
        return (negative_log_likelihood(model(ids), targets) * weights).sum() / weights.sum()

    model, seconds = train(
        _model(mixer, task, settings),
        loss,
        settings.steps,
        settings.lr,
        lambda step: report(mixer, task.name, step, settings.steps),
    )
    with torch.no_grad():
        tests = [task.batch("test", i, size, settings.seed) for i in range(_TEST_BATCHES)]
        score = sum(task.score(model(batch.ids), batch) for batch in tests) / len(tests)
    return Outcome({"score": score, "seconds": seconds})


def _cost(mixer: str, settings: Settings) -> Outcome:
    """Times against softmax's by turns, medians of the ratios; one sequence for decoding."""
    task = ByteText(COST_LENGTH)
    ids = task.batch("test", 0, 2, settings.seed).ids
    own = _model(mixer, task, settings).eval()
    softmax = _model("softmax", task, settings, own.causal).eval()
    numbers: dict[str, float] = {"parameters": sum(p.numel() for p in own.blocks.parameters())}
    with torch.no_grad():
        numbers["forward"] = ratio(lambda: own(ids), lambda: softmax(ids), _REPEATS)
    numbers["backward"] = ratio(lambda: own(ids).sum().backward(), lambda: softmax(ids).sum().backward(), _REPEATS)
    if own.causal and all(block.mixer.state is not None for block in own.blocks):  # type: ignore[union-attr]
        with torch.no_grad():
            states = [model.stream(ids[:1])[1] for model in (own, softmax)]
            numbers["state"] = state_bytes(states[0]) / COST_LENGTH
            new = ids[:1, :1]
            numbers["decode"] = ratio(lambda: own.stream(new, states[0]), lambda: softmax.stream(new, states[1]), 41)
    return Outcome(numbers)


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
