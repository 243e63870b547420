"""A comparison as a table for the terminal, readable in 100 columns."""

from collections.abc import Callable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from regard.study import words
from regard.study.records import Comparison, Result

_COLUMNS: tuple[tuple[str, Callable[[Result, Result], tuple[str, str]]], ...] = (
    (
        "perplexity",
        lambda r, dense: (words.number(r.perplexity), "" if r is dense else words.change(r.perplexity_change)),
    ),
    ("passkeys", lambda r, dense: (words.recalled(r), "".join("●" if recall.correct else "·" for recall in r.recalls))),
    ("agreement", lambda r, dense: (words.percent(r.agreement), "")),
    ("KV cache", lambda r, dense: (words.size(r.cache_bytes), words.share(r.cache_bytes, dense.cache_bytes))),
    ("prefill", lambda r, dense: (words.ratio(r.prefill_ratio), "")),
    ("decode", lambda r, dense: (words.ratio(r.decode_ratio), "")),
    ("peak", lambda r, dense: (words.size(r.peak_bytes), "")),
)


def table(comparison: Comparison) -> RenderableType:
    """One row per method: the figure, and under it what it means beside dense; notes below the table."""
    dense, s = comparison.dense, comparison.settings
    rows = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title=Text(f"{s.model} after {s.context:,} tokens", "bold")
    )
    rows.add_column("method", overflow="fold", max_width=36)
    for heading, _ in _COLUMNS:
        rows.add_column(heading, justify="right", no_wrap=True)
    for result in comparison.results:
        name = _two_lines(result.name, words.arguments(result), "bold")
        if result.error is None:
            rows.add_row(name, *(_two_lines(*cell(result, dense)) for _, cell in _COLUMNS))
        else:
            rows.add_row(
                _two_lines(result.name, f"{words.arguments(result)}\ndoes not run here: {result.error}".strip(), "bold")
            )
    return Group(rows, *(Text(note, "dim") for note in words.notes(comparison)))


def _two_lines(first: str, second: str, style: str = "") -> Text:
    return Text.assemble((first, style), *([("\n" + second, "dim")] if second else []))
