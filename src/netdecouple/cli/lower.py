"""netdecouple lower: a network without operators of our own."""

from __future__ import annotations

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import check_outputs, print_written
from netdecouple.cli.terminal import Output, Terminal


@options.expanded
def lower(model: options.OnnxModel, output: options.Output, printed: Output = Output()) -> None:
    """Write a network's fused operators as standard ones, which every runtime has.

    \b
    Example:
      netdecouple lower fused.onnx -o standard.onnx
    """
    terminal = Terminal(printed)
    check_outputs([model], output)
    count = api.lower(model, output)
    terminal.console.print(f"Lowered     {count} fused operator{'s' * (count > 1)}", **options.PLAIN)
    print_written(terminal, output)
    terminal.give({"model": model.name, "operators": count, "outputs": [str(output)]})
