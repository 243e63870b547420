"""What studies that train share: results as files, one training loop, and times as ratios.

A cell is one network on one task, or its cost. Each finished cell is a file in the results' folder and is not run
again, so a study resumes where it stopped, and several processes may share one folder.
"""

import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, MissingExtra, require

#: called at every step with the name of what is trained, the task, the step and the number of steps
Report = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Cell:
    """A result; ``error`` says why there are no numbers.

    Attributes:
        mixer: name of what is compared, a mechanism or a backbone.
        task: name of the task, or "cost".
        numbers: what was measured, by name.
        config: arguments other than its defaults.
        remarks: why a single number is missing, by its name.
    """

    mixer: str
    task: str
    numbers: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    remarks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a job gives: `Cell.numbers` and `Cell.remarks`."""

    numbers: dict[str, float]
    remarks: dict[str, str] = field(default_factory=dict)


def open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a study, or go on in one of the same settings.

    Raises:
        ArgumentError: the folder holds results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    configured = json.dumps(settings, indent=1)
    about = folder / "settings.json"
    if about.exists() and about.read_text() != configured:
        raise ArgumentError(f"folder: {str(folder)!r} holds results of other settings; name another one")
    about.write_text(configured)


def cell(folder: Path, mixer: str, task: str, config: Mapping[str, Any], job: Callable[[], Outcome]) -> Cell:
    """The cell in the folder, or a new one.

    A job that fails makes a cell that holds the error; its traceback is printed to stderr, and it is tried again the
    next time.
    """
    path = folder / f"{mixer.replace('/', '.')}--{task.replace(' ', '-')}.json"
    if path.exists() and (old := Cell(**json.loads(path.read_text()))).error is None:
        return old
    try:
        outcome = job()
        new = Cell(mixer, task, outcome.numbers, {**config}, remarks=outcome.remarks)
    except Exception as error:  # one that fails must not cost the results of the others
        if not isinstance(error, MissingExtra | ArgumentError):
            traceback.print_exc()
        new = Cell(mixer, task, error=" ".join(f"{type(error).__name__}: {error}".split()))
    fresh = path.with_suffix(".new")  # renamed when whole, so an interruption cannot leave half a file
    fresh.write_text(json.dumps(asdict(new), indent=1))
    fresh.replace(path)
    return new


def train(
    network: nn.Module,
    loss: Callable[[Any, int], Tensor],
    steps: int,
    lr: float,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[Any, float]:
    """AdamW under one cycle of the learning rate on the CPU.

    Args:
        loss: of the network at a step, from 0. on_step: called after each, from 1.

    Returns:
        The network in eval mode, and the seconds of training.

    Raises:
        ArithmeticError: the loss is not finite.
        MissingExtra: accelerate is not installed.
    """
    accelerator = require("accelerate", "train").Accelerator(cpu=True)
    optimizer: Any = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    model, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    start = time.perf_counter()
    for step in range(steps):
        value = loss(model, step)
        if not torch.isfinite(value):
            raise ArithmeticError(f"the loss is {float(value)} at step {step}")
        accelerator.backward(value)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1)
    seconds = time.perf_counter() - start
    return model.eval(), seconds


def ratio(run: Callable[[], Any], baseline: Callable[[], Any], repeats: int) -> float:
    """How much longer than a baseline, the two by turns: the median of the ratios."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    run(), baseline()  # warm
    return statistics.median(seconds(run) / seconds(baseline) for _ in range(repeats))
