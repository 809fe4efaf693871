"""netdecouple run: a network in, a faster one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import (
    check_model,
    check_networks,
    check_outputs,
    check_reports,
    print_weights,
    wants_times,
    write_result,
)
from netdecouple.cli.terminal import Output, Terminal
from netdecouple.planning.candidates import Rule
from netdecouple.report.text import budget_table


@options.expanded
def run(
    model: options.Model,
    output: options.Outputs,
    calib: options.Calib = None,
    macs: Annotated[str | None, typer.Option(help="MACs that may stay: 50% or 2x (two times fewer).")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters that may stay: 50% or 2x.")] = None,
    latency: Annotated[
        str | None, typer.Option(help="Time that may stay, measured here for one input: 60% or 2x.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0, help="Instead of a budget: points of top-1 accuracy that may be lost on --labels."
        ),
    ] = None,
    labels: options.Labels = None,
    fitting: options.Fitting = options.Fitting(),
    method: Annotated[
        str | None,
        options.option(
            help="Instead of a budget, one method for every convolution but the first: nd-dp:T=4, "
            "nd:energy=0.8, cd:rank=32, sd:2x, cd+nd:40%. With --data-free exactly as published."
        ),
    ] = None,
    emit: options.Emit = "standard",
    runtime: options.Runtime = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads to measure with.")] = 1,
    samples: options.Samples = api.SAMPLES,
    pictures: options.Pictures = options.Pictures(),
    weights: options.Weights = None,
    plan_out: Annotated[Path | None, options.option(help="Write the plan here as JSON.")] = None,
    report: options.Reports = None,
    execution: options.Execution = options.Execution(),
    printed: Output = Output(),
) -> None:
    """Decouple a network to a budget, from a few hundred unlabelled inputs.

    \b
    Examples:
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy --macs 50%
      netdecouple run model.onnx -o faster.onnx --calib inputs.npy --latency 60%
      netdecouple run torchvision:resnet18 -o faster/ --calib images/ --macs 2x
    """
    terminal = Terminal(printed)
    check_model(model)
    check_outputs([model], *output, plan_out, *(report or ()), folders=check_networks(model, output))
    reports = check_reports(report)
    settings = fitting.settings(None if method is None else Rule.parse(method))
    source = options.open_model(model, weights, fitting.seed, output)
    print_weights(terminal, source)
    with execution.opened() as resources, terminal.bars() as bars:
        result = api.decouple(
            source,
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
            preprocessing=pictures.preprocessing(source.preprocessing),
            samples=samples,
            resources=resources,
            progress=bars,
            show_budgets=lambda rows, loss: terminal.console.print(budget_table(rows, loss)),
        )
    if wants_times(reports):
        places = (*source.runtimes, *([runtime] if runtime else []))
        result = result.timed(tuple(dict.fromkeys(places)), tuple(dict.fromkeys((1, threads))))
    write_result(terminal, result, output, plan_out, reports)
