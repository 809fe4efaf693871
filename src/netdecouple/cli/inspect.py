"""netdecouple inspect: what a network is made of, and how far it can go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import check_model, check_outputs, print_weights
from netdecouple.cli.terminal import Output, Terminal
from netdecouple.report.files import write_text
from netdecouple.report.html import inspect_html
from netdecouple.report.text import inspect_table, reach_table


@options.expanded
def inspect(
    model: options.Model,
    input_size: Annotated[
        str | None, options.option(help="Height and width: 224 or 480x640, where the model leaves it open.")
    ] = None,
    weights: options.Weights = None,
    html: Annotated[Path | None, options.option("--html", help="Write it here as a page, too.")] = None,
    printed: Output = Output(),
) -> None:
    """Show every layer's shape, MACs and principal components, and which budgets can be met.

    \b
    Examples:
      netdecouple inspect model.onnx
      netdecouple inspect model.onnx --html model.html
    """
    terminal = Terminal(printed)
    check_model(model)
    check_outputs([model], html)
    source = options.open_model(model, weights)
    print_weights(terminal, source)
    inspection = api.inspect(source, None if input_size is None else options.parse_size(input_size))
    terminal.console.print(inspect_table(inspection))
    terminal.console.print(reach_table(inspection))
    if html is not None:
        write_text(html, inspect_html(inspection))
        terminal.console.print(f"Wrote       {html}", **options.PLAIN)
    terminal.give(json.loads(inspection.to_json()))
