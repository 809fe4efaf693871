"""The command line: exit codes, errors in one line, Ctrl-C."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import typer
from rich.console import Console

from netdecouple.cli.commands import app
from netdecouple.cli.flags import with_flags
from netdecouple.cli.interrupt import Interrupted, interruptible, leave
from netdecouple.cli.terminal import PLAIN, Bars
from netdecouple.errors import NetDecoupleError, QualityError, SpeedError
from netdecouple.execution import scratch
from netdecouple.kernels import MissingOperatorWarning

QUOTED = 200  # characters of a library's line that a message of ours has at least, if it quotes it
UNREAD = 141  # as shells tell of other tools, which SIGPIPE ends

# typer imports click or, in later versions, brings its own copy;
# what is wrong with arguments has this base in both
UsageError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> None:
    """Run the command line; exit code 2: a wrong input or option; 3: a limit on the outputs' change is not
    kept; 4: nothing is faster than the original; 130: Ctrl-C; 1: a bug.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: it is not wanted, and another file must not get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal lacks must not end the command
            stream.reconfigure(errors="replace")
    if sys.stdout is sys.__stdout__:
        _keep_for_python(sys.argv[1:])
    out = sys.stdout
    scratch.forget()
    # users need not see what libraries log or warn of
    if not logging.root.handlers:
        logging.root.addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MissingOperatorWarning)
        warnings.showwarning = _note_once()
    try:
        code = interruptible(lambda: app(prog_name="netdecouple", standalone_mode=False)) or 0
    except SystemExit as error:  # completions, and what rich and click make of a broken pipe
        if isinstance(error.__context__, BrokenPipeError):
            os._exit(UNREAD)
        raise
    except BaseException as error:
        sys.stdout = out
        if isinstance(error, OSError):
            _check_printed(out, "\n")  # if it was standard output's, it comes again
        if isinstance(error, Exception) and os.environ.get("NETDECOUPLE_TRACEBACK"):
            raise
        code = _failed(error)
        if isinstance(error, Interrupted):
            leave(code)
    finally:
        sys.stdout = out
    _check_printed(out)
    sys.exit(code)


def _note_once() -> Callable[..., None]:
    """Return what prints a warning in one line; libraries that change filters would make it come again."""
    noted: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in noted and not _is_quiet(sys.argv[1:]):
            noted.add(str(message))
            print(f"note: {message}", file=sys.stderr, flush=True)

    return show


def _is_quiet(arguments: Sequence[str]) -> bool:
    return not {"-q", "--quiet"}.isdisjoint(arguments)


def _keep_for_python(arguments: Sequence[str]) -> None:
    """Let nobody else print to standard output: native code prints to the descriptor, past Python.

    It prints to standard error then, or nowhere if the command is to be quiet.
    """
    encoding = "utf-8" if "--json" in arguments else sys.stdout.encoding
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere if _is_quiet(arguments) else 2, 1)
    os.close(nowhere)


def _check_printed(out: TextIO, more: str = "") -> None:
    """End here if standard output does not take what waits to be printed, and ``more``."""
    try:
        out.write(more)
        out.flush()
    except BrokenPipeError:
        os._exit(UNREAD)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os._exit(_failed(scratch.unwritable("standard output", error)))


def _failed(error: BaseException) -> int:
    """Say what went wrong, in one line; return the exit code."""
    match error:
        case UsageError():
            return _misused(error)
        case QualityError():
            return _fail(3, "not written", with_flags(str(error)))
        case SpeedError():
            return _fail(4, "not written", with_flags(str(error)))
        case NetDecoupleError():
            return _fail(2, "error", with_flags(str(error)), _quoted(error))
        case Interrupted() | KeyboardInterrupt() | typer.Abort():
            if Bars.shown is not None:
                Bars.shown.stop()
            written = ", ".join(map(str, scratch.abandon()))
            return _fail(
                130, "interrupted", f"written by then: {written}" if written else "nothing was written"
            )
        case MemoryError():
            return _fail(2, "error", "out of memory; try fewer --samples or smaller images")
    return _fail(
        1,
        "internal error",
        f"{type(error).__name__}: {error}; this is a bug in netdecouple, please report it "
        "(NETDECOUPLE_TRACEBACK=1 shows where it happened)",
    )


def _quoted(error: BaseException) -> str:
    """Return a library's whole message, if an error of ours quotes the beginning of a line of it only."""
    cause = error.__cause__
    while isinstance(cause, NetDecoupleError):
        cause = cause.__cause__
    text, message = str(cause or "").strip(), _one_line(str(error))
    lines = [_one_line(line)[:QUOTED].rstrip(".") for line in text.splitlines() if line.strip()]
    return text if _one_line(text) not in message and any(line in message for line in lines) else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _misused(error: Any) -> int:
    """Say what is wrong with the arguments, and where help is."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # help has been printed instead
        print(message, end="")
        return int(error.exit_code)
    command = error.ctx.command_path if getattr(error, "ctx", None) else "netdecouple"
    return _fail(2, "error", f"{message.rstrip('.')}; see {command} --help")


def _fail(code: int, what: str, message: str, quoted: str = "") -> int:
    """Print what went wrong in one line, and below it what a library says in several; return the code."""
    message = _one_line(message)
    console = Console(stderr=True)
    console.print(f"{what}:", style="bold red", end=" ")
    console.print("\n".join(filter(None, (message, quoted))), **PLAIN)
    if "--json" in sys.argv[1:]:
        text = f"{what}: {message}".removeprefix("error: ")
        details = {"details": quoted} if quoted else {}
        print(json.dumps({"error": text, **details, "exit_code": code}, indent=1))
    return code
