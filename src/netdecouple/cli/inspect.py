"""netdecouple inspect: what a network is made of, and how far it can go."""

from __future__ import annotations

from netdecouple import api
from netdecouple.cli import options
from netdecouple.report.text import inspect_table, reach_table


def inspect(model: options.Model, input_size: options.InputSize = None) -> None:
    """Show every layer's shape, MACs and principal components, and which budgets can be met.

    Example: netdecouple inspect model.onnx
    """
    seen = api.inspect(model, options.preprocessing("none", input_size, None, None).size)
    console = options.console()
    console.print(inspect_table(seen.model, seen.layers, seen.energy))
    console.print(reach_table(seen.layers, seen.least_macs, seen.least_parameters))
