"""`regard inspect`: where a model looks in a text or a picture, as a page."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from regard.cli.compare import _check_writable
from regard.errors import ArgumentError, require

if TYPE_CHECKING:
    from regard.study.inspect import Inspection
    from regard.study.inspect_image import ImageInspection


def inspect(
    report: Annotated[Path, typer.Option(help="The HTML page to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="smollm2 or vit-s (bundled), a folder, a .gguf file, or an id on the Hugging Face Hub; "
            "smollm2, or with --image vit-s, if left out."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file to read; English prose that comes with Python if left out.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture to look at, with a vision transformer; vit-s has one if left out."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Read the first so many tokens of the text, at most 4096.")] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """See where a model looks in a text or a picture: one page to click through, which opens offline.

    The model reads it once. The page shows

    \b
    - [bold]every head[/] of every layer by entropy, distance, share on the first token, or what it mostly does
    - [bold]a head's pattern[/], and which part of the text or picture looks at which, when you choose the head
    - [bold]the text[/], coloured by the attention each token receives, or [bold]the picture[/], brightened by it
    - [bold]a token's or a patch's attention[/] in each layer, when you choose it

    \b
    [bold]Examples[/]
      regard inspect --report inspect.html
      regard inspect --text letter.txt --tokens 1024 --report letter.html
      regard inspect --model ./my-model --text letter.txt --report letter.html --device cuda
      regard inspect --model vit-s --image cat.jpg --report cat.html
    """
    _check_writable(None, report)
    require("plotly", "write reports")
    if text is not None and image is not None:
        raise ArgumentError("--text and --image: expected one of them, got both")
    from regard.study.models import BUNDLED_VISION  # torch and transformers: not for `regard list`

    read: Inspection | ImageInspection
    note = ""
    with _progress() as on_progress:
        if image is not None or model in BUNDLED_VISION:
            if text is not None:
                raise ArgumentError(f"--text: {model} looks at pictures; give one with --image")
            from regard.study.inspect_image import inspect_image

            read = inspect_image(model or "vit-s", image=image, device=device, dtype=dtype, on_progress=on_progress)
        else:
            from regard.study.inspect import inspect as run

            found = run(
                model or "smollm2", text=text, tokens=tokens, device=device, dtype=dtype, on_progress=on_progress
            )
            read = found
            if found.cut:
                note = f"the text goes on after its first {len(found.tokens):,} tokens; --tokens reads more"
    if note:
        print(note)
    read.report(report)
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
