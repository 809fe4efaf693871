"""The command line: arguments in, one call, result out."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer
from rich.console import Console

from netdecouple.cli import apply, bench, demo, evaluate, inspect, lower, options, run
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
app.command("lower")(lower.lower)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
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


class _Interrupted(BaseException):
    """Ctrl-C, under a name that typer does not handle itself."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; exit code 2: the user can mend it; 130: Ctrl-C; 1: our own mistake."""
    handler = signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except NetDecoupleError as error:
        _fail(2, "error", str(error))
    except (_Interrupted, KeyboardInterrupt):
        _fail(130, "interrupted", "nothing was written")
    except MemoryError:
        _fail(2, "error", "out of memory; try fewer --samples or smaller images")
    except Exception as error:
        if os.environ.get("NETDECOUPLE_TRACEBACK"):
            raise
        _fail(
            1,
            "internal error",
            f"{type(error).__name__}: {error}; this is a mistake of ours, please report it "
            "(NETDECOUPLE_TRACEBACK=1 shows where it happened)",
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def _fail(code: int, what: str, message: str) -> None:
    console = Console(stderr=True)
    console.print(f"{what}:", style="bold red", end=" ")
    console.print(" ".join(message.split()), **options.PLAIN)
    sys.exit(code)
