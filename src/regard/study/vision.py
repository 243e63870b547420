"""Every vision backbone, shrunk to the same multiply-adds, trained by the same recipe on the same small images.

A cell is one backbone on one task, or its cost; several processes may share one folder (give them other backbones).
What has been trained is also tested on the same images at other sizes, where the backbone takes them.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regard import catalog
from regard.errors import ArgumentError, ShapeError
from regard.mechanisms.registry import create
from regard.models.vision.backbone import Backbone
from regard.models.vision.plain import Plain
from regard.study.cells import Cell, Outcome, Report, cell, open_folder, ratio, train
from regard.tasks.images import TASKS, ImageTask, resample, top1

#: side of the images of training, and the other sides of tests
SIZE, TRANSFER = 64, (48, 96)
#: millions of multiply-adds per image that every backbone spends, within a tenth
BUDGET = 12.0
#: trained on the same tasks, without an entry in the catalogue
BASELINES: dict[str, type[Backbone]] = {"vit": Plain, "cnn": Plain}

_DEPTHS, _HEADS = (1, 1, 2, 1), (1, 2, 4, 8)


def _dims(first: int, stages: int = 4) -> tuple[int, ...]:
    return tuple(first * 2**stage for stage in range(stages))


#: Arguments that fit the budget: strides and blocks as published; windows, groups and kernels as small as the grids of
#: a 64×64 image ask for; the width does the rest. Where the last grid (2×2) is too small for a mechanism at all, three
#: stages stand for four.
SHRUNK: dict[str, dict[str, Any]] = {
    "vit": {"img_size": SIZE, "patch_size": 8, "dim": 64, "depth": 3, "num_heads": 4},
    "cnn": {"img_size": SIZE, "patch_size": 8, "dim": 64, "depth": 5, "mixer": "conv"},
    "l2vit/model": {"dims": _dims(23), "depths": _DEPTHS, "num_heads": _HEADS, "window_size": 4},
    "mala/model": {"dims": _dims(20), "depths": _DEPTHS, "num_heads": _HEADS, "projection": 320},
    "agent-attention/deit": {
        "img_size": SIZE,
        "patch_size": 8,
        "dim": 68,
        "depth": 3,
        "num_heads": 4,
        "num_agents": 16,
    },
    "agent-attention/pvt": {
        "img_size": SIZE,
        "embed_dims": _dims(27),
        "num_heads": _HEADS,
        "mlp_ratios": (4, 4, 4, 4),
        "depths": _DEPTHS,
        "num_agents": (4, 4, 4, 4),
        "sr_ratios": (4, 2, 1, 1),
    },
    "agent-attention/swin": {
        "img_size": SIZE,
        "embed_dim": 21,
        "depths": (2, 2, 2, 2),
        "num_heads": _HEADS,
        "num_agents": (4, 4, 4, 4),
        "agent_blocks": (2, 2, 0, 0),
        "window_size": 4,
    },
    "cas-vit": {"dims": _dims(23), "depths": _DEPTHS, "distillation": False},
    "crossformer": {
        "embed_dim": 16,
        "depths": (2, 2, 5, 2),
        "num_heads": _HEADS,
        "group_size": (4, 4, 4, 2),
        "interval": (4, 2, 1, 1),
    },
    "davit": {"embed_dims": _dims(19), "depths": (1, 1, 1, 1), "num_heads": _HEADS, "window_size": 4},
    "dinat": {
        "embed_dim": 22,
        "depths": (2, 2, 2),
        "num_heads": (1, 2, 4),
        "kernel_size": 3,
        "dilations": ((1, 4), (1, 2), (1, 1)),
    },
    "dualtoken-vit": {
        "embed_dims": _dims(28, 3),
        "depths": (1, 2, 3),
        "num_heads": (1, 2, 4),
        "mlp_ratios": (4, 4, 4),
        "token_grid": (4, 4),
    },
    "duoformer/resnet": {"dims": _dims(26), "depths": (1, 1, 1, 1), "bottleneck": False, "stem_dim": 26},
    "favit": {
        "embed_dims": _dims(16, 3),
        "depths": (2, 2, 6),
        "num_heads": (1, 2, 4),
        "mlp_ratios": (8, 6, 4),
        "sr_ratios": (8, 4, 2),
        "window_size": 4,
    },
    "gc-vit": {
        "dim": 20,
        "depths": (2, 2, 2, 2),
        "num_heads": _HEADS,
        "window_size": (4, 4, 4, 2),
        "resolution": SIZE,
    },
    "halonet": {
        "dims": _dims(26),
        "depths": _DEPTHS,
        "num_heads": _HEADS,
        "block_size": 4,
        "halo_size": 1,
        "stem_dim": 26,
    },
    "maxvit": {
        "embed_dims": _dims(16, 3),
        "depths": (1, 1, 1),
        "stem_width": 16,
        "partition_size": 4,
        "head_hidden": 128,
        "attention": {"head_dim": 8},
    },
    "moh/vit": {
        "embed_dims": _dims(20),
        "num_heads": (4, 4, 4, 8),
        "depths": _DEPTHS,
        "mlp_ratios": (4, 4, 4, 4),
        "pretrain_size": SIZE,
        "shared_heads": (3, 3, 2, 4),
        "routed_heads": (0, 0, 1, 2),
    },
    "overlock": {
        "dims": _dims(18),
        "depths": (1, 1, 1, 1),
        "sub_depths": (1, 1),
        "kernel_sizes": (9, 9, 7, 5),
        "num_heads": (2, 4),
        "projection": 144,
    },
    "ppma": {"embed_dims": _dims(20), "depths": _DEPTHS, "num_heads": _HEADS, "projection": 320},
    "s2aformer": {"dims": _dims(22), "depths": _DEPTHS},
    "segman": {
        "image_size": SIZE,
        "embed_dims": _dims(20),
        "depths": _DEPTHS,
        "num_heads": _HEADS,
        "kernel_sizes": (5, 5, 3, 1),
        "projection": 320,
    },
    "shvit": {"dims": (104, 208, 312), "depths": (1, 2, 3), "partial_dims": (26, 52, 78)},
    "spectformer": {"img_size": SIZE, "patch_size": 8, "dim": 64, "depth": 4, "alpha": 2, "num_heads": 4},
    "spectformer/h": {
        "img_size": SIZE,
        "dims": _dims(16),
        "depths": _DEPTHS,
        "num_heads": _HEADS,
        "mlp_ratios": (4, 4, 4, 4),
        "stem_dim": 16,
    },
    "tic-msa-conv/model": {"dims": _dims(19), "depths": _DEPTHS, "num_heads": _HEADS},
    "transnext": {
        "embed_dims": _dims(20),
        "num_heads": _HEADS,
        "depths": _DEPTHS,
        "mlp_ratios": (4, 4, 4, 4),
        "pretrain_size": SIZE,
    },
}

#: what the study leaves out, and why
LEFT_OUT: dict[str, str] = {}
_REPEATS = 7


@dataclass(frozen=True)
class Settings:
    """The budget, equal for all backbones.

    Attributes:
        steps: of training per task.
        batch_size: images per step.
        lr: the largest, of a one-cycle schedule.
        seed: of weights and data.
    """

    steps: int = 250
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {getattr(self, name)}")


def all_backbones() -> tuple[str, ...]:
    """The baselines, and every backbone of the catalogue that works and is in `SHRUNK`."""
    found = list(BASELINES)
    for system in catalog.systems(status="works"):
        for part in (None, *system.parts):
            name = system.slug if part is None else f"{system.slug}/{part}"
            cls = system.load(part)
            if name in SHRUNK and isinstance(cls, type) and issubclass(cls, Backbone):
                found.append(name)
    return tuple(found)


def network(name: str, num_classes: int) -> Backbone:
    """A backbone as the study trains it: for grey images, without stochastic depth.

    Raises:
        ArgumentError: the name is not in `SHRUNK`.
    """
    if name not in SHRUNK:
        raise ArgumentError(f"backbones: expected some of {', '.join(SHRUNK)}, got {name!r}")
    config = SHRUNK[name] | {"num_classes": num_classes, "in_chans": 1, "drop_path_rate": 0.0}
    built = BASELINES[name](**config) if name in BASELINES else create(name, **config)
    assert isinstance(built, Backbone)
    return built


@cache
def megamacs(name: str) -> float:
    """Millions of multiply-adds of one image in convolutions and matrix products, FFTs not among them."""
    with torch.device("meta"):
        model, images = network(name, 10).eval(), torch.empty(1, 1, SIZE, SIZE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() / 2e6


def run_vision(
    backbones: Sequence[str],
    settings: Settings,
    folder: Path,
    tasks: Sequence[ImageTask] = TASKS,
    report: Report = lambda backbone, task, step, steps: None,
) -> list[Cell]:
    """All cells, those already in ``folder`` unchanged; ``report`` is called at every step.

    Numbers of a task: its ``score`` on the test images; ``score@48`` and so on with the images resampled to other
    sides, where the network takes them or has a `resize` that fits it to them (the cell's remarks say why not);
    ``loss`` of the last step and ``seconds`` of training. Numbers of "cost": ``parameters``, ``megamacs`` per image,
    and ``forward`` and ``step`` (forward and backward) time of a batch over the plain transformer's.

    Raises:
        ArgumentError: a name is not in `SHRUNK`; the folder holds results of other settings.
    """
    for name in backbones:
        network(name, 2)  # what does not exist is refused before anything is trained
    open_folder(folder, {**asdict(settings), "tasks": [repr(task) for task in tasks]})
    cells = []
    for name in backbones:
        jobs: list[tuple[str, Callable[[], Outcome]]] = [
            (task.name, partial(_train, name, task, settings, report)) for task in tasks
        ]
        jobs.append(("cost", partial(_cost, name, settings)))
        cells += [cell(folder, name, task, SHRUNK[name], job) for task, job in jobs]
    return cells


def _train(name: str, task: ImageTask, settings: Settings, report: Report) -> Outcome:
    task.batch("train", 0, 1, settings.seed)  # data that is missing is found out first
    torch.manual_seed(settings.seed)
    last = 0.0

    def loss(model: Any, step: int) -> Tensor:
        nonlocal last
        images, targets = task.batch("train", step, settings.batch_size, settings.seed)
        value = F.cross_entropy(model(images), targets)
        last = value.item()
        return value

    model, seconds = train(
        network(name, task.num_classes),
        loss,
        settings.steps,
        settings.lr,
        lambda step: report(name, task.name, step, settings.steps),
    )
    numbers, remarks = {"score": _test(model, task, settings, task.size)}, {}
    for size in TRANSFER:
        try:
            resized = deepcopy(model).resize(size) if hasattr(model, "resize") else model
            numbers[f"score@{size}"] = _test(resized, task, settings, size)
        except ShapeError as error:
            remarks[f"score@{size}"] = " ".join(str(error).split())
    return Outcome(numbers | {"loss": last, "seconds": seconds}, remarks)


@torch.no_grad()
def _test(model: Any, task: ImageTask, settings: Settings, size: int) -> float:
    correct = 0.0
    for index in range(-(-task.test_size // settings.batch_size)):
        images, targets = task.batch("test", index, settings.batch_size, settings.seed)
        count = min(len(targets), task.test_size - index * settings.batch_size)
        images = images if size == task.size else resample(images, size)
        correct += count * top1(model(images[:count]), targets[:count])
    return correct / task.test_size


def _cost(name: str, settings: Settings) -> Outcome:
    """Times against the plain transformer's by turns, medians of the ratios."""
    torch.manual_seed(settings.seed)
    own, plain = network(name, 10), network("vit", 10)
    images = torch.randn(settings.batch_size, 1, SIZE, SIZE)
    numbers = {"parameters": float(sum(p.numel() for p in own.parameters())), "megamacs": megamacs(name)}
    numbers["step"] = ratio(lambda: own(images).sum().backward(), lambda: plain(images).sum().backward(), _REPEATS)
    own.eval(), plain.eval()
    with torch.no_grad():
        numbers["forward"] = ratio(lambda: own(images), lambda: plain(images), _REPEATS)
    return Outcome(numbers)


def describe(name: str) -> str:
    """What a backbone is, in a line."""
    if name in BASELINES:
        return "a plain vision transformer" if name == "vit" else "the same with 7×7 filters in place of attention"
    return catalog.get(name.partition("/")[0]).summary
