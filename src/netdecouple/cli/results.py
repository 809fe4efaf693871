"""Check outputs before the work, and write results after it, all of them or none."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.terminal import Terminal
from netdecouple.errors import ModelError, OutputError
from netdecouple.execution.scratch import check_writable
from netdecouple.network import Source
from netdecouple.report.files import rendered, report_ending, write_text
from netdecouple.report.model import Report
from netdecouple.report.text import report_table

NO_FOLDERS = (".pt", ".pth", ".pt2", ".safetensors", ".bin", ".ckpt")
WEIGHTS_ONLY = (".pt", ".pth", ".safetensors")


def check_model(model: Path) -> None:
    """Refuse files that hold weights and no network.

    Raises:
        ModelError: see there.
    """
    if model.suffix in WEIGHTS_ONLY and not api.is_named(model):
        raise ModelError(
            f"{model}: holds weights and no network; name that as well: torchvision:NAME --weights {model}"
        )


def check_networks(model: Path, outputs: Sequence[Path]) -> list[Path]:
    """Return those outputs that are folders: of PyTorch models, all that do not end in .onnx.

    Raises:
        OutputError: a network cannot be written so.
    """
    is_torch = api.is_named(model)
    if not is_torch and len(outputs) > 1:
        raise OutputError("an .onnx model becomes one .onnx file; give -o once")
    for output in outputs:
        if not is_torch and not output.suffix and not os.path.exists(output):
            raise OutputError(f"{output}: .onnx models are written as .onnx files; write -o {output}.onnx")
        if is_torch and output.suffix in NO_FOLDERS:
            raise OutputError(
                f"{output}: PyTorch models are written as .onnx or as a folder; leave out {output.suffix}"
            )
    return [output for output in outputs if is_torch and output.suffix != ".onnx"]


def check_outputs(inputs: Sequence[Path], *outputs: Path | None, folders: Sequence[Path] = ()) -> None:
    """Find out before the work that an output cannot be written, or would overwrite an input.

    Raises:
        OutputError: see there.
    """
    given = [output for output in outputs if output is not None]
    for index, output in enumerate(given):
        if output in folders:
            api.check_replaceable(output)
        else:
            check_writable(output)
        if any(output.exists() and os.path.exists(path) and output.samefile(path) for path in inputs):
            raise OutputError(f"{output}: is an input, and inputs are never overwritten; choose another name")
        if any(output.resolve() == other.resolve() for other in given[:index]):
            raise OutputError(f"{output}: is asked for twice; give every result a name of its own")


def check_reports(reports: Iterable[Path] | None) -> list[Path]:
    """Refuse reports whose ending is not one of those that they can be written as.

    Raises:
        OutputError: see there.
    """
    paths = list(reports or ())
    for path in paths:
        report_ending(path)
    return paths


def write_result(
    terminal: Terminal,
    result: api.Result,
    outputs: Sequence[Path],
    plan: Path | None,
    reports: Iterable[Path] = (),
) -> None:
    """Write the network, the plan and the reports, print the report, and give it to programs."""
    report = with_command(result.report)
    texts = {path: rendered(report, path) for path in reports}  # before anything is written
    for output in outputs:
        result.save(output)
    if plan is not None:
        write_text(plan, result.plan.to_json() + "\n")
    for path, text in texts.items():
        write_text(path, text)
    terminal.console.print(report_table(report))
    for output in outputs:
        print_written(terminal, output)
    written = {
        "outputs": [str(path) for path in outputs],
        "plan": None if plan is None else str(plan),
        "reports": [str(path) for path in texts],
    }
    data: dict[str, Any] = json.loads(report.to_json())
    terminal.give(data | written)


def with_command(report: Report) -> Report:
    """Return the same with the command line that made it."""
    if report.provenance is None:
        return report
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return replace(report, provenance=replace(report.provenance, command=shlex.join(words)))


def wants_times(reports: Iterable[Path]) -> bool:
    """Whether a report is asked for that shows times."""
    return any(report_ending(path) == ".html" for path in reports)


def print_written(terminal: Terminal, output: Path) -> None:
    """Print which network was written, and its size."""
    files = output.iterdir() if output.is_dir() else [output]
    size = sum(path.stat().st_size for path in files)
    terminal.console.print(f"Wrote       {output} ({size / 1e6:.2f} MB)", **options.PLAIN)


def print_weights(terminal: Terminal, source: Source) -> None:
    """Print what a PyTorch model's weights are."""
    if weights := getattr(source, "weights", ""):
        terminal.console.print(f"Weights     {weights}", **options.PLAIN)
