"""`regard info`: all the catalogue says about one system, and the arguments of what implements it."""

import inspect
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from regard import catalog
from regard.catalog import System
from regard.catalog.page import argument_help


def info(slug: Annotated[str, typer.Argument(help="A system's name as `regard list` shows it.")]) -> None:
    """Show one system: what it does, its paper, its code, and the arguments it takes if it works.

    \b
    [bold]Examples[/]
      regard info h2o
      regard info power-attention
    """
    system = catalog.get(slug)
    Console().print(Panel(_description(system), title=escape(system.name), title_align="left", expand=False))


def _description(system: System) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    published = system.venue or str(system.year)
    reference = f"arXiv:{system.arxiv}, {published}" if system.arxiv else published
    for label, value in (
        ("slug", system.slug),
        ("paper", system.title),
        ("", reference),
        ("code", f"github.com/{system.official}" if system.official else "none published"),
        ("kinds", ", ".join(system.kinds) or "none"),
        ("family", system.family),
        ("status", system.status),
    ):
        facts.add_row(label, Text(value))
    return Group(Text(system.summary), Text(), facts, Text(), *_implementation(system))


def _implementation(system: System) -> list[RenderableType]:
    if system.object is None:
        return [Text("Planned: nothing in this version of regard implements it yet.")]
    implementation = system.load()
    module, _, attribute = system.object.partition(":")
    parts: list[RenderableType] = [Text(f"from {module} import {attribute}", style="bold")]
    signature = inspect.signature(implementation)
    if signature.parameters:
        parts += [Text(), _arguments(signature, argument_help(implementation))]
    return parts


def _arguments(signature: inspect.Signature, help_texts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, parameter in signature.parameters.items():
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        table.add_row(Text(f"{name}{default}"), Text(help_texts.get(name, "")))
    return table
