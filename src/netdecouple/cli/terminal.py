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

# for printing file names, which may look like markup
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}

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


class Terminal:
    """What one command prints to. With ``--json`` everything else that prints goes to standard error too."""

    def __init__(self, output: Output) -> None:
        self._out = sys.stdout
        self.is_quiet = output.quiet
        self.as_json = output.as_json
        if output.as_json:  # a calibration function may print as well
            sys.stdout = sys.stderr
        # where it is no terminal, lines are wide enough for every table
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 150
        is_quiet, to_stderr = output.quiet, output.as_json
        # names of files and layers are not markup
        self.console = Console(width=width, markup=False, emoji=False, quiet=is_quiet, stderr=to_stderr)

    def bars(self) -> Bars:
        """Progress on standard error."""
        return Bars(self.is_quiet)

    def say(self, label: str, text: object) -> None:
        """Print one line, its label in a column of its own."""
        self.console.print(f"{label:<11} {text}", **PLAIN)

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
        self._steps: dict[str, tuple[TaskID, int, float]] = {}  # step → task, last done, when it (last) began
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
        now = time.monotonic()
        task, last, began = self._steps.get(step, (None, 0, now))
        if task is None:
            task = self._progress.add_task(step, total=total)
        elif done < last:  # the step starts over, for the next group of layers
            self._progress.reset(task, total=total)
            began = now
        self._steps[step] = task, done, began
        self._progress.update(task, completed=done, total=total)
        if self._prints_lines and now - self._printed >= EVERY:
            self._printed = now
            left = (now - began) * (total - done) / max(done, 1)
            minutes, seconds = divmod(round(left), 60)
            remaining = f", about {minutes}:{seconds:02} left" if left and done < total else ""
            print(f"{step}: {done} of {total}{remaining}", file=self._console.file, flush=True)
