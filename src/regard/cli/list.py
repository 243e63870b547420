"""`regard list`: the catalogue as a table."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard import catalog
from regard.catalog import System

#: columns of output that goes to a file or pipe: wide enough for one system per line
_WIDTH_WITHOUT_TERMINAL = 160


def list_systems(
    kind: Annotated[str | None, typer.Option(help=f"Only one kind: {', '.join(catalog.KINDS)}.")] = None,
    family: Annotated[str | None, typer.Option(help=f"Only one family: {', '.join(catalog.FAMILIES)}.")] = None,
    status: Annotated[str | None, typer.Option(help="Only what works, or only what is planned.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON records instead of the table.")] = False,
) -> None:
    """List the published systems: which work, which are planned, and their papers.

    \b
    [bold]Examples[/]
      regard list --status works
      regard list --kind cache --family language
      regard list --json > systems.json
    """
    chosen = catalog.systems(kind=kind, family=family, status=status)
    if as_json:
        print(json.dumps([asdict(system) for system in chosen], indent=2, ensure_ascii=False))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    if chosen:
        console.print(_table(chosen))
    console.print(_counts(chosen))


def _table(systems: Sequence[System]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("slug", no_wrap=True, style="bold")
    table.add_column("status", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("kinds")
    table.add_column("name")
    for system in systems:
        # in a narrow terminal kinds and names give way, each still on one line
        kinds, name = (Text(t, no_wrap=True, overflow="ellipsis") for t in (", ".join(system.kinds), system.name))
        status = Text(system.status, style="green" if system.works else "dim")
        table.add_row(system.slug, status, Text(system.paper), kinds, name)
    return table


def _counts(chosen: Sequence[System]) -> str:
    works = sum(system.works for system in chosen)
    counts = f"{works} work, {len(chosen) - works} planned"
    total = len(catalog.names())
    return counts if len(chosen) == total else f"{counts}, of {total} in the catalogue"
