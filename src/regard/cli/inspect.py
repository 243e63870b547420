"""`regard inspect`: where a model looks in a text, as a page."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from regard.cli.compare import _check_writable
from regard.errors import require


def inspect(
    report: Annotated[Path, typer.Option(help="The HTML page to write.")],
    model: Annotated[
        str, typer.Option(help="smollm2 (bundled), a folder, a .gguf file, or an id on the Hugging Face Hub.")
    ] = "smollm2",
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file to read; English prose that comes with Python if left out.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Read the first so many tokens of it, at most 4096.")] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """See where a language model looks in a text: one page to click through, which opens offline.

    The model reads the text once. The page shows

    \b
    - [bold]every head[/] of every layer by entropy, distance, share on the first token, or what it mostly does
    - [bold]a head's pattern[/], and which part of the text looks at which, when you choose the head
    - [bold]the text[/], coloured by the attention each token receives
    - [bold]a token's attention[/] in each layer, when you choose the token

    \b
    [bold]Examples[/]
      regard inspect --report inspect.html
      regard inspect --text letter.txt --tokens 1024 --report letter.html
      regard inspect --model ./my-model --text letter.txt --report letter.html --device cuda
    """
    _check_writable(None, report)
    require("plotly", "write reports")
    from regard.study.inspect import inspect as run  # torch and transformers: not for `regard list`

    with _progress() as on_progress:
        found = run(model, text=text, tokens=tokens, device=device, dtype=dtype, on_progress=on_progress)
    if found.cut:
        print(f"the text goes on after its first {len(found.tokens):,} tokens; --tokens reads more")
    found.report(report)
    print(f"report: {report}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of the layers on stderr; where that is no terminal, a line per quarter."""
    console = Console(file=sys.stderr)  # bound to this stream: loaders are silenced by redirecting sys.stderr
    columns = TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading the model", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, description="reading, layers", completed=done, total=total)
            if not console.is_terminal and 4 * done // total > 4 * (done - 1) // total:
                console.print(f"layer {done} of {total}", markup=False, highlight=False)

        yield on_progress
