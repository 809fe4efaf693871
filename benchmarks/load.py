"""Does other work on the machine change what a budget in time gives? Prints a table.

ResNet-20 is decoupled to a share of its time, again and again, while as many processes as there are cores
do nothing but compute; every run times all layers anew. Afterwards, with these gone, all results take turns.

Needs the folder of pretrained networks (NETDECOUPLE_SHARED, or ../shared beside the repository).

    python benchmarks/load.py                    # five runs: a quarter of an hour
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import netdecouple
from accuracy import CIFAR10, shared
from netdecouple import Settings
from netdecouple.errors import NetDecoupleError
from netdecouple.runtimes.onnxruntime import OnnxRuntime
from netdecouple.runtimes.timing import Stopwatch


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Let so many processes compute for nothing."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main(
    share: Annotated[str, typer.Option(help="Of the time, that may stay.")] = "60%",
    runs: Annotated[int, typer.Option(help="How many.")] = 5,
    images: Annotated[int, typer.Option(help="To calibrate with.")] = 500,
    processes: Annotated[int | None, typer.Option(help="That compute meanwhile; one per core.")] = None,
) -> None:
    """Print the table."""
    console = Console()
    path = shared() / "models" / "resnet20.onnx"
    inputs = CIFAR10(np.load(shared() / "data" / "cifar10.npz")["calib"][:images])
    count = (os.cpu_count() or 1) if processes is None else processes
    found: list[Any] = []
    with spinning(count):
        for _ in range(runs):
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_CACHE_HOME"] = folder  # no times of other runs
                try:
                    result = netdecouple.decouple(
                        path, inputs, latency=share, settings=Settings(families=("nd",))
                    )
                except NetDecoupleError as error:
                    console.log(error)
                    continue
            found.append(result)
            console.log(f"{time.perf_counter() - start:.0f} s: {result.report.speed}")
    opened = [OnnxRuntime().open(model, 1) for model in (path, *(result.model for result in found))]
    feeds = {opened[0].inputs[0].name: inputs[:1]}
    times = Stopwatch(1).times([partial(session.run, feeds) for session in opened], 10.0)
    table = Table(title=f"ResNet-20 at {share} of its time, found beside {count} spinning processes")
    for column in ("run", "MACs", "said", "measured quietly"):
        table.add_column(column)
    for number, (result, milliseconds) in enumerate(zip(found, times[1:], strict=True), 1):
        report = result.report
        said = f"{report.speed.share:.1%}"
        ratio = f"{report.macs_before / report.macs:.2f}× fewer"
        table.add_row(str(number), ratio, said, f"{milliseconds / times[0]:.1%}")
    console.print(table)
    if len(found) > 1:
        console.print(
            f"the slowest result takes {times[1:].max() / times[1:].min() - 1:.1%} more than the fastest"
        )


if __name__ == "__main__":
    typer.run(main)
