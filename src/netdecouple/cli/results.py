"""Writing what a command made, all of it or nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from netdecouple.api import Result
from netdecouple.cli import options
from netdecouple.errors import OutputError
from netdecouple.frontends.onnx.model import check_writable
from netdecouple.report.text import report_table


def check_outputs(inputs: Sequence[Path], *outputs: Path | None) -> None:
    """Find out before the work that something cannot be written, or would overwrite what it is made from.

    Raises:
        OutputError: see there.
    """
    wanted = [output for output in outputs if output is not None]
    for index, output in enumerate(wanted):
        check_writable(output)
        if any(output.exists() and given.exists() and output.samefile(given) for given in inputs):
            raise OutputError(f"{output}: is an input, and inputs are never overwritten; choose another name")
        if any(output.resolve() == other.resolve() for other in wanted[:index]):
            raise OutputError(f"{output}: is asked for twice; give every result a name of its own")


def write_result(
    console: Console, result: Result, output: Path, plan: Path | None, report: Path | None
) -> None:
    """Write the model and what was asked for beside it, and print the report."""
    result.save(output)
    if plan is not None:
        write_text(plan, result.plan.to_json() + "\n")
    if report is not None:
        write_text(report, result.report.to_json())
    console.print(report_table(result.report))
    tell_written(console, output)


def tell_written(console: Console, output: Path) -> None:
    """Say which model was written, and how large it is."""
    console.print(f"Wrote       {output} ({output.stat().st_size / 1e6:.2f} MB)", **options.PLAIN)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Raises:
        OutputError: the place is not writable.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".netdecouple-", dir=path.parent) as folder:
            partial = Path(folder) / path.name
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write there ({error.strerror or error})") from error
