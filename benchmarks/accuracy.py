"""Accuracy against MACs on pretrained CIFAR-10 networks, beside the paper's own method. Prints a table.

Needs the folder of pretrained networks (NETDECOUPLE_SHARED, or ../shared beside the repository).
Calibration uses training images without labels; test images are only ever looked at to print.

    python benchmarks/accuracy.py                       # everything, about an hour on two cores
    python benchmarks/accuracy.py --network resnet20 --ratio 2
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from netdecouple import Preprocessing, Settings
from netdecouple.api import accuracy
from netdecouple.application import apply
from netdecouple.calibration import load
from netdecouple.errors import BudgetError
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.analysis import analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.sensitivity import agreement
from netdecouple.planning.solve import make_plan, published_plan
from netdecouple.sampling import Inputs

CIFAR10 = Preprocessing(
    (32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)  # as these networks were trained
METHODS = {
    "paper: data-free, one T": Settings(data_free=True, uniform_rank=True),
    "data-aware ND, T per layer": Settings(uniform_rank=True, families=("nd-dp",)),
    "data-aware ND, T per channel": Settings(families=("nd-dp",)),
    "data-aware, all families": Settings(),
}


@dataclass(frozen=True)
class Row:
    network: str
    images: int
    method: str
    asked: float
    reached: float
    before: float
    after: float
    held_back: float
    seconds: float


def shared() -> Path:
    """The folder of pretrained networks."""
    folder = Path(os.environ.get("NETDECOUPLE_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "models").is_dir():
        raise SystemExit(f"{folder}: no pretrained networks there; set NETDECOUPLE_SHARED")
    return folder


def rows(
    folder: Path, networks: list[str], ratios: list[float], images: list[int], methods: list[str]
) -> Iterator[Row]:
    """Run every combination. Ratios share one analysis, whose time counts in full for each of them."""
    data = np.load(folder / "data" / "cifar10.npz")
    test, labels = CIFAR10(data["test"]), data["test_labels"]
    for name in networks:
        model = read_model(folder / "models" / f"{name}.onnx")
        before = accuracy(OnnxNetwork(model, test).run(test)[0], labels)
        for method, count in product(methods, images):
            settings = METHODS[method]
            if settings.data_free and count != images[0]:
                continue
            start = time.perf_counter()
            chosen = load(
                f"{folder / 'data' / 'cifar10.npz'}:calib",
                channels=3,
                size=model.size,
                preprocessing=CIFAR10,
                samples=count,
                seed=settings.seed,
            )
            inputs = Inputs.split(chosen.images, settings.seed)
            network = OnnxNetwork(model, inputs.images)
            analysis = analyze(network, inputs, settings)
            analyzed = time.perf_counter() - start
            for ratio in ratios:
                start = time.perf_counter()
                budget = [Budget(Macs(), 1 / ratio)]
                try:
                    plan = (
                        published_plan(analysis, budget)
                        if settings.data_free
                        else make_plan(analysis, budget)
                    )
                except BudgetError:
                    continue
                decoupled = network.decoupled(apply(network, inputs, plan).factorizations)
                seconds = analyzed + time.perf_counter() - start
                after = accuracy(network.run_model(decoupled, test)[0], labels)
                same = agreement(
                    network.run(inputs.held_back)[0], network.run_model(decoupled, inputs.held_back)[0]
                )
                used = 0 if settings.data_free else count
                yield Row(
                    name, used, method, ratio, plan.macs_before / plan.macs, before, after, same, seconds
                )


def main(
    network: Annotated[list[str] | None, typer.Option()] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Times fewer MACs.")] = None,
    images: Annotated[list[int] | None, typer.Option(help="Calibration images.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(METHODS)}")] = None,
) -> None:
    """Print the table of accuracy against MACs."""
    console = Console()
    table = Table(title="CIFAR-10 test, 1,000 images; standard error of an accuracy about 0.9 points")
    for column in (
        "network",
        "method",
        "images",
        "asked",
        "MACs",
        "top-1",
        "drop",
        "same class, held back",
        "seconds",
    ):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    found = rows(
        shared(),
        network or ["resnet20", "resnet56", "vgg16_cifar10"],
        ratio or [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
        images or [1000],
        method or list(METHODS),
    )
    for row in found:
        cells = (
            row.network,
            row.method,
            str(row.images or "–"),
            f"{row.asked:g}×",
            f"{row.reached:.2f}× fewer",
            f"{100 * row.after:.1f}",
            f"{100 * (row.before - row.after):+.1f}",
            f"{100 * row.held_back:.1f}",
            f"{row.seconds:.0f}",
        )
        table.add_row(*cells)
        console.log(" ".join(cells))  # long runs are watched
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
