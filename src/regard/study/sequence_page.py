"""The results of `regard study sequence` as a table in Markdown and as a page."""

import html
from collections.abc import Sequence
from dataclasses import asdict

import torch

from regard import catalog
from regard.study.machine import Machine
from regard.study.sequence import COST_LENGTH, LEFT_OUT, Cell, Settings, is_causal
from regard.tasks.sequence import SequenceTask

_COSTS = (("parameters", 0), ("state", 0), ("forward", 2), ("backward", 2), ("decode", 2))


def markdown(cells: Sequence[Cell], settings: Settings, tasks: Sequence[SequenceTask]) -> str:
    """Settings, one row per mechanism, what the columns mean, and why cells are missing."""
    header = ["mechanism", *(f"{t.name} ({t.metric})" for t in tasks), *(name for name, _ in _COSTS)]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    for mixer, found in _by_mixer(cells).items():
        scores = [_score(found.get(task.name)) for task in tasks]
        costs = [_number(found.get("cost"), name, digits) for name, digits in _COSTS]
        lines.append("| " + " | ".join([mixer, *scores, *costs]) + " |")
    notes = [f"- {line}" for line in _notes(cells, settings)]
    return "\n".join([*lines, "", *notes]) + "\n"


def page(cells: Sequence[Cell], settings: Settings, tasks: Sequence[SequenceTask]) -> str:
    """The same as one HTML page that needs nothing else; scores are coloured from the worst to the best of a column."""
    table = _by_mixer(cells)
    best = {task.name: _range(cells, task) for task in tasks}
    rows = []
    for mixer, found in table.items():
        cols = [f'<td title="{html.escape(_summary(mixer))}">{html.escape(mixer)}</td>']
        for task in tasks:
            cell = found.get(task.name)
            share = _share(cell, *best[task.name])
            style = "" if share is None else f' style="--share:{share:.2f}"'
            title = "" if cell is None or cell.error is None else f' title="{html.escape(cell.error)}"'
            cols.append(f"<td{style}{title}>{html.escape(_score(cell))}</td>")
        cols += [f"<td>{_number(found.get('cost'), name, digits)}</td>" for name, digits in _COSTS]
        rows.append(f"<tr>{''.join(cols)}</tr>")
    heads = [f"<th>{html.escape(t.name)}<small>{html.escape(t.metric)}</small></th>" for t in tasks]
    heads += [f"<th>{name}</th>" for name, _ in _COSTS]
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in _notes(cells, settings))
    return _PAGE.format(heads="".join(heads), rows="\n".join(rows), notes=notes, count=len(table))


def _by_mixer(cells: Sequence[Cell]) -> dict[str, dict[str, Cell]]:
    table: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        table.setdefault(cell.mixer, {})[cell.task] = cell
    return table


def _score(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    return "failed" if cell.error is not None else f"{cell.numbers['score']:.3f}"


def _number(cell: Cell | None, name: str, digits: int) -> str:
    return "–" if cell is None or name not in cell.numbers else f"{cell.numbers[name]:,.{digits}f}"


def _range(cells: Sequence[Cell], task: SequenceTask) -> tuple[float, float]:
    """The worst and the best score of a task; bits are better the smaller they are."""
    scores = [c.numbers["score"] for c in cells if c.task == task.name and c.error is None] or [0.0]
    return (max(scores), min(scores)) if task.metric == "bits" else (min(scores), max(scores))


def _share(cell: Cell | None, worst: float, best: float) -> float | None:
    if cell is None or cell.error is not None or worst == best:
        return None
    return (cell.numbers["score"] - worst) / (best - worst)


def _summary(mixer: str) -> str:
    slug = mixer.partition("/")[0]
    return catalog.get(slug).summary if slug in catalog.names() else "the baseline"


def _notes(cells: Sequence[Cell], settings: Settings) -> list[str]:
    machine = Machine.here(torch.device("cpu"))
    notes = [
        f"Settings: {', '.join(f'{k} {v}' for k, v in asdict(settings).items())}.",
        "One seed: small differences mean nothing. Accuracy and NDCG: higher is better; bits (per byte): lower.",
        f"Parameters: of the layers, without embeddings. State: bytes per token after {COST_LENGTH} tokens.",
        f"Forward, backward: time over softmax's at {COST_LENGTH} tokens; decode: of one more. Medians of ratios.",
        f"Machine: {machine.processor}, {machine.cores} cores, torch {machine.versions.get('torch')}.",
    ]
    noncausal = [m for m in _by_mixer(cells) if m != "softmax" and not is_causal(m)]
    if noncausal:
        notes.append(f"Noncausal, so only classification applies: {', '.join(noncausal)}.")
    notes += [f"Left out: {mixer} {why}." for mixer, why in LEFT_OUT.items()]
    for mixer, found in _by_mixer(cells).items():
        if config := next((c.config for c in found.values() if c.config), None):
            notes.append(f"{mixer} has {', '.join(f'{k}={v!r}' for k, v in config.items())}.")
    notes += [f"{c.mixer}, {c.task}: {c.error}" for c in cells if c.error is not None]
    return notes


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>regard study sequence</title>
<style>
:root {{ --page: #fbfbfd; --text: #16181d; --soft: #626b7a; --line: #e3e6ec; --best: #3b82f6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #101217; --text: #e8eaf0; --soft: #99a2b3; --line: #2a2f3a; --best: #4f7fd6; }}
}}
body {{ margin: 0 auto; padding: 2rem 1.2rem; max-width: 1300px; background: var(--page); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .3rem; }}
.soft, li, small {{ color: var(--soft); }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th small {{ display: block; font-weight: 400; }}
th:first-child, td:first-child {{ text-align: left; }}
td[style] {{ background: color-mix(in srgb, var(--best) calc(var(--share) * 45%), transparent); }}
</style>
</head>
<body>
<h1>One small model, {count} mechanisms</h1>
<p class="soft">The deeper the colour, the nearer to the best score of the column.</p>
<div class="scroll"><table>
<thead><tr><th>mechanism</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<ul>{notes}</ul>
</body>
</html>
"""
