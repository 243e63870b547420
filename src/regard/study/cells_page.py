"""Cells as a table in Markdown and as a page: a row for everything compared, a column for every figure."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from regard.study.cells import Cell
from regard.study.machine import Machine

MISSING = "–"
#: the cells of one row by their task
Row = Mapping[str, Cell]
Value = float | str | None


@dataclass(frozen=True)
class Column:
    """A figure of every row.

    Attributes:
        title, note: of the column; the note is small.
        value: of a row: a number, a word that stands for it, or None.
        digits: after the point.
        best: which numbers are coloured: the largest, the smallest, or none.
        title_of: what a pointer over a value shows.
    """

    title: str
    value: Callable[[Row], Value]
    note: str = ""
    digits: int = 2
    best: Literal["highest", "lowest"] | None = None
    title_of: Callable[[Row], str | None] = lambda row: None

    def text(self, row: Row) -> str:
        value = self.value(row)
        if value is None:
            return MISSING
        return value if isinstance(value, str) else f"{value:,.{self.digits}f}"


def score(title: str, task: str, note: str, best: Literal["highest", "lowest"] = "highest") -> Column:
    """The score of a task; a cell that failed says so."""

    def value(row: Row) -> Value:
        found = row.get(task)
        return None if found is None else "failed" if found.error is not None else found.numbers["score"]

    return Column(title, value, note, 3, best, lambda row: row[task].error if task in row else None)


def figure(name: str, task: str = "cost", note: str = "", digits: int = 2) -> Column:
    """A number of a cell under its own name."""
    return Column(name, lambda row: row[task].numbers.get(name) if task in row else None, note, digits)


def rows(cells: Sequence[Cell]) -> dict[str, dict[str, Cell]]:
    """Cells by what they are about, then by task."""
    table: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        table.setdefault(cell.mixer, {})[cell.task] = cell
    return table


def markdown(cells: Sequence[Cell], heading: str, columns: Sequence[Column], notes: Sequence[str]) -> str:
    """One row per mechanism or network, then the notes as a list."""
    header = [heading, *(f"{c.title} ({c.note})" if c.note else c.title for c in columns)]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * len(columns) + "|"]
    lines += ["| " + " | ".join([name, *(c.text(row) for c in columns)]) + " |" for name, row in rows(cells).items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def page(
    cells: Sequence[Cell],
    heading: str,
    columns: Sequence[Column],
    notes: Sequence[str],
    title: str,
    name: str,
    about: Callable[[str], str],
) -> str:
    """The same as one HTML page that needs nothing else; colours run from the worst to the best of a column.

    Args:
        title: of the page's text. name: of the page. about: what a pointer over a row's name shows.
    """
    table = rows(cells)
    ranges = [_range(column, table) for column in columns]
    body = []
    for label, row in table.items():
        cols = [f'<td title="{html.escape(about(label))}">{html.escape(label)}</td>']
        for column, (worst, best) in zip(columns, ranges, strict=True):
            value, hint = column.value(row), column.title_of(row)
            coloured = column.best is not None and isinstance(value, float) and worst != best
            style = f' style="--share:{(value - worst) / (best - worst):.2f}"' if coloured else ""  # type: ignore[operator]
            shown = "" if hint is None else f' title="{html.escape(hint)}"'
            cols.append(f"<td{style}{shown}>{html.escape(column.text(row))}</td>")
        body.append(f"<tr>{''.join(cols)}</tr>")
    heads = [html.escape(c.title) + (f"<small>{html.escape(c.note)}</small>" if c.note else "") for c in columns]
    return _PAGE.format(
        name=html.escape(name),
        title=html.escape(title),
        heading=html.escape(heading),
        heads="".join(f"<th>{head}</th>" for head in heads),
        rows="\n".join(body),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes),
    )


def machine_note() -> str:
    machine = Machine.here(torch.device("cpu"))
    return f"Machine: {machine.processor}, {machine.cores} cores, torch {machine.versions.get('torch')}."


def config_notes(cells: Sequence[Cell]) -> list[str]:
    """What has other arguments than its defaults."""
    found = ((name, next((c.config for c in row.values() if c.config), None)) for name, row in rows(cells).items())
    return [f"{name} has {', '.join(f'{k}={v!r}' for k, v in config.items())}." for name, config in found if config]


def error_notes(cells: Sequence[Cell]) -> list[str]:
    return [f"{c.mixer}, {c.task}: {c.error}" for c in cells if c.error is not None]


def _range(column: Column, table: Mapping[str, Row]) -> tuple[float, float]:
    """The worst and the best number of a column."""
    found = [value for row in table.values() if isinstance(value := column.value(row), float)] or [0.0]
    return (max(found), min(found)) if column.best == "lowest" else (min(found), max(found))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}</title>
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
<h1>{title}</h1>
<p class="soft">The deeper the colour, the nearer to the best score of the column.</p>
<div class="scroll"><table>
<thead><tr><th>{heading}</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<ul>{notes}</ul>
</body>
</html>
"""
