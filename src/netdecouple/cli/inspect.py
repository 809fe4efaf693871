"""netdecouple inspect: what a network is made of, and how far it can go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api, doors
from netdecouple.cli import options
from netdecouple.cli.results import check_outputs
from netdecouple.cli.sources import check_onnx_only, torch_model
from netdecouple.cli.terminal import Json, Quiet, Terminal
from netdecouple.report.files import write_text
from netdecouple.report.html import inspect_html
from netdecouple.report.text import inspect_table, reach_table


def inspect(
    model: options.AnyModel,
    input_size: options.InputSize = None,
    weights: options.Weights = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write it here as a page, too.", show_default=False)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show every layer's shape, MACs and principal components, and which budgets can be met.

    \b
    Examples:
      netdecouple inspect model.onnx
      netdecouple inspect model.onnx --html model.html
    """
    terminal = Terminal(quiet, as_json)
    console = terminal.console
    check_outputs([model], html)
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
    if html is not None:
        write_text(html, inspect_html(seen))
        console.print(f"Wrote       {html}", **options.PLAIN)
    terminal.give(json.loads(seen.to_json()))
