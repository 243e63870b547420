"""The results of `regard study vision` as a table in Markdown and as a page."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean

from regard.study import cells_page
from regard.study.cells import Cell
from regard.study.cells_page import MISSING, Column, Row, Value, figure, rows
from regard.study.vision import BUDGET, SIZE, TRANSFER, Settings, describe
from regard.tasks.images import ImageTask

_COSTS = (("parameters", 0), ("megamacs", 1), ("forward", 2), ("step", 2))


def markdown(cells: Sequence[Cell], settings: Settings, tasks: Sequence[ImageTask]) -> str:
    """One row per backbone, what the columns mean, and why numbers are missing."""
    return cells_page.markdown(cells, "backbone", _columns(tasks), _notes(cells, settings, tasks))


def page(cells: Sequence[Cell], settings: Settings, tasks: Sequence[ImageTask]) -> str:
    """The same as one HTML page that needs nothing else."""
    title, name = f"One small budget, {len(rows(cells))} vision backbones", "regard study vision"
    return cells_page.page(cells, "backbone", _columns(tasks), _notes(cells, settings, tasks), title, name, describe)


def _columns(tasks: Sequence[ImageTask]) -> list[Column]:
    scores = [cells_page.score(task.name, task.name, task.metric) for task in tasks]
    sizes = [_mean(size, tasks) for size in (SIZE, *TRANSFER)]
    return [*scores, *sizes, *(figure(name, digits=digits) for name, digits in _COSTS)]


def _mean(size: int, tasks: Sequence[ImageTask]) -> Column:
    """The mean score over all tasks with images of a size, or a word where the backbone refuses it."""
    name = "score" if size == SIZE else f"score@{size}"

    def value(row: Row) -> Value:
        found = [row[task.name] for task in tasks if task.name in row]
        if any(name in cell.remarks for cell in found):
            return "refused"
        scores = [cell.numbers[name] for cell in found if name in cell.numbers]
        return mean(scores) if len(scores) == len(tasks) else None

    def reason(row: Row) -> str | None:
        return next((cell.remarks[name] for cell in row.values() if name in cell.remarks), None)

    return Column(f"at {size}", value, "mean", 3, "highest", reason)


def _notes(cells: Sequence[Cell], settings: Settings, tasks: Sequence[ImageTask]) -> list[str]:
    chances = ", ".join(f"{task.name} {1 / task.num_classes:.3g}" for task in tasks)
    notes = [
        f"Settings: {', '.join(f'{k} {v}' for k, v in asdict(settings).items())}; {SIZE}×{SIZE} grey images.",
        f"One seed, and networks of {BUDGET:g} million multiply-adds: small differences mean nothing, and what needs "
        "large images, long training or many parameters does not show. Top-1 accuracy; "
        f"guessing gives: {chances}.",
        f"At {SIZE}: the mean over the tasks. At {' and '.join(str(s) for s in TRANSFER)}: the same networks, not "
        "trained further, on the same images resampled.",
        "Megamacs: millions of multiply-adds of one image, in convolutions and matrix products (Fourier transforms are "
        "not among them). Forward, step (forward and backward): time of a batch over vit's; medians of ratios.",
        cells_page.machine_note(),
    ]
    for name, row in rows(cells).items():
        reasons = {key: text for cell in row.values() for key, text in cell.remarks.items()}
        notes += [f"{name} at {key.partition('@')[2]} {MISSING} {text}" for key, text in reasons.items()]
    return [*notes, *cells_page.config_notes(cells), *cells_page.error_notes(cells)]
