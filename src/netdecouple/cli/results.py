"""Check outputs before the work, and write results after it, all of them or none."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from netdecouple import api
from netdecouple.cli.options import Opening
from netdecouple.cli.terminal import Terminal
from netdecouple.errors import ModelError, OutputError
from netdecouple.execution.scratch import StrPath, check_onnx, check_writable
from netdecouple.network import Source
from netdecouple.report.files import rendered, report_ending, write_text
from netdecouple.report.formatting import advice
from netdecouple.report.text import report_table
from netdecouple.runtimes.benchmark import BRIEF

WEIGHTS_ONLY = (".pt", ".pth", ".safetensors")


def check_model(model: Path) -> None:
    """Refuse files that hold weights and no network."""
    if model.suffix in WEIGHTS_ONLY and not api.is_named(model):
        raise ModelError(
            f"{model}: holds weights and no network; name that as well: torchvision:NAME --weights {model}"
        )


def check_run(
    inputs: tuple[Path, *tuple[StrPath | None, ...]],
    networks: Sequence[Path],
    plan: Path | None,
    reports: Iterable[Path] | None,
    work: Path | None,
) -> list[Path]:
    """Check the model, the first of the inputs, and all outputs before the work; return the reports."""
    check_model(inputs[0])
    is_torch = api.is_named(inputs[0])
    if not is_torch and len(networks) > 1:
        raise OutputError("an .onnx model becomes one .onnx file; give -o once")
    folders = [path for path in networks if is_torch and path.suffix != ".onnx"]
    paths = list(reports or ())
    check_outputs(inputs, *networks, plan, *paths, folders=folders, work=work)
    for path in set(networks).difference(folders):
        check_onnx(path)
    return check_reports(paths)


def check_outputs(
    inputs: Sequence[StrPath | None],
    *outputs: Path | None,
    folders: Sequence[Path] = (),
    work: Path | None = None,
) -> None:
    """Refuse outputs that cannot be written, are named twice, or would overwrite an input."""
    given = [output for output in outputs if output is not None]
    for output in given:
        if output in folders:
            api.check_replaceable(output)
        else:
            check_writable(output)
    api.check_outputs(given, api.files_of(*inputs), work)


def check_reports(reports: Iterable[Path] | None) -> list[Path]:
    """Refuse reports that end neither in .html nor in .json."""
    paths = list(reports or ())
    for path in paths:
        report_ending(path)
    return paths


def open_model(
    terminal: Terminal, model: Path, opening: Opening, seed: int = 0, outputs: Sequence[Path] = ()
) -> Source:
    """Open a network, which is exported if an output is an .onnx file.

    The origin of its weights is printed, and what was left out.
    """
    is_exported = any(path.suffix == ".onnx" for path in outputs)
    source = api.open_model(str(model), seed=seed, is_exported=is_exported, **opening.arguments())
    for label, attribute in {"Weights": "weights", "Left out": "left_out"}.items():
        if text := getattr(source, attribute, ""):
            terminal.say(label, text)
    return source


def write_result(
    terminal: Terminal,
    result: api.Result,
    outputs: Sequence[Path],
    plan: Path | None,
    reports: Sequence[Path],
    runtimes: Sequence[str] = (),
    threads: int = 1,
) -> None:
    """Write the network, the plan and the reports, print the report, and give it to programs.

    For a page, both networks are timed, if they were not: in ``runtimes``, with one thread and ``threads``.
    """
    report = result.report
    if any(report_ending(path) == ".html" for path in reports) and not report.benchmark:
        report = result.timed(tuple(dict.fromkeys(runtimes)), tuple(dict.fromkeys((1, threads)))).report
    if report.provenance is not None:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        report = replace(report, provenance=replace(report.provenance, command=command))
    texts = {path: rendered(report, path) for path in reports}  # before anything is written
    for output in outputs:
        result.save(output)
    if plan is not None:
        texts[plan] = result.plan.to_json() + "\n"
    for path, text in texts.items():
        write_text(path, text)
    shown = report
    if not (report.benchmark or report.speed or terminal.is_quiet):  # whether it is faster is always said
        shown = result.timed(tuple(runtimes)[:1], (threads,), BRIEF, layers=False).report
        if advice(shown):  # which layers lose the time
            shown = result.timed(tuple(runtimes)[:1], (threads,), BRIEF).report
    terminal.console.print(report_table(shown))
    for output in outputs:
        print_written(terminal, output)
    written = {
        "outputs": [str(path) for path in outputs],
        "plan": None if plan is None else str(plan),
        "reports": [str(path) for path in reports],
    }
    terminal.give(json.loads(report.to_json()) | written)


def print_written(terminal: Terminal, output: Path) -> None:
    """Print which network was written, and its size."""
    files = output.iterdir() if output.is_dir() else [output]
    size = sum(path.stat().st_size for path in files)
    terminal.say("Wrote", f"{output} ({size / 1e6:.2f} MB)")
