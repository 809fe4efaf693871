"""The command line: arguments in, one call, result out."""

from __future__ import annotations

import os
import sys

import typer
from rich.console import Console

from netdecouple.cli import apply, demo, evaluate, inspect, run
from netdecouple.errors import NetDecoupleError
from netdecouple.version import __version__

app = typer.Typer(
    help="Make pretrained convolutional networks faster without training, by network decoupling.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("inspect")(inspect.inspect)
app.command("apply")(apply.apply)
app.command("eval")(evaluate.evaluate)
app.command("demo")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; exit code 2: the user can mend it; 130: Ctrl-C; 1: our own mistake."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        app(standalone_mode=True)
    except NetDecoupleError as error:
        console.print(f"[bold red]error:[/] {_plain(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        sys.exit(130)
    except MemoryError:
        console.print("[bold red]error:[/] out of memory; try fewer --samples or smaller images")
        sys.exit(2)
    except Exception as error:
        if os.environ.get("NETDECOUPLE_TRACEBACK"):
            raise
        console.print(
            f"[bold red]internal error:[/] {type(error).__name__}: {_plain(error)}\n"
            "This is a mistake of ours. Nothing was written. Please report it; "
            "NETDECOUPLE_TRACEBACK=1 shows where it happened."
        )
        sys.exit(1)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split()).replace("[", r"\[")
