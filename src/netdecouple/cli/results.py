"""Writing what a command made, all of it or nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console

from netdecouple.api import Result
from netdecouple.errors import OutputError
from netdecouple.frontends.onnx.model import check_writable
from netdecouple.report.text import report_table


def check_outputs(model: Path, *outputs: Path | None) -> None:
    """Find out before the work that something cannot be written, or would overwrite what it is made from.

    Raises:
        OutputError: see there.
    """
    for output in outputs:
        if output is None:
            continue
        if output.exists() and model.exists() and output.samefile(model):
            raise OutputError(
                f"{output}: is the input; the original is never overwritten, choose another name"
            )
        check_writable(output)


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
    console.print(f"Wrote       {output} ({output.stat().st_size / 1e6:.2f} MB)", highlight=False)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step.

    Raises:
        OutputError: the place is not writable.
    """
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as partial:
            partial.write(text)
        os.chmod(partial.name, 0o644)
        os.replace(partial.name, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot write there ({error.strerror or error})") from error
