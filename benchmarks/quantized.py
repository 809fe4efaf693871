"""Quantisation after decoupling: accuracy and time of float32 and int8, before and after. Prints a table.

Networks are decoupled to half their MACs and then quantised by ONNX Runtime (static, QDQ, int8 weights per
channel, int8 activations), original and decoupled alike, both with the same unlabelled calibration images.
Batch 1, one thread; all variants of a network take turns. Test images are only ever looked at to print.

    python benchmarks/quantized.py                                     # half an hour on one core
    python benchmarks/quantized.py --network resnet20 --images 300
    python benchmarks/quantized.py --markdown docs/quantized.md
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime
import typer
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console

import netdecouple
from accuracy import CIFAR10, shared
from netdecouple.data.calibration import load
from netdecouple.frontends.onnx.fused import lower
from netdecouple.pipeline import accuracy
from netdecouple.planning.divergence import agreement
from netdecouple.runtimes import runtime
from netdecouple.runtimes.onnxruntime import open_session
from netdecouple.runtimes.timing import Ratio, Timing, measure

NETWORKS = ("resnet20", "vgg16_cifar10")
COLUMNS = ("network", "variant", "MACs", "file", "top-1", "same class", "ms", "times faster")


@dataclass(frozen=True)
class Row:
    network: str
    variant: str
    fewer: float  # times fewer MACs
    megabytes: float
    top1: float
    same: float  # class, as the original in float32, on the test images
    time: Timing
    faster: Ratio  # than the original in float32

    def cells(self) -> tuple[str, ...]:
        ratio = self.faster
        middle = "not measurable" if ratio.median is None else f"{ratio.median:.2f}×"
        return (
            self.network,
            self.variant,
            "" if self.fewer == 1 else f"{self.fewer:.2f}× fewer",
            f"{self.megabytes:.2f} MB",
            f"{100 * self.top1:.1f} %",
            f"{100 * self.same:.1f} %",
            f"{self.time.median:.3g}",
            "" if ratio.lower == ratio.upper else f"{middle} ({ratio.lower:.2f}–{ratio.upper:.2f})",
        )


class Images(CalibrationDataReader):
    """What ONNX Runtime wants to calibrate with: one dictionary after the other."""

    def __init__(self, name: str, images: NDArray[np.float32]) -> None:
        self._feeds = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def quantized(model: onnx.ModelProto, images: NDArray[np.float32]) -> onnx.ModelProto:
    """A copy of a network of standard operators in int8, as ONNX Runtime's documentation says to make it."""
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "done"))
        onnx.save(model, plain)
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(done),
            Images(model.graph.input[0].name, images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(done)


def rows(name: str, images: int, macs: str, seconds: float) -> Iterator[Row]:
    """Every variant of one network."""
    folder = shared()
    path, data = folder / "models" / f"{name}.onnx", folder / "data" / "cifar10.npz"
    calib = load(
        f"{data}:calib", channels=3, size=(32, 32), preprocessing=CIFAR10, samples=images, seed=0
    ).images
    result = netdecouple.decouple(path, calib, macs=macs, emit="fused")
    original, standard = onnx.load(path), lower(result.model)
    variants = {
        "original, float32": original,
        "decoupled, float32, fused operator": result.model,
        "decoupled, float32, standard operators": standard,
        "original, int8": quantized(original, calib),
        "decoupled, int8": quantized(standard, calib),
    }
    archive = np.load(data)
    test, labels = CIFAR10(archive["test"]), archive["test_labels"]
    feed = original.graph.input[0].name
    outputs = [
        np.concatenate([session.run(None, {feed: part})[0] for part in np.array_split(test, len(test) // 50)])
        for session in map(open_session, variants.values())
    ]
    place = runtime("onnxruntime")
    sessions = [place.open(model, 1) for model in variants.values()]
    times = measure([lambda s=s: s.run({feed: test[:1]}) for s in sessions], seconds)
    fewer = result.report.macs_before / result.report.macs
    for index, (variant, model) in enumerate(variants.items()):
        yield Row(
            name,
            variant,
            fewer if variant.startswith("decoupled") else 1.0,
            model.ByteSize() / 1e6,
            accuracy([outputs[index]], labels),
            agreement(outputs[0], outputs[index]),
            Timing.of(times[:, index]),
            Ratio.of(times[:, 0], times[:, index]),
        )


def processor() -> str:
    """What this machine is called."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown(found: list[Row], title: str) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ("---",) * len(COLUMNS))]
    return "\n".join([title, "", *lines, *(f"| {' | '.join(row.cells())} |" for row in found)]) + "\n"


def main(
    network: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(NETWORKS)}")] = None,
    images: Annotated[int, typer.Option(help="Calibration images, for both steps.")] = 500,
    macs: Annotated[str, typer.Option(help="MACs that may stay.")] = "50%",
    seconds: Annotated[float, typer.Option(help="For the turns of one network's variants.")] = 30.0,
    file: Annotated[Path | None, typer.Option("--markdown", help="Write the table here too.")] = None,
) -> None:
    """Print the table."""
    console = Console(width=150)
    found: list[Row] = []
    for name in network or NETWORKS:
        for row in rows(name, images, macs, seconds):
            found.append(row)
            console.log(" | ".join(row.cells()))
    title = (
        f"CIFAR-10, 1,000 test images, {images} calibration images, batch 1, one thread, ONNX Runtime "
        f"{onnxruntime.__version__}, {processor()}; *same class* and *times faster* are against the original "
        "in float32, the latter with its quartiles."
    )
    table = markdown(found, title)
    console.print(table, markup=False)
    if file is not None:
        file.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
