"""netdecouple apply: apply a saved plan."""

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
from netdecouple.planning.plan import Plan


@options.expanded
def apply(
    model: options.Model,
    plan: Annotated[Path, typer.Argument(help="The plan, written by run --plan-out.", show_default=False)],
    output: options.Outputs,
    calib: options.Calib = None,
    pictures: options.Pictures = options.Pictures(),
    weights: options.Weights = None,
    report: options.Reports = None,
    memory: options.Memory = options.Memory(),
    printed: Output = Output(),
) -> None:
    """Apply a saved plan to the model and the inputs it was made for; the result is the same network.

    \b
    Example:
      netdecouple apply model.onnx plan.json -o faster.onnx --calib inputs.npy
    """
    terminal = Terminal(printed)
    check_model(model)
    check_outputs([model, plan], *output, *(report or ()), folders=check_networks(model, output))
    reports = check_reports(report)
    saved = Plan.load(plan)
    source = options.open_model(model, weights, saved.seed, output)
    print_weights(terminal, source)
    with terminal.bars() as bars:
        result = api.apply_plan(
            source,
            saved,
            calib,
            preprocessing=pictures.preprocessing(source.preprocessing),
            resources=memory.resources(),
            progress=bars,
        )
    write_result(terminal, result.timed() if wants_times(reports) else result, output, None, reports)
