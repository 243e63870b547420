"""Entry point of the `regard` command: registers the subcommands and turns expected errors into one line."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import regard
from regard.cli.compare import compare
from regard.cli.info import info
from regard.cli.inspect import inspect
from regard.cli.list import list_systems
from regard.cli.study import study
from regard.errors import ArgumentError, MissingExtra, ShapeError, Unsupported

#: what a user can cause and mend; anything else is a bug and keeps its traceback
_EXPECTED = (ArgumentError, ShapeError, Unsupported, MissingExtra, OSError, UnicodeError)

app = typer.Typer(
    name="regard",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare)
app.command("inspect")(inspect)
app.command("list")(list_systems)
app.command("info")(info)
app.add_typer(study, name="study")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"regard {regard.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _regard(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of errors (or set REGARD_DEBUG=1).")
    ] = False,
) -> None:
    """Compare attention methods on your own language model, see where it looks, and look up the published ones.

    \b
    [bold]Start here[/]
      regard compare --model smollm2 --context 2048 --report report.html
      regard inspect --text letter.txt --report inspect.html
      regard list --status works
      regard info h2o
    """
    if debug:
        os.environ["REGARD_DEBUG"] = "1"  # read in _run, outside of what typer calls
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with 0, with 130 when interrupted, or with 2 after one line ``error: …``."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        return app(arguments, prog_name="regard", standalone_mode=False) or 0
    except typer.Abort:
        return 130
    except Exception as error:
        # what the command line parser refuses: click's exception, or that of the copy of click newer typers carry
        refused = hasattr(error, "format_message")
        if os.environ.get("REGARD_DEBUG") or not (refused or isinstance(error, _EXPECTED)):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        text = f"{error.format_message()} (see {context.command_path if context else 'regard'} --help)"
    elif isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
