"""netdecouple bench: measured times of networks, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import check_outputs
from netdecouple.cli.terminal import Json, Output, Terminal
from netdecouple.report.files import write_text
from netdecouple.report.text import layer_times_table, timing_tables
from netdecouple.runtimes import NAMES
from netdecouple.runtimes.benchmark import SECONDS
from netdecouple.runtimes.feeds import parse_shape


def bench(
    models: Annotated[
        list[Path],
        typer.Argument(help="The networks to time; the first is compared with.", show_default=False),
    ],
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            help=f"{', '.join(NAMES)}; default {NAMES[0]}. Repeatable.",
            autocompletion=options.among(NAMES),
        ),
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Threads to run with; default 1. Repeatable.")
    ] = None,
    shape: Annotated[
        str | None,
        options.option(help="Shape of the input, where the networks leave it open: 1x3x224x224."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=86400, help="Time to take per runtime and number of threads.")
    ] = SECONDS,
    layers: Annotated[bool, typer.Option("--layers", help="Show ONNX Runtime's time per layer too.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open .pt2 files, which can run any code of their author.")
    ] = False,
    report: Annotated[Path | None, options.option("--report", help="Write the times here as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Time networks against each other, in turns; a speedup is shown only if it is beyond the noise.

    \b
    Examples:
      netdecouple bench model.onnx faster.onnx --threads 1 --threads 2
      netdecouple bench model.onnx faster.onnx --runtime openvino --report times.json
    """
    terminal = Terminal(Output(as_json=as_json))
    check_outputs(models, report)
    times = api.bench(
        models,
        tuple(dict.fromkeys(runtimes or NAMES[:1])),
        threads=tuple(dict.fromkeys(threads or [1])),
        shape=None if shape is None else parse_shape(shape),
        seconds=seconds,
        layers=layers,
        trust=trust,
    )
    if report is not None:
        write_text(report, times.to_json())
    for table in (*timing_tables(times), *map(layer_times_table, times.layers)):
        terminal.console.print(table)
    terminal.give(json.loads(times.to_json()))
