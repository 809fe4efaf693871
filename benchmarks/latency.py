"""Whole networks by the clock: originals, decoupled in standard operators, decoupled with the fused operator.

python benchmarks/latency.py                 # all networks; ResNets need ../shared, about ten minutes
python benchmarks/latency.py --network vgg16 --threads 1

ResNets are decoupled to half their MACs from 1,000 images, as in accuracy.py; VGG16 at 224 × 224 has random
weights and one rank for all layers but the first. It is timed as a whole and without its fully connected
layers, which are not decoupled and take their time reading 495 MB of weights. Batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.table import Table

from accuracy import CIFAR10, shared
from conversion import vgg16
from kernel import with_terms
from netdecouple.application import apply
from netdecouple.calibration import load
from netdecouple.convolution import Factorization
from netdecouple.errors import UnavailableError
from netdecouple.frontends.onnx.emission import Form
from netdecouple.frontends.onnx.model import read_model, up_to
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.latency import placeholder
from netdecouple.planning.analysis import Settings, analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.solve import make_plan
from netdecouple.runtimes import runtime
from netdecouple.runtimes.timing import Ratio, measure
from netdecouple.sampling import Inputs

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


def main(
    networks: Annotated[list[str] | None, typer.Option("--network", help=", ".join(NETWORKS))] = None,
    threads: Annotated[list[int] | None, typer.Option()] = None,
    seconds: Annotated[float, typer.Option(help="For each network, runtime and number of threads.")] = 10.0,
) -> None:
    """Print the table."""
    console = Console(width=140)
    table = Table(title="Batch 1; how many times faster than the original (quartiles), ms in brackets")
    columns = (
        "network",
        "fewer MACs",
        "threads",
        "ONNX Runtime",
        "standard",
        "fused",
        "OpenVINO",
        "standard",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in networks or NETWORKS:
        for label, network, chosen in cases(name):
            layers = {la.name: la for la in network.layers}
            before = sum(la.macs for la in network.layers)
            saved = sum(layers[n].macs - f.macs(*layers[n].size) for n, f in chosen.items())
            models = [network.decoupled({})]
            models += [network.decoupled(chosen, dict.fromkeys(chosen, form)) for form in FORMS]
            feeds = {network.model.input_name: network_image(network)}
            for count in threads or [1, 2]:
                cells = [label, f"{before / (before - saved):.2f}×", f"{count}"]
                cells += timed("onnxruntime", models, count, feeds, seconds)
                cells += timed("openvino", models[:2], count, feeds, seconds)
                table.add_row(*cells)
                console.log(" | ".join(cells))
    console.print(table)


def network_image(network: OnnxNetwork) -> np.ndarray:
    """One random image of the size the network was opened with."""
    first = next(la for la in network.layers if la.geometry)
    assert first.geometry is not None
    return np.random.default_rng(0).standard_normal((1, first.geometry.n_i, *first.size)).astype(np.float32)


def timed(
    name: str, models: list[onnx.ModelProto], threads: int, feeds: dict[str, np.ndarray], seconds: float
) -> list[str]:
    """The original's milliseconds, and how much faster the others are; blanks where a runtime is missing."""
    try:
        place = runtime(name)
    except UnavailableError:
        return ["–"] * len(models)
    sessions = [place.open(model, threads) for model in models]
    times = measure([lambda s=s: s.run(feeds) for s in sessions], seconds)
    cells = [f"{np.median(times[:, 0]):.3g} ms"]
    for column in range(1, len(models)):
        ratio = Ratio.of(times[:, 0], times[:, column])
        middle = np.median(times[:, 0] / times[:, column])
        cells.append(
            f"{middle:.2f}× ({ratio.lower:.2f}–{ratio.upper:.2f}) [{np.median(times[:, column]):.3g}]"
        )
    return cells


if __name__ == "__main__":
    typer.run(main)
