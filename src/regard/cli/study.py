"""`regard study`: measurements that train."""

from pathlib import Path
from typing import Annotated

import typer

study = typer.Typer(help="Train small models to compare mechanisms.", no_args_is_help=True)


@study.callback()
def _study() -> None:
    """Train small models to compare mechanisms."""


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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from regard.mechanisms.registry import module_class
    from regard.study import sequence as runner
    from regard.study import sequence_page

    settings = runner.Settings(steps=steps, seed=seed)
    chosen = [m.strip() for m in mixers.split(",") if m.strip()] or list(runner.all_mixers())
    for name in chosen:
        module_class(name)  # a name that does not exist is refused before anything is trained
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        every = progress.add_task("mechanisms", total=len(chosen))
        bar = progress.add_task("", total=steps)
        cells = []
        for name in chosen:
            cells += runner.run_sequence(
                [name],
                settings,
                out,
                runner.TASKS,
                report=lambda mixer, task, step, total: progress.update(
                    bar, description=f"{mixer}: {task}", completed=step, total=total
                ),
            )
            progress.advance(every)
    table = sequence_page.markdown(cells, settings, runner.TASKS)
    (out / "table.md").write_text(table, encoding="utf-8")
    (out / "page.html").write_text(sequence_page.page(cells, settings, runner.TASKS), encoding="utf-8")
    print(table)
    print(f"{out / 'table.md'} and {out / 'page.html'} written")
    if any(cell.error is not None for cell in cells):
        raise typer.Exit(1)
