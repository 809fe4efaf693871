"""What a sweep over five budgets costs, in runs of one budget. Prints a table.

python benchmarks/sweep.py                                       # ResNet-20 and ResNet-56, 500 images
python benchmarks/sweep.py --networks resnet20 --images 1000 --core 1

Every command is a process of its own on one and the same core; what counts is its user time, which others
who keep the machine busy hardly change. The networks at 50 % of both ways are compared byte by byte.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

SHARED = Path(os.environ.get("NETDECOUPLE_SHARED") or Path(__file__).parents[2] / "shared")
BUDGETS = "80%,65%,50%,40%,35%"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def main(
    networks: Annotated[
        str, typer.Option(help="Names in models/, separated by commas.")
    ] = "resnet20,resnet56",
    images: Annotated[int, typer.Option(help="To calibrate with.")] = 500,
    families: Annotated[str, typer.Option(help="As for netdecouple run.")] = "all",
    core: Annotated[int | None, typer.Option(help="To run on; default the last that may be used.")] = None,
) -> None:
    """Run one budget, then the sweep, for every network."""
    if hasattr(os, "sched_setaffinity"):  # inherited by what is started
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if core is None else core})
    table = Table(
        title=f"{families} families, {images} images, one core; the sweep is over {BUDGETS} of the MACs"
    )
    for column in ("network", "one run at 50 %", "sweep", "sweep / run", "same network at 50 %", "knee"):
        table.add_column(column, justify="right")
    for name in networks.split(","):
        table.add_row(name, *measured(name, images, families))
    Console(width=120).print(table)


def measured(name: str, images: int, families: str) -> list[str]:
    """One line of the table."""
    model = SHARED / "models" / f"{name}.onnx"
    data = f"{SHARED / 'data' / 'cifar10.npz'}:calib"
    common = [
        str(model),
        "--calib",
        data,
        "--preset",
        "cifar10",
        "--samples",
        str(images),
        "--families",
        families,
    ]
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.onnx"
        run, _ = user_seconds("run", *common, "--macs", "50%", "-o", str(one), "--json")
        swept, told = user_seconds("sweep", *common, "--macs", BUDGETS, "-o", folder, "--json")
        points = told["points"]
        same = (
            one.read_bytes()
            == Path(next(p["file"] for p in points if p["budget"] == "50% MACs")).read_bytes()
        )
    knee = "none" if told["knee"] is None else points[told["knee"]]["budget"]
    return [f"{run:.1f} s", f"{swept:.1f} s", f"{swept / run:.2f}", "yes" if same else "NO", knee]


def user_seconds(*arguments: str) -> tuple[float, dict]:
    """Run a command; return its user time and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = subprocess.run(
        [sys.executable, "-m", "netdecouple", *arguments],
        env=os.environ | ONE_THREAD,
        stdout=subprocess.PIPE,
        check=True,
    )
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, json.loads(ended.stdout)


if __name__ == "__main__":
    typer.run(main)
