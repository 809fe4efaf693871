"""Writing what a command made, all of it or nothing."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from netdecouple import doors
from netdecouple.cli import options
from netdecouple.errors import OutputError
from netdecouple.execution.scratch import check_writable
from netdecouple.report.files import rendered, report_ending, write_text
from netdecouple.report.model import Report
from netdecouple.report.text import report_table

NO_FOLDERS = (".pt", ".pth", ".pt2", ".safetensors", ".bin", ".ckpt")


def check_networks(outputs: Sequence[Path], named: bool) -> list[Path]:
    """Tell which outputs are folders: of models that are ``named``, all that do not end in .onnx.

    Raises:
        OutputError: a network cannot be written so.
    """
    if not named and len(outputs) > 1:
        raise OutputError("an .onnx model becomes one .onnx file; give -o once")
    for output in outputs:
        if not named and not output.suffix and not os.path.exists(output):
            raise OutputError(f"{output}: .onnx models are written as .onnx files; write -o {output}.onnx")
        if named and output.suffix in NO_FOLDERS:
            raise OutputError(
                f"{output}: PyTorch models are written as .onnx or as a folder; leave out {output.suffix}"
            )
    return [output for output in outputs if named and output.suffix != ".onnx"]


def check_outputs(inputs: Sequence[Path], *outputs: Path | None, folders: Collection[Path] = ()) -> None:
    """Find out before the work that something cannot be written, or would overwrite what it is made from.

    Raises:
        OutputError: see there.
    """
    wanted = [output for output in outputs if output is not None]
    for index, output in enumerate(wanted):
        (_check_folder if output in folders else check_writable)(output)
        if any(output.exists() and os.path.exists(given) and output.samefile(given) for given in inputs):
            raise OutputError(f"{output}: is an input, and inputs are never overwritten; choose another name")
        if any(output.resolve() == other.resolve() for other in wanted[:index]):
            raise OutputError(f"{output}: is asked for twice; give every result a name of its own")


def _check_folder(folder: Path) -> None:
    doors.named().check_replaceable(folder)
    target = folder.resolve()
    # what is there is renamed, and what is new into its place
    check_writable(target.with_name(f".{target.name}.new") if target.exists() else folder)


def write_result(
    console: Console,
    result: Any,
    outputs: Sequence[Path],
    plan: Path | None,
    reports: Iterable[Path] = (),
) -> dict[str, Any]:
    """Write the network and what was asked for beside it, and print the report; return it for programs."""
    told = told_report(result.report)
    texts = {path: rendered(told, path) for path in reports}  # before anything is written
    for output in outputs:
        result.save(output)
    if plan is not None:
        write_text(plan, result.plan.to_json() + "\n")
    for path, text in texts.items():
        write_text(path, text)
    console.print(report_table(result.report))
    for output in outputs:
        tell_written(console, output)
    written = {
        "outputs": [str(path) for path in outputs],
        "plan": None if plan is None else str(plan),
        "reports": [str(path) for path in texts],
    }
    found: dict[str, Any] = json.loads(told.to_json())
    return found | written


def told_report(report: Report) -> Report:
    """The same, with the command that it is a report of."""
    if report.provenance is None:
        return report
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return replace(report, provenance=replace(report.provenance, command=shlex.join(words)))


def check_reports(reports: Iterable[Path] | None) -> list[Path]:
    """Refuse reports that end in something else than they can be written as.

    Raises:
        OutputError: see there.
    """
    found = list(reports or ())
    for path in found:
        report_ending(path)
    return found


def wants_times(reports: Iterable[Path]) -> bool:
    """Whether a report is asked for that tells times."""
    return any(report_ending(path) == ".html" for path in reports)


def tell_written(console: Console, output: Path) -> None:
    """Say which network was written, and how large it is."""
    files = output.iterdir() if output.is_dir() else [output]
    size = sum(path.stat().st_size for path in files)
    console.print(f"Wrote       {output} ({size / 1e6:.2f} MB)", **options.PLAIN)
