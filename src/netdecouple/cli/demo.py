"""netdecouple demo: every step, on the network and the images that come with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api, kernels
from netdecouple.cli import options
from netdecouple.cli.results import write_result
from netdecouple.cli.terminal import Output, Terminal
from netdecouple.errors import OutputError
from netdecouple.planning.settings import Settings
from netdecouple.report.text import budget_table, scores_table, timing_tables


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results.")] = Path(
        "netdecouple-demo"
    ),
    macs: Annotated[str, typer.Option(help="MACs that may stay.")] = "2x",
) -> None:
    """Decouple a small digit classifier and show MACs, accuracy and time before and after."""
    terminal = Terminal(Output())
    console = terminal.console
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot make the folder ({error.strerror}); choose another -o"
        ) from error
    model, data = (Path(__file__).parents[1] / "demo" / name for name in ("digits.onnx", "digits.npz"))
    console.print("A small VGG-like network that reads digits among clutter, and 512 unlabelled images.")
    with terminal.bars() as bars:
        result = api.decouple(
            model,
            f"{data}:calib",
            macs=macs,
            # the fused operator computes depthwise separable layers, and these are what it makes faster
            settings=Settings(families=("nd",)) if kernels.available() else Settings(),
            emit="fused" if kernels.available() else "standard",
            progress=bars,
            show_budgets=lambda rows, loss: console.print(budget_table(rows, loss)),
        )
    faster = output / "digits-decoupled.onnx"
    result.save(faster)
    scores = api.evaluate([model, faster], f"{data}:images,labels")
    networks = [model, faster]
    if kernels.available():
        networks.append(output / "digits-standard.onnx")
        api.lower(faster, networks[-1])
    times = api.bench(networks, layers=True)
    report = replace(result.report, accuracy=(scores[0].top1, scores[1].top1), benchmark=times)
    page = output / "report.html"
    result = replace(result, report=report)
    write_result(terminal, result, [faster], output / "plan.json", [output / "report.json", page])
    console.print(scores_table(scores))
    if not kernels.available():
        console.print("The fused operator was not built (no C++ compiler), so these are standard operators.")
    for table in timing_tables(times):
        console.print(table)
    console.print(
        f"Results are in {output}/; what was gained and lost, layer by layer: {page}", **options.PLAIN
    )
