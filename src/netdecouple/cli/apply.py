"""netdecouple apply: carry a saved plan out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import check_outputs, write_result
from netdecouple.planning.plan import Plan


def apply(
    model: options.Model,
    plan: Annotated[Path, typer.Argument(help="The plan, written by run --plan-out.", show_default=False)],
    output: options.Output,
    calib: options.Calib = None,
    preset: options.Preset = "none",
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    report: options.ReportFile = None,
) -> None:
    """Carry a saved plan out on the model and the inputs it was made for; the result is the same network.

    Example: netdecouple apply model.onnx plan.json -o faster.onnx --calib images/ --preset imagenet
    """
    check_outputs([model, plan], output, report)
    with options.Bars() as bars:
        result = api.apply_plan(
            model,
            Plan.load(plan),
            calib,
            preprocessing=options.preprocessing(preset, input_size, mean, std),
            progress=bars,
        )
    write_result(options.console(), result, output, None, report)
