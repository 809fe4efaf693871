"""Accuracy against MACs on pretrained CIFAR-10 networks, beside the paper's own method. Prints a table.

Needs the folder of pretrained networks (NETDECOUPLE_SHARED, or ../shared beside the repository).
Calibration uses training images without labels; test images are only ever looked at to print.

    python benchmarks/accuracy.py                       # everything, about an hour on two cores
    python benchmarks/accuracy.py --network resnet20 --ratio 2
    python benchmarks/accuracy.py --csv docs/accuracy.csv --plot docs/accuracy.svg    # needs matplotlib
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from netdecouple import Preprocessing, Settings
from netdecouple.data.calibration import load
from netdecouple.errors import BudgetError
from netdecouple.fitting.apply import apply
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.pipeline import accuracy
from netdecouple.planning.analysis import analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.divergence import agreement
from netdecouple.planning.planner import plan_within

CIFAR10 = Preprocessing(  # as these networks were trained
    size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
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
        before = accuracy(OnnxNetwork(model, test).run(test), labels)
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
                    plan = plan_within(analysis, budget)
                except BudgetError:
                    continue
                decoupled = network.build(apply(network, inputs, plan).factorizations)
                seconds = analyzed + time.perf_counter() - start
                after = accuracy(network.run_built(decoupled, test), labels)
                same = agreement(
                    network.run(inputs.held_out)[0], network.run_built(decoupled, inputs.held_out)[0]
                )
                used = 0 if settings.data_free else count
                yield Row(
                    name,
                    used,
                    method,
                    ratio,
                    plan.before.macs / plan.after.macs,
                    before,
                    after,
                    same,
                    seconds,
                )


def main(
    network: Annotated[list[str] | None, typer.Option()] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Times fewer MACs.")] = None,
    images: Annotated[list[int] | None, typer.Option(help="Calibration images.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(METHODS)}")] = None,
    table_file: Annotated[Path | None, typer.Option("--csv", help="Add the rows to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the points lost against MACs, of all its rows.")
    ] = None,
) -> None:
    """Print the table of accuracy against MACs; rows go to the CSV file as they come."""
    console = Console()
    known: list[Row] = []
    found: Iterable[Row] = rows(
        shared(),
        network or ["resnet20", "resnet56", "vgg16_cifar10"],
        ratio or [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
        images or [1000],
        method or list(METHODS),
    )
    for row in found:
        console.log(" ".join(_cells(row)))  # long runs are watched
        known.append(row)
        if table_file is not None:
            _append(table_file, row)
    console.print(table(known))
    if plot is not None:
        draw(known if table_file is None else read(table_file), plot)


def table(found: Iterable[Row]) -> Table:
    """A line for every row."""
    out = Table(title="CIFAR-10 test, 1,000 images; standard error of an accuracy about 0.9 points")
    names = (
        "network",
        "method",
        "images",
        "asked",
        "MACs",
        "top-1",
        "drop",
        "same class, held back",
        "seconds",
    )
    for name in names:
        out.add_column(name, justify="left" if name in ("network", "method") else "right")
    for row in found:
        out.add_row(*_cells(row))
    return out


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.network,
        row.method,
        f"{row.images:g}" if row.images else "–",
        f"{row.asked:g}×",
        f"{row.reached:.2f}× fewer",
        f"{100 * row.after:.1f}",
        f"{100 * (row.before - row.after):+.1f}",
        f"{100 * row.held_back:.1f}",
        f"{row.seconds:.0f}",
    )


def _append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(row))


def read(path: Path) -> list[Row]:
    """Every row of a CSV file; of those that were run again, the last."""
    with path.open(newline="") as file:
        found = [
            Row(*(float(text) if text.replace(".", "", 1).isdigit() else text for text in line.values()))
            for line in csv.DictReader(file)
        ]
    return list({(r.network, r.method, r.images, r.asked): r for r in found}.values())


def draw(found: Sequence[Row], path: Path) -> None:
    """Draw the points of top-1 lost against the MAC ratio, a panel per network and a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "netdecouple"  # the same rows give the same file
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row.network for row in found))
    figure, panels = pyplot.subplots(
        1, len(networks), figsize=(4.2 * len(networks), 3.6), squeeze=False, layout="constrained"
    )
    for network, panel in zip(networks, panels[0], strict=True):
        for index, method in enumerate(METHODS):
            own = sorted(
                (r for r in found if (r.network, r.method) == (network, method)), key=lambda r: r.reached
            )
            points = [(row.reached, 100 * (row.before - row.after)) for row in own]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", label=method)
        panel.axhline(1.0, color="0.6", linewidth=0.8, linestyle="--")
        panel.set(title=network, xlabel="times fewer MACs", ylabel="top-1 points lost")
        widest = max(row.asked for row in found if row.network == network)
        panel.set(xlim=(1.2, widest + 0.2), ylim=(-1.5, 20))
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
