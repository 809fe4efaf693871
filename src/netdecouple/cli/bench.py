"""netdecouple bench: how fast networks are, with a stopwatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from netdecouple.cli import options
from netdecouple.cli.results import check_outputs
from netdecouple.cli.terminal import Json, Terminal
from netdecouple.report.files import write_text
from netdecouple.report.text import layer_times_tables, timing_tables
from netdecouple.runtimes import NAMES, runtime
from netdecouple.runtimes.benchmark import SECONDS, benchmark
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
        typer.Option(
            help="Shape of the input, where the networks leave it open: 1x3x224x224.", show_default=False
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=86400, help="Time to take per runtime and number of threads.")
    ] = SECONDS,
    layers: Annotated[bool, typer.Option("--layers", help="Tell ONNX Runtime's time per layer too.")] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open .pt2 files, which can run any code of their maker's.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write the times here as JSON.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Time networks against each other, in turns, and tell how much faster one is only if that shows.

    \b
    Examples:
      netdecouple bench model.onnx faster.onnx --threads 1 --threads 2
      netdecouple bench model.onnx faster.onnx --runtime openvino --report times.json
    """
    terminal = Terminal(as_json=as_json)
    check_outputs(models, report)
    found = [runtime(name, trust=trust) for name in dict.fromkeys(runtimes or NAMES[:1])]
    timed = benchmark(
        models,
        found,
        threads=tuple(dict.fromkeys(threads or [1])),
        shape=None if shape is None else parse_shape(shape),
        seconds=seconds,
        layers=layers,
    )
    if report is not None:
        write_text(report, timed.to_json())
    for table in (*timing_tables(timed), *layer_times_tables(timed)):
        terminal.console.print(table)
    terminal.give(json.loads(timed.to_json()))
