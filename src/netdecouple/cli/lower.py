"""netdecouple lower: a network without operators of our own."""

from __future__ import annotations

from netdecouple.cli import options
from netdecouple.cli.results import check_outputs, tell_written
from netdecouple.cli.terminal import Json, Quiet, Terminal
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx import lowering
from netdecouple.frontends.onnx.model import load, write_model
from netdecouple.frontends.onnx.proto import nodes_of


def lower(model: options.Model, output: options.Output, quiet: Quiet = False, as_json: Json = False) -> None:
    """Write a network's fused operators as standard ones, which every runtime has.

    \b
    Example:
      netdecouple lower fused.onnx -o standard.onnx
    """
    terminal = Terminal(quiet, as_json)
    check_outputs([model], output)
    proto, name = load(model)
    count = sum(map(lowering.is_fused, nodes_of(proto.graph)))
    if not count:
        raise ModelError(f"{name}: the model has no fused operators; there is nothing to lower")
    lowered = lowering.lower(proto)
    write_model(lowered, output)
    terminal.console.print(f"Lowered     {count} fused operator{'s' * (count > 1)}", **options.PLAIN)
    tell_written(terminal.console, output)
    terminal.give({"model": name, "operators": count, "outputs": [str(output)]})
