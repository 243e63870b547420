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
    mixers: Annotated[str, typer.Option(help="Names, with commas; by default all that mix causally.")] = "",
    steps: Annotated[int, typer.Option(help="Training steps per mechanism and task.")] = 300,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    json: Annotated[Path, typer.Option(help="Results; what is in it is not run again.")] = Path("sequence.json"),
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here.")] = None,
) -> None:
    """Train the same small decoder with each mechanism on recall, copying, bytes and a needle."""
    from rich.progress import Progress

    from regard.mechanisms.registry import module_class
    from regard.study import sequence as runner

    settings = runner.Settings(steps=steps, seed=seed)
    chosen = [m.strip() for m in mixers.split(",") if m.strip()] or list(runner.causal_mixers())
    for name in chosen:
        module_class(name)  # a name that does not exist is refused before anything is trained
    with Progress(transient=True) as progress:
        bar = progress.add_task("", total=steps)
        cells = runner.run_sequence(
            chosen,
            settings,
            json,
            report=lambda mixer, task, step, total: progress.update(
                bar, description=f"{mixer}: {task}", completed=step, total=total
            ),
        )
    text = runner.markdown(cells, settings)
    print(text)
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")
