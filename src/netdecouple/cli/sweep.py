"""netdecouple sweep: one network at several budgets, and the best trade."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import check_model, check_outputs, print_weights
from netdecouple.cli.terminal import Output, Terminal
from netdecouple.report.files import report_ending, write_text
from netdecouple.report.html import sweep_html
from netdecouple.report.sweep import Sweep
from netdecouple.report.text import families_table, knee_line, sweep_table

RENDERED: dict[str, Callable[[Sweep], str]] = {".json": Sweep.to_json, ".html": sweep_html}


@options.expanded
def sweep(
    model: options.Model,
    calib: options.Calib = None,
    macs: Annotated[str, options.option(help="Budgets: MACs that may stay, 80%,60%,50% or 1.5x,2x,3x.")] = "",
    compare: Annotated[
        tuple[Path, Path] | None,
        options.option(help="Two results of earlier runs, to compare on the same inputs."),
    ] = None,
    output: Annotated[
        Path | None,
        options.option(
            "-o",
            "--output",
            help="Folder to write the networks into, one per budget; without it only figures are kept.",
        ),
    ] = None,
    csv: Annotated[Path | None, options.option("--csv", help="Write the curve here as CSV.")] = None,
    reports: Annotated[
        list[Path] | None,
        options.option("--report", help="Write the curve here: .html or .json. Repeatable."),
    ] = None,
    execution: options.Execution = options.Execution(),
    labels: options.Labels = None,
    fitting: options.Fitting = options.Fitting(),
    emit: options.Emit = "standard",
    samples: options.Samples = api.SAMPLES,
    pictures: options.Pictures = options.Pictures(),
    weights: options.Weights = None,
    printed: Output = Output(),
) -> None:
    """Decouple a network to several budgets at little more than the price of one, and find the best trade.

    \b
    Examples:
      netdecouple sweep model.onnx --calib inputs.npy --macs 80%,60%,50% --csv curve.csv
      netdecouple sweep model.onnx --calib inputs.npy --macs 1.5x,2x,3x -o networks/
      netdecouple sweep model.onnx --calib inputs.npy --compare a.onnx b.onnx
    """
    terminal = Terminal(printed)
    check_model(model)
    rendered = {path: RENDERED[report_ending(path)] for path in reports or ()}
    check_outputs([model, *(compare or ())], csv, *rendered)
    settings = fitting.settings()
    exported = [] if output is None else [Path("network.onnx")]
    source = options.open_model(model, weights, fitting.seed, exported)
    print_weights(terminal, source)
    with execution.opened() as resources, terminal.bars() as bars:
        swept = api.sweep(
            source,
            calib,
            macs,
            compare=compare or (),
            labels=labels,
            settings=settings,
            emit=emit,
            preprocessing=pictures.preprocessing(source.preprocessing),
            samples=samples,
            resources=resources,
            output=output,
            progress=bars,
        )
    if csv is not None:
        write_text(csv, swept.to_csv())
    for path, render in rendered.items():
        write_text(path, render(swept))
    _print(terminal, swept, [path for path in (csv, *rendered) if path is not None])


def _print(terminal: Terminal, swept: Sweep, written: Sequence[Path]) -> None:
    console = terminal.console
    console.print(sweep_table(swept))
    if swept.points:
        console.print(knee_line(swept))
    if any(compared.layers for compared in swept.compared):
        console.print(families_table(swept))
    for path in (*(p.file for p in swept.points if p.file), *written):
        console.print(f"Wrote       {path}", **options.PLAIN)
    terminal.give(json.loads(swept.to_json()) | {"outputs": [str(path) for path in written]})
