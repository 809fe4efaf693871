"""netdecouple apply: carry a saved plan out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from netdecouple import api, doors
from netdecouple.cli import options
from netdecouple.cli.results import check_networks, check_outputs, check_reports, wants_times, write_result
from netdecouple.cli.sources import check_onnx_only, torch_model
from netdecouple.cli.terminal import Json, Quiet, Terminal
from netdecouple.execution.run import Resources
from netdecouple.planning.plan import Plan


def apply(
    model: options.AnyModel,
    plan: Annotated[Path, typer.Argument(help="The plan, written by run --plan-out.", show_default=False)],
    output: options.Outputs,
    calib: options.Calib = None,
    preset: options.Preset = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    weights: options.Weights = None,
    report: options.Reports = None,
    work: options.Work = None,
    memory: options.Memory = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Carry a saved plan out on the model and the inputs it was made for; the result is the same network.

    \b
    Example:
      netdecouple apply model.onnx plan.json -o faster.onnx --calib inputs.npy
    """
    terminal = Terminal(quiet, as_json)
    console = terminal.console
    named = doors.is_named(model)
    check_outputs([model, plan], *output, *(report or ()), folders=check_networks(output, named))
    reports = check_reports(report)
    resources = Resources(work=work, memory=memory)
    result: Any
    if named:
        wanted = Plan.load(plan)
        opened = torch_model(console, model, weights, wanted.seed)
        pictures = options.preprocessing(preset, input_size, mean, std, opened.preprocessing)
        with terminal.bars() as bars:
            result = doors.named().apply_plan(
                opened,
                wanted,
                calib,
                preprocessing=pictures,
                to_onnx=any(path.suffix == ".onnx" for path in output),
                resources=resources,
                progress=bars,
            )
    else:
        check_onnx_only(model, {"--weights": weights})
        with terminal.bars() as bars:
            result = api.apply_plan(
                model,
                Plan.load(plan),
                calib,
                preprocessing=options.preprocessing(preset, input_size, mean, std),
                resources=resources,
                progress=bars,
            )
    found = write_result(console, result.timed() if wants_times(reports) else result, output, None, reports)
    terminal.give(found)
