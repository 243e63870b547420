"""The results of `regard study sequence` as a table in Markdown and as a page."""

from collections.abc import Sequence
from dataclasses import asdict

from regard import catalog
from regard.study import cells_page
from regard.study.cells_page import Column, figure, rows
from regard.study.sequence import COST_LENGTH, LEFT_OUT, Cell, Settings, is_causal
from regard.tasks.sequence import SequenceTask

_COSTS = (("parameters", 0), ("state", 0), ("forward", 2), ("backward", 2), ("decode", 2))


def markdown(cells: Sequence[Cell], settings: Settings, tasks: Sequence[SequenceTask]) -> str:
    """Settings, one row per mechanism, what the columns mean, and why cells are missing."""
    return cells_page.markdown(cells, "mechanism", _columns(tasks), _notes(cells, settings))


def page(cells: Sequence[Cell], settings: Settings, tasks: Sequence[SequenceTask]) -> str:
    """The same as one HTML page that needs nothing else."""
    title, name = f"One small model, {len(rows(cells))} mechanisms", "regard study sequence"
    return cells_page.page(cells, "mechanism", _columns(tasks), _notes(cells, settings), title, name, _summary)


def _columns(tasks: Sequence[SequenceTask]) -> list[Column]:
    """Scores, of which bits are better the smaller they are, and costs."""
    scores = [cells_page.score(t.name, t.name, t.metric, "lowest" if t.metric == "bits" else "highest") for t in tasks]
    return [*scores, *(figure(name, digits=digits) for name, digits in _COSTS)]


def _summary(mixer: str) -> str:
    slug = mixer.partition("/")[0]
    return catalog.get(slug).summary if slug in catalog.names() else "the baseline"


def _notes(cells: Sequence[Cell], settings: Settings) -> list[str]:
    notes = [
        f"Settings: {', '.join(f'{k} {v}' for k, v in asdict(settings).items())}.",
        "One seed: small differences mean nothing. Accuracy and NDCG: higher is better; bits (per byte): lower.",
        f"Parameters: of the layers, without embeddings. State: bytes per token after {COST_LENGTH} tokens.",
        f"Forward, backward: time over softmax's at {COST_LENGTH} tokens; decode: of one more. Medians of ratios.",
        cells_page.machine_note(),
    ]
    noncausal = [m for m in rows(cells) if m != "softmax" and not is_causal(m)]
    if noncausal:
        notes.append(f"Noncausal, so only classification applies: {', '.join(noncausal)}.")
    notes += [f"Left out: {mixer} {why}." for mixer, why in LEFT_OUT.items()]
    return [*notes, *cells_page.config_notes(cells), *cells_page.error_notes(cells)]
