"""netdecouple sweep: one network at several budgets, and the best trade."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api, curve, doors
from netdecouple.cli import options
from netdecouple.cli.results import check_outputs
from netdecouple.cli.sources import check_onnx_only, check_torch_only, torch_model
from netdecouple.cli.terminal import Json, Quiet, Terminal
from netdecouple.execution import executors as distribution
from netdecouple.execution.run import Resources
from netdecouple.planning.analysis import Settings
from netdecouple.planning.candidates import parse_families
from netdecouple.report.files import report_ending, write_text
from netdecouple.report.html import sweep_html
from netdecouple.report.sweep import Sweep
from netdecouple.report.text import families_table, knee_line, sweep_table

RENDERED: dict[str, Callable[[Sweep], str]] = {".json": Sweep.to_json, ".html": sweep_html}


def sweep(
    model: options.AnyModel,
    calib: options.Calib = None,
    macs: Annotated[
        str, typer.Option(help="Budgets: MACs that may stay, 80%,60%,50% or 1.5x,2x,3x.", show_default=False)
    ] = "",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Two results of earlier runs, to judge on the same inputs. (.onnx only)", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder to write the networks into, one per budget; without it only figures are kept.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the curve here as CSV.", show_default=False)
    ] = None,
    reports: Annotated[
        list[Path] | None,
        typer.Option(
            "--report", help="Write the curve here: .html or .json. Repeatable.", show_default=False
        ),
    ] = None,
    work: options.Work = None,
    memory: options.Memory = None,
    workers: options.Workers = None,
    scheduler: options.Scheduler = None,
    shards: options.Shards = None,
    labels: options.Labels = None,
    exclude: options.Exclude = None,
    data_free: options.DataFree = False,
    uniform_rank: options.UniformRank = False,
    families: options.Families = "all",
    loss: options.HowCompared = None,
    emit: options.Emit = "standard",
    samples: options.Samples = api.SAMPLES,
    seed: options.Seed = 0,
    preset: options.Preset = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    weights: options.Weights = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decouple a network to several budgets at little more than the price of one, and find the best trade.

    \b
    Examples:
      netdecouple sweep model.onnx --calib inputs.npy --macs 80%,60%,50% --csv curve.csv
      netdecouple sweep model.onnx --calib inputs.npy --macs 1.5x,2x,3x -o networks/
      netdecouple sweep model.onnx --calib inputs.npy --compare a.onnx b.onnx
    """
    terminal = Terminal(quiet, as_json)
    rendered = {path: RENDERED[report_ending(path)] for path in reports or ()}
    check_outputs([model, *(compare or ())], csv, *rendered)
    settings = Settings(
        tuple(exclude or ()), data_free, uniform_rank, seed, parse_families(families), loss=loss
    )
    resources = Resources(work=work, memory=memory, shards=shards)
    if doors.is_named(model):
        check_torch_only(model, {"--emit": emit != "standard", "--compare": compare}, "sweep")
        opened = torch_model(terminal.console, model, weights, seed)
        pictures = options.preprocessing(preset, input_size, mean, std, opened.preprocessing)
        with distribution.opened(workers, scheduler) as hands, terminal.bars() as bars:
            swept = doors.named().sweep(
                opened,
                calib,
                macs,
                labels=labels,
                settings=settings,
                preprocessing=pictures,
                samples=samples,
                resources=replace(resources, workers=hands),
                output=output,
                progress=bars,
            )
    else:
        check_onnx_only(model, {"--weights": weights})
        with distribution.opened(workers, scheduler) as hands, terminal.bars() as bars:
            swept = curve.sweep(
                model,
                calib,
                macs,
                compare=compare or (),
                labels=labels,
                settings=settings,
                emit=emit,
                preprocessing=options.preprocessing(preset, input_size, mean, std),
                samples=samples,
                resources=replace(resources, workers=hands),
                output=output,
                progress=bars,
            )
    if csv is not None:
        write_text(csv, swept.to_csv())
    for path, render in rendered.items():
        write_text(path, render(swept))
    _show(terminal, swept, [path for path in (csv, *rendered) if path is not None])


def _show(terminal: Terminal, swept: Sweep, written: Sequence[Path]) -> None:
    console = terminal.console
    console.print(sweep_table(swept))
    if swept.points:
        console.print(knee_line(swept))
    if any(compared.layers for compared in swept.compared):
        console.print(families_table(swept))
    for path in (*(p.file for p in swept.points if p.file), *written):
        console.print(f"Wrote       {path}", **options.PLAIN)
    terminal.give(json.loads(swept.to_json()) | {"outputs": [str(path) for path in written]})
