"""What a command prints: tables and progress for people, one JSON object for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between lines of progress where there is no terminal to draw bars on

Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object to standard output, and all else to standard error."),
]


@dataclass(frozen=True)
class Output:
    """What a command prints."""

    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but errors: no progress, no tables.")
    ] = False
    as_json: Json = False


def console() -> Console:
    """Standard output; where it is no terminal, lines are wide enough for every table."""
    return _wide(sys.stdout.isatty())


def _wide(is_terminal: bool, **options: Any) -> Console:
    width = None if is_terminal or "COLUMNS" in os.environ else 150
    return Console(width=width, markup=False, emoji=False, **options)  # names are nobody's markup


class Terminal:
    """What one command prints to. With ``--json`` everything else that prints goes to standard error too."""

    def __init__(self, output: Output) -> None:
        self._out = sys.stdout
        self._quiet = output.quiet
        self.as_json = output.as_json
        if output.as_json:  # a calibration function may print as well
            sys.stdout = sys.stderr
        if output.quiet:
            self.console = Console(quiet=True)
        elif output.as_json:
            self.console = _wide(sys.stderr.isatty(), stderr=True)
        else:
            self.console = console()

    def bars(self) -> Bars:
        """Progress on standard error."""
        return Bars(self._quiet)

    def give(self, data: dict[str, Any]) -> None:
        """Print data as JSON, if that was asked for."""
        if self.as_json:
            print(json.dumps(data, indent=1), file=self._out, flush=True)


class Bars:
    """Progress on standard error, with the time that remains: a bar per step on terminals, else now and then
    a line, so that logs show life.
    """

    shown: ClassVar[Bars | None] = None  # those that are on the terminal now

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._console = console
        self._prints_lines = not (quiet or console.is_terminal)
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._tasks: dict[str, tuple[TaskID, int]] = {}  # step → task, last done
        self._started: dict[str, float] = {}  # step → when it (last) began
        self._printed = time.monotonic()

    def __enter__(self) -> Bars:
        Bars.shown = self
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was, cursor and all."""
        Bars.shown = None
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int) -> None:
        task, last = self._tasks.get(step, (None, 0))
        if task is None:
            task = self._progress.add_task(step, total=total)
        elif done < last:  # the step starts over, for the next group of layers
            self._progress.reset(task, total=total)
        self._tasks[step] = (task, done)
        self._progress.update(task, completed=done, total=total)
        if self._prints_lines:
            self._line(step, done, total, step not in self._started or done < last)

    def _line(self, step: str, done: int, total: int, begins: bool) -> None:
        now = time.monotonic()
        if begins:
            self._started[step] = now
        if now - self._printed < EVERY:
            return
        self._printed = now
        left = (now - self._started[step]) * (total - done) / max(done, 1)
        minutes, seconds = divmod(round(left), 60)
        remaining = f", about {minutes}:{seconds:02} left" if left and done < total else ""
        print(f"{step}: {done} of {total}{remaining}", file=self._console.file, flush=True)
