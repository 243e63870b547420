"""The same small decoder, trained with one mechanism after the other on the same tasks under the same budget.

A cell is one mechanism on one task. Finished cells are written to a file at once, and are not run again; a cell that
was interrupted starts over.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regard import catalog
from regard.errors import ArgumentError, require
from regard.mechanisms import Mechanism
from regard.mechanisms.base import state_bytes
from regard.models.language import LanguageModel
from regard.tasks.metrics import negative_log_likelihood
from regard.tasks.sequence import AssociativeRecall, ByteText, Needle, SelectiveCopying, SequenceTask

TASKS: tuple[SequenceTask, ...] = (AssociativeRecall(), SelectiveCopying(), ByteText(), Needle())
_TEST_BATCHES = 8


@dataclass(frozen=True)
class Settings:
    """The budget, equal for all mechanisms."""

    steps: int = 300
    batch_size: int = 32
    dim: int = 64
    depth: int = 2
    num_heads: int = 4
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Cell:
    """One mechanism on one task; ``error`` says why there are no numbers.

    Attributes:
        score: on batches never trained on; see the task for what it means.
        parameters: of the whole decoder.
        state_bytes: of its streaming state per token, after ``length`` tokens; None if it cannot stream.
        forward, decode: seconds of one forward, and per streamed token, over softmax timed just before.
    """

    mixer: str
    task: str
    metric: str
    length: int
    score: float | None = None
    parameters: int | None = None
    state_bytes: float | None = None
    forward: float | None = None
    decode: float | None = None
    error: str | None = None


def causal_mixers() -> tuple[str, ...]:
    """Softmax and every mechanism of the catalogue that works and may mix tokens causally."""
    found = ((s.slug, s.load()) for s in catalog.systems(status="works") if "mechanism" in s.kinds)
    named = [n for n, c in found if isinstance(c, type) and issubclass(c, Mechanism) and "causal-self" in c.patterns]
    return ("softmax", *named)


def run_sequence(
    mixers: Sequence[str],
    settings: Settings,
    store: Path,
    tasks: Sequence[SequenceTask] = TASKS,
    report: Callable[[str, str, int, int], None] = lambda mixer, task, step, steps: None,
) -> list[Cell]:
    """All cells, those already in the JSON file ``store`` unchanged; ``report`` is called at every step.

    Raises:
        ArgumentError: the file holds results of other settings.
    """
    cells: list[Cell] = []
    configured = {**asdict(settings), "tasks": [repr(task) for task in tasks]}
    if store.exists():
        old = json.loads(store.read_text())
        if old["settings"] != configured:
            raise ArgumentError(f"store: {str(store)!r} holds results of other settings; name another file")
        cells = [Cell(**cell) for cell in old["cells"] if cell["error"] is None]  # failures get another try
    for mixer in mixers:
        for task in tasks:
            if any((cell.mixer, cell.task) == (mixer, task.name) for cell in cells):
                continue
            try:
                cells.append(_cell(mixer, task, settings, report))
            except Exception as error:  # one mechanism that fails must not cost the results of the others
                why = f"{type(error).__name__}: {error}"
                cells.append(Cell(mixer, task.name, task.metric, task.length, error=" ".join(why.split())))
            fresh = store.with_name(store.name + ".new")  # replaced whole, so an interruption cannot spoil it
            fresh.write_text(json.dumps({"settings": configured, "cells": [asdict(c) for c in cells]}, indent=1))
            fresh.replace(store)
    return [cell for cell in cells if cell.mixer in mixers]


def _cell(mixer: str, task: SequenceTask, settings: Settings, report: Callable[[str, str, int, int], None]) -> Cell:
    accelerator = require("accelerate", "hf").Accelerator(cpu=True)
    model = _model(mixer, task, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(settings.steps):
        ids, targets, weights = task.batch("train", step, settings.batch_size, settings.seed)
        loss = (negative_log_likelihood(model(ids), targets) * weights).sum() / weights.sum()
        if not torch.isfinite(loss):
            raise ArithmeticError(f"the loss is {float(loss)} at step {step}")
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(mixer, task.name, step + 1, settings.steps)
    model.eval()
    with torch.no_grad():
        tests = [task.batch("test", i, settings.batch_size, settings.seed) for i in range(_TEST_BATCHES)]
        score = sum(task.score(model(batch.ids), batch) for batch in tests) / len(tests)
        softmax = _times(_model("softmax", task, settings).eval(), tests[0].ids)
        own = _times(model, tests[0].ids)
    streams = own[1] is not None and softmax[1] is not None
    return Cell(
        mixer,
        task.name,
        task.metric,
        task.length,
        score,
        sum(p.numel() for p in model.parameters()),
        own[2],
        own[0] / softmax[0],
        own[1] / softmax[1] if streams else None,
    )


def _model(mixer: str, task: SequenceTask, settings: Settings) -> LanguageModel:
    torch.manual_seed(settings.seed)
    return LanguageModel(
        task.vocab_size, settings.dim, settings.depth, mixer, settings.num_heads, max_length=task.length
    )


def _times(model: Any, ids: torch.Tensor) -> tuple[float, Any, float | None]:
    """Seconds of a forward, seconds and bytes of state per streamed token (None where it cannot stream)."""
    model(ids)
    start = time.perf_counter()
    model(ids)
    forward = time.perf_counter() - start
    if any(block.mixer.state is None for block in model.blocks):
        return forward, None, None
    row, state = ids[:1], None
    start = time.perf_counter()
    for t in range(row.shape[1]):
        _, state = model.stream(row[:, t : t + 1], state)
    return forward, (time.perf_counter() - start) / row.shape[1], state_bytes(state) / row.shape[1]


def markdown(cells: Sequence[Cell], settings: Settings) -> str:
    """The settings, one row per cell, and what the columns mean."""

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    lines = [
        f"Settings: {', '.join(f'{k} {v}' for k, v in asdict(settings).items())}. Accuracy: higher is better; bits per "
        "byte: lower. One seed, so small differences mean nothing. State: bytes per token after the task's length. "
        "Forward and decode: time over softmax's; decode is one sequence, token by token.",
        "",
        "| mechanism | task | metric | score | parameters | state B/token | forward | decode |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for c in cells:
        rest = (number(c.parameters, 0), number(c.state_bytes, 0), number(c.forward, 2), number(c.decode, 2))
        score = number(c.score, 3) if c.error is None else "failed: " + c.error.replace("|", "/")
        lines.append(f"| {c.mixer} | {c.task} | {c.metric} | {score} | {' | '.join(rest)} |")
    return "\n".join(lines) + "\n"
