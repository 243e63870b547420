"""`regard study`: measurements that train, and findings."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.catalog.findings import FINDINGS

if TYPE_CHECKING:
    from regard.study.cells import Cell, Report
    from regard.study.finding import Finding

_HELP = "Train small models to compare mechanisms, or see what a publication claims beside what is measured here."

study = typer.Typer(help=_HELP, no_args_is_help=True)


@study.callback(help=_HELP)
def _study() -> None: ...


@study.command("sequence")
def sequence(
    mixers: Annotated[str, typer.Option(help="Names, with commas; by default all that mix any sequence.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Training steps per mechanism and task.")] = 800,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results; what is in it is not run again.")] = Path(
        "sequence"
    ),
) -> None:
    """Train the same small model with each mechanism and write OUT/table.md and OUT/page.html.

    Tasks: associative recall, selective copying, a needle in real and in generated text, bytes of Python's manual,
    genres of the Brown corpus, and next films of MovieLens; `make data` fetches the last two's data. About four minutes
    per mechanism on one core. Stop it at any time: the same command goes on. To use more cores, start it several times
    with other --mixers and the same --out; a last run without --mixers writes all of the table.
    """
    from regard.mechanisms.registry import module_class
    from regard.study import sequence as runner
    from regard.study import sequence_page

    settings = runner.Settings(steps=steps, seed=seed)
    chosen = _names(mixers) or runner.all_mixers()
    for name in chosen:
        module_class(name)  # a name that does not exist is refused before anything is trained
    cells = _run(
        "mechanisms",
        chosen,
        steps,
        lambda name, report: runner.run_sequence([name], settings, out, runner.TASKS, report),
    )
    table = sequence_page.markdown(cells, settings, runner.TASKS)
    _write(out, table, sequence_page.page(cells, settings, runner.TASKS), cells)


@study.command("vision")
def vision(
    backbones: Annotated[str, typer.Option(help="Names, with commas; by default all of the catalogue.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Training steps per backbone and task.")] = 250,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and data.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results; what is in it is not run again.")] = Path("vision"),
) -> None:
    """Train every vision backbone, shrunk to the same multiply-adds, and write OUT/table.md and OUT/page.html.

    Tasks: MNIST's digits, digits of 8×8 pixels, and textures in pieces of photos; then the same images at other sizes.
    `make data` fetches the data. About two minutes per backbone on one core. Stop it at any time: the same command goes
    on. To use more cores, start it several times with other --backbones and the same --out; a last run without
    --backbones writes all of the table.
    """
    from regard.study import vision as runner
    from regard.study import vision_page

    settings = runner.Settings(steps=steps, seed=seed)
    chosen = _names(backbones) or runner.all_backbones()
    for name in chosen:
        runner.network(name, 2)  # a name that does not exist is refused before anything is trained
    cells = _run(
        "backbones", chosen, steps, lambda name, report: runner.run_vision([name], settings, out, runner.TASKS, report)
    )
    table = vision_page.markdown(cells, settings, runner.TASKS)
    _write(out, table, vision_page.page(cells, settings, runner.TASKS), cells)


def _finding(name: str, line: str) -> None:
    """A command for one finding."""

    def command(
        seed: Annotated[int, typer.Option(min=0, help="Of whatever is drawn.")] = 0,
        quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; shows that it runs.")] = False,
        out: Annotated[Path, typer.Option(help="Folder of NAME.json, NAME.md and NAME.svg.")] = Path("findings"),
    ) -> None:
        from regard.study import finding

        with _bar() as on_progress:
            found = finding.run(name, seed=seed, quick=quick, on_progress=on_progress)
        _show(found)
        print("\n".join(f"{path} written" for path in found.save(out)))

    study.command(name, help=line, rich_help_panel="Findings")(command)


for _name, _line in FINDINGS.items():
    _finding(_name, _line)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(bar, description=what, completed=done, total=total)


def _show(found: "Finding") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=found.title, title_justify="left")
    for column in ("quantity", "expected", "measured", "holds"):
        table.add_column(column)
    for claim in found.claims:
        holds = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[claim.holds]
        table.add_row(escape(claim.quantity), escape(claim.expected), escape(claim.measured), holds)
    Console().print(table)


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _run(what: str, names: Sequence[str], steps: int, run: "Callable[[str, Report], list[Cell]]") -> "list[Cell]":
    """The cells of all names, with a bar for the names and one for the steps of training."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        every = progress.add_task(what, total=len(names))
        bar = progress.add_task("", total=steps)

        def report(name: str, task: str, step: int, total: int) -> None:
            progress.update(bar, description=f"{name}: {task}", completed=step, total=total)

        cells = []
        for name in names:
            cells += run(name, report)
            progress.advance(every)
    return cells


def _write(out: Path, table: str, page: str, cells: "Iterable[Cell]") -> None:
    (out / "table.md").write_text(table, encoding="utf-8")
    (out / "page.html").write_text(page, encoding="utf-8")
    print(table)
    print(f"{out / 'table.md'} and {out / 'page.html'} written")
    if any(cell.error is not None for cell in cells):
        raise typer.Exit(1)
