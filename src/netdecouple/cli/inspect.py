"""netdecouple inspect: what a network is made of, and how far it can go."""

from __future__ import annotations

from netdecouple import api, doors
from netdecouple.cli import options
from netdecouple.cli.sources import check_onnx_only, torch_model
from netdecouple.report.text import inspect_table, reach_table


def inspect(
    model: options.AnyModel, input_size: options.InputSize = None, weights: options.Weights = None
) -> None:
    """Show every layer's shape, MACs and principal components, and which budgets can be met.

    Example: netdecouple inspect model.onnx
    """
    console = options.console()
    if doors.is_named(model):
        opened = torch_model(console, model, weights)
        seen = doors.named().inspect(
            opened, options.preprocessing(None, input_size, None, None, opened.preprocessing)
        )
    else:
        check_onnx_only(model, {"--weights": weights})
        seen = api.inspect(model, options.preprocessing(None, input_size, None, None).size)
    console.print(inspect_table(seen.model, seen.layers, seen.energy))
    console.print(reach_table(seen.layers, seen.least_macs, seen.least_parameters))
