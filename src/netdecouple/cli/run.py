"""netdecouple run: a network in, a faster one out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from netdecouple import api, doors
from netdecouple.cli import options
from netdecouple.cli.results import check_networks, check_outputs, check_reports, wants_times, write_result
from netdecouple.cli.sources import check_onnx_only, check_torch_only, torch_model
from netdecouple.cli.terminal import Json, Quiet, Terminal
from netdecouple.execution import executors as distribution
from netdecouple.execution.run import Resources
from netdecouple.planning.analysis import Settings
from netdecouple.planning.candidates import Rule, parse_families
from netdecouple.planning.solve import BudgetRow
from netdecouple.report.text import budget_table


def run(
    model: options.AnyModel,
    output: options.Outputs,
    calib: options.Calib = None,
    macs: Annotated[str | None, typer.Option(help="MACs that may stay: 50% or 2x (two times fewer).")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters that may stay: 50% or 2x.")] = None,
    latency: Annotated[
        str | None,
        typer.Option(help="Time that may stay, measured here for one input: 60% or 2x. (.onnx only)"),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Instead of a budget: points of top-1 accuracy that may be lost on --labels. (.onnx only)",
        ),
    ] = None,
    labels: options.Labels = None,
    exclude: options.Exclude = None,
    data_free: options.DataFree = False,
    uniform_rank: options.UniformRank = False,
    families: options.Families = "all",
    loss: options.HowCompared = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Instead of a budget, one method for every convolution but the first: nd-dp:T=4, "
            "nd:energy=0.8, cd:rank=32, sd:2x, cd+nd:40%. With --data-free exactly as published.",
            show_default=False,
        ),
    ] = None,
    emit: options.Emit = "standard",
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Choose by measuring in onnxruntime or openvino how layers are written. (.onnx only)",
            show_default=False,
            autocompletion=options.among(("onnxruntime", "openvino")),
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads to measure with.")] = 1,
    samples: options.Samples = api.SAMPLES,
    seed: options.Seed = 0,
    preset: options.Preset = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    weights: options.Weights = None,
    plan_out: Annotated[
        Path | None, typer.Option(help="Write the plan here as JSON.", show_default=False)
    ] = None,
    report: options.Reports = None,
    work: options.Work = None,
    memory: options.Memory = None,
    workers: options.Workers = None,
    scheduler: options.Scheduler = None,
    shards: options.Shards = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decouple a network to a budget, from a few hundred unlabelled inputs.

    \b
    Examples:
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy --macs 50%
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy --latency 60%
      netdecouple run torchvision:resnet18 -o faster/ --calib images/ --macs 2x
    """
    terminal = Terminal(quiet, as_json)
    console = terminal.console
    named = doors.is_named(model)
    check_outputs([model], *output, plan_out, *(report or ()), folders=check_networks(output, named))
    reports = check_reports(report)
    rule = None if method is None else Rule.parse(method)
    settings = Settings(
        tuple(exclude or ()), data_free, uniform_rank, seed, parse_families(families), rule, loss
    )

    resources = Resources(work=work, memory=memory, shards=shards)

    def show(rows: list[BudgetRow], loss: str) -> None:
        console.print(budget_table(rows, loss))

    result: Any
    if named:
        check_torch_only(
            model,
            {
                "--latency": latency,
                "--max-drop": max_drop is not None,
                "--runtime": runtime,
                "--threads": threads != 1,
                "--emit": emit != "standard",
            },
        )
        opened = torch_model(console, model, weights, seed)
        pictures = options.preprocessing(preset, input_size, mean, std, opened.preprocessing)
        with distribution.opened(workers, scheduler) as hands, terminal.bars() as bars:
            result = doors.named().decouple(
                opened,
                calib,
                macs=macs,
                parameters=params,
                settings=settings,
                labels=labels,
                preprocessing=pictures,
                samples=samples,
                resources=replace(resources, workers=hands),
                to_onnx=any(path.suffix == ".onnx" for path in output),
                progress=bars,
                show_budgets=show,
            )
    else:
        check_onnx_only(model, {"--weights": weights})
        with distribution.opened(workers, scheduler) as hands, terminal.bars() as bars:
            result = api.decouple(
                model,
                calib,
                macs=macs,
                parameters=params,
                latency=latency,
                max_drop=max_drop,
                labels=labels,
                settings=settings,
                emit=emit,
                runtime=runtime,
                threads=threads,
                preprocessing=options.preprocessing(preset, input_size, mean, std),
                samples=samples,
                resources=replace(resources, workers=hands),
                progress=bars,
                show_budgets=show,
            )
    if wants_times(reports):
        places = ("onnxruntime", *([runtime] if runtime else []))
        result = result.timed(
            () if named else tuple(dict.fromkeys(places)), tuple(dict.fromkeys((1, threads)))
        )
    found = write_result(console, result, output, plan_out, reports)
    terminal.give(found)
