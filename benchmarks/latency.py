"""Whole networks by the clock: originals, decoupled in standard operators, decoupled with the fused operator.

python benchmarks/latency.py                 # all networks; ResNets need ../shared, about ten minutes
python benchmarks/latency.py --network vgg16 --threads 1
python benchmarks/latency.py --store docs/latency.jsonl    # the documentation's table is made from it

ResNets are decoupled to half their MACs from 1,000 images, as in accuracy.py; VGG16 at 224 × 224 has random
weights and one rank for all layers but the first. It is timed as a whole and without its fully connected
layers, which are not decoupled and take their time reading 495 MB of weights. Batch 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.table import Table

import rows
from accuracy import CIFAR10, shared
from conversion import vgg16
from kernel import with_terms
from netdecouple import kernels
from netdecouple.convolution import Factorization, placeholder
from netdecouple.data.calibration import load
from netdecouple.errors import UnavailableError
from netdecouple.execution.machine import machine
from netdecouple.fitting.apply import apply
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.emission import Form
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.proto import up_to
from netdecouple.planning.analysis import analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.planner import make_plan
from netdecouple.planning.settings import Settings
from netdecouple.runtimes import runtime
from netdecouple.runtimes.onnxruntime import OnnxRuntime
from netdecouple.runtimes.timing import measure

NETWORKS = ("resnet20", "resnet56", "vgg16")
FORMS: tuple[Form, ...] = ("parallel", "fused")


def cases(name: str) -> Iterator[tuple[str, OnnxNetwork, dict[str, Factorization]]]:
    """Networks by a line that describes them, and how their layers are decoupled."""
    if name == "vgg16":
        proto = vgg16()
        image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
        for label, part in (("VGG16/224", proto), ("VGG16/224, convolutions", up_to(proto, ["pool5"]))):
            network = OnnxNetwork(read_model(part), image)
            for terms in (4, 3):
                chosen = {
                    la.name: placeholder(with_terms(la.geometry, terms), seed)
                    for seed, la in enumerate(network.layers)
                    if la.geometry and la.geometry.kh > 1 and la.geometry.n_i > 3
                }
                yield f"{label}, T = {terms}", network, chosen
        return
    source = f"{shared() / 'data' / 'cifar10.npz'}:calib"
    images = load(source, channels=3, size=(32, 32), preprocessing=CIFAR10, samples=1000, seed=0).images
    network = OnnxNetwork(read_model(shared() / "models" / f"{name}.onnx"), images)
    inputs = Inputs.split(images, 0)
    plan = make_plan(analyze(network, inputs, Settings(families=("nd-dp",))), [Budget(Macs(), 0.5)])
    yield name, network, apply(network, inputs, plan).factorizations


@dataclass(frozen=True)
class Times:
    """Networks that took turns: milliseconds (medians), and how many times faster than the first."""

    milliseconds: list[float]
    faster: list[tuple[float, float, float]]  # quartiles over rounds, of all but the first


@dataclass(frozen=True)
class Row:
    """A network, measured in every runtime that is there."""

    where: str
    network: str
    threads: int
    macs: float  # times fewer
    times: dict[str, Times]  # by runtime; the original, then FORMS, of which OpenVINO has the first only


def main(
    networks: Annotated[list[str] | None, typer.Option("--network", help=", ".join(NETWORKS))] = None,
    threads: Annotated[list[int] | None, typer.Option()] = None,
    seconds: Annotated[float, typer.Option(help="For each network, runtime and number of threads.")] = 10.0,
    store: Annotated[Path | None, typer.Option(help="Keep rows here: docs/latency.jsonl.")] = None,
) -> None:
    """Print the tables."""
    console = Console(width=140)
    found = []
    for name in networks or NETWORKS:
        for label, network, chosen in cases(name):
            layers = {la.name: la for la in network.layers}
            before = sum(la.macs for la in network.layers)
            saved = sum(layers[n].macs - f.macs(*layers[n].size) for n, f in chosen.items())
            models = [network.build({})]
            models += [network.build(chosen, dict.fromkeys(chosen, form)) for form in FORMS]
            feeds = {network.model.input_name: network_image(network)}
            for count in threads or [1, 2]:
                counts = {"onnxruntime": 3, "openvino": 2}
                times = {at: timed(at, models[:n], count, feeds, seconds) for at, n in counts.items()}
                known = {at: found for at, found in times.items() if found is not None}
                where = f"{machine()}, ONNX Runtime {OnnxRuntime.version}, {kernels.level()}"
                found.append(Row(where, label, count, before / (before - saved), known))
                rows.keep(store, found[-1])
                console.log(found[-1])
    for table in tables(found):
        console.print(table)


def tables(found: Iterable[Row]) -> Iterator[Table]:
    """A table for every machine."""
    last = {(row.where, row.network, row.threads): row for row in found}  # of those that were run again
    for where in dict.fromkeys(row.where for row in last.values()):
        out = Table(title=where)
        for column in (
            "network",
            "fewer MACs",
            "threads",
            "original",
            "standard operators",
            "fused operator",
        ):
            out.add_column(column, justify="left" if column == "network" else "right")
        for column in ("OpenVINO", "standard"):
            out.add_column(column, justify="right")
        for row in last.values():
            if row.where == where:
                cells = [cell for at in ("onnxruntime", "openvino") for cell in _cells(row.times.get(at))]
                out.add_row(row.network, f"{row.macs:.2f}×", f"{row.threads}", *cells)
        yield out


def _cells(times: Times | None) -> list[str]:
    if times is None:
        return ["–", "–"]
    ratios = [f"{middle:.2f}× ({lower:.2f}–{upper:.2f})" for lower, middle, upper in times.faster]
    return [f"{times.milliseconds[0]:.3g} ms", *ratios]


def read_rows(path: Path) -> list[Row]:
    """Every row of a file."""
    known: list[Any] = rows.read(path, Row)
    return [replace(row, times={at: Times(**t) for at, t in row.times.items()}) for row in known]


def network_image(network: OnnxNetwork) -> np.ndarray:
    """One random image of the size the network was opened with."""
    first = next(la for la in network.layers if la.geometry)
    assert first.geometry is not None
    return np.random.default_rng(0).standard_normal((1, first.geometry.n_i, *first.size)).astype(np.float32)


def timed(
    name: str, models: list[onnx.ModelProto], threads: int, feeds: dict[str, np.ndarray], seconds: float
) -> Times | None:
    """Time the original and the others, in turn; None where the runtime is missing."""
    try:
        place = runtime(name)
    except UnavailableError:
        return None
    sessions = [place.open(model, threads) for model in models]
    times = measure([partial(session.run, feeds) for session in sessions], seconds)
    ratios = np.percentile(times[:, :1] / times[:, 1:], (25, 50, 75), axis=0).T.tolist()
    return Times(np.median(times, axis=0).tolist(), [(lower, mid, upper) for lower, mid, upper in ratios])


if __name__ == "__main__":
    typer.run(main)
