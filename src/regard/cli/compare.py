"""`regard compare`: the methods side by side on a model and a text."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regard.errors import ArgumentError, require

if TYPE_CHECKING:
    from regard.study import Progress as Step

#: columns of output that goes to a file or pipe
_WIDTH_WITHOUT_TERMINAL = 100


def compare(
    model: Annotated[
        str, typer.Option(help="smollm2 (bundled), a folder, a .gguf file, or an id on the Hugging Face Hub.")
    ] = "smollm2",
    methods: Annotated[
        str | None,
        typer.Option(help='As in "h2o(budget=0.1),streaming-llm"; all with a quarter of the context if left out.'),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file to read; English prose that comes with Python if left out.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens to read before anything is measured.")] = 2048,
    continuation: Annotated[int, typer.Option(help="Tokens of the text after that, for the perplexity.")] = 64,
    generate: Annotated[int, typer.Option(help="Tokens dense generates, for the agreement with it.")] = 64,
    passkeys: Annotated[int, typer.Option(help="Numbers hidden in the text and asked for; 0 for none.")] = 8,
    repeats: Annotated[int, typer.Option(help="Times to take each time; more are steadier.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Draws the passkeys.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the records to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write one HTML page: table, plots, attention patterns.")] = None,
) -> None:
    """Compare attention methods on a language model: quality, memory, time, and where they look.

    Every method and the untouched model ("dense") read the same text and go on token by token. The table shows

    \b
    - [bold]perplexity[/] of the text that follows, and its difference to dense
    - [bold]passkeys[/]: hidden numbers the model gives back, from start to end of the context
    - [bold]agreement[/] with what dense generates
    - [bold]KV cache[/]: bytes held after the prompt, and the share of dense
    - [bold]prefill[/] and [bold]decode[/] time over dense, timed again in between
    - [bold]peak[/] memory beyond the model's

    \b
    [bold]Examples[/]
      regard compare --report report.html
      regard compare --context 4096 --methods "h2o(budget=0.1), xkv(rank_k=0.25)"
      regard compare --model ./my-model --text book.txt --json figures.json
    """
    _check_writable(json, report)
    from regard.study import compare as run  # torch and transformers: not for `regard list`

    with _progress() as on_progress:
        comparison = run(
            model, methods, text=text, context=context, continuation=continuation, generate=generate,
            passkeys=passkeys, repeats=repeats, seed=seed, device=device, dtype=dtype, on_progress=on_progress,
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    console.print(comparison.table())
    if json is not None:
        comparison.to_json(json)
        print(f"records: {json}")
    if report is not None:
        comparison.report(report)
        print(f"report: {report}")


def _check_writable(json: Path | None, report: Path | None) -> None:
    """Refuse now what would fail after minutes of measuring."""
    for target in (json, report):
        if target is None:
            continue
        if target.is_dir():
            raise ArgumentError(f"cannot write {str(target)!r}: it is a folder")
        if not target.resolve().parent.is_dir():
            raise ArgumentError(f"cannot write {str(target)!r}: there is no folder {str(target.resolve().parent)!r}")
    if report is not None:
        require("jinja2", "write reports")


@contextmanager
def _progress() -> Iterator:
    """A bar on stderr with method, task, time taken and time left; where stderr is no terminal, a line per task."""
    console = Console(file=sys.stderr)  # bound to this stream: loaders are silenced by redirecting sys.stderr
    columns = (
        TextColumn("[bold]{task.fields[method]:<15}"), TextColumn("{task.description:<22}"), BarColumn(24),
        TimeElapsedColumn(), TextColumn("taken,"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    said = ""
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None, method="model")

        def on_progress(step: "Step") -> None:
            nonlocal said
            bar.update(task, description=step.task, completed=step.done, total=step.total, method=step.method)
            now = f"{step.method}: {step.task}"
            if not console.is_terminal and now != said:
                said = now
                console.print(f"[{step.done / step.total:4.0%}] {now}", markup=False, highlight=False)

        yield on_progress
