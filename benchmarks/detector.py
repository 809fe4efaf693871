"""A detector trained here, decoupled: which of its boxes are found again. Prints a table.

Trains a small detector of the YOLO kind (14 convolutions, three scales, no anchors) on rendered shapes over
textures for some minutes, exports it to out/detector/shapes.onnx, where the next run finds it again, with
decoded boxes as one output (N, cells, 5 + classes), and decouples it with pictures that it was not trained
on. "Right" counts its boxes against what was rendered, on other pictures.

Needs PyTorch: pip install 'netdecouple[torch]'

    python benchmarks/detector.py                       # some minutes of training, and one per row
    python benchmarks/detector.py --ratio 2 --images 64
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from rich.console import Console
from rich.table import Table

import netdecouple
from netdecouple import Settings
from netdecouple.planning.boxes import Boxes, found_again, layout_of
from netdecouple.runtimes.onnxruntime import open_session, run
from training import export, note_of

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'netdecouple[torch]'") from None

Array = NDArray[np.float32]

SIZE, CLASSES = 128, ("disk", "square", "triangle", "ring")
STRIDES = (8, 16, 32)
LIMITS = (32, 64)  # pixels: larger objects belong to the next stride
BATCH = 32
METHODS = {
    "ND": Settings(families=("nd",)),
    "all families": Settings(),
    "all families, all outputs alike": Settings(loss="relative"),
}


@dataclass(frozen=True)
class Row:
    method: str
    images: int
    ratio: float
    divergence: float
    predicted: float
    held_out: float | None  # share of boxes found again, of held-out calibration images
    found: float  # the same on other pictures
    extra: float  # boxes that the original does not have, as a share of its boxes
    right: tuple[float, float]  # F1 against what was rendered, before and after
    seconds: float


def texture(rng: np.random.Generator) -> Image.Image:
    """Coloured noise of a random coarseness."""
    cells = int(rng.integers(2, 40))
    noise = rng.integers(0, 256, (cells, cells, 3)) * rng.uniform(0.2, 0.9) + rng.integers(0, 80, 3)
    small = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def draw(picture: ImageDraw.ImageDraw, kind: int, box: Sequence[float], rng: np.random.Generator) -> None:
    """Render one object that fills a box."""
    x1, y1, x2, y2 = box
    colour = tuple(int(v) for v in rng.integers(0, 256, 3))
    if kind == 0:
        picture.ellipse(box, fill=colour)
    elif kind == 1:
        picture.rectangle(box, fill=colour)
    elif kind == 2:
        top = x1 + (x2 - x1) * rng.uniform(0.2, 0.8)
        picture.polygon([(top, y1), (x2, y2), (x1, y2)], fill=colour)
    else:
        picture.ellipse(box, outline=colour, width=max(int((x2 - x1) / 6), 2))


def scene(rng: np.random.Generator) -> tuple[Array, Boxes]:
    """A picture (3, SIZE, SIZE) in 0 to 1, and its one to four objects, which hardly overlap."""
    image, boxes = texture(rng), []
    picture = ImageDraw.Draw(image)
    kinds = []
    for _ in range(int(rng.integers(1, 5))):
        w = math.exp(rng.uniform(math.log(12), math.log(80)))
        h = float(np.clip(w * rng.uniform(0.7, 1.4), 12, 90))
        x, y = rng.uniform(0, SIZE - w), rng.uniform(0, SIZE - h)
        new = np.array([x, y, x + w, y + h])
        if any((np.minimum(new[2:], b[2:]) > np.maximum(new[:2], b[:2])).all() for b in boxes):
            continue
        kinds.append(int(rng.integers(len(CLASSES))))
        draw(picture, kinds[-1], new.tolist(), rng)
        boxes.append(new)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    noisy = pixels + rng.normal(0, rng.uniform(0, 0.08), pixels.shape)
    found = Boxes(np.array(boxes), np.ones(len(kinds)), np.array(kinds))
    return np.clip(noisy, 0, 1).astype(np.float32), found


def scenes(count: int, seed: int) -> tuple[Array, list[Boxes]]:
    rng = np.random.default_rng(seed)
    pictures, boxes = zip(*(scene(rng) for _ in range(count)), strict=True)
    return np.stack(pictures), list(boxes)


def unit(n_i: int, n_o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_i, n_o, 3, stride, 1, bias=False), nn.BatchNorm2d(n_o), nn.SiLU(inplace=True)
    )


class Detector(nn.Module):
    """A backbone, and at every stride a head that says for each cell: box, object or not, class."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 96, 128)
        self.stem = nn.Sequential(unit(3, 16, 2), unit(16, 32, 2), unit(32, 32))
        pairs = pairwise(widths[1:])
        self.stages = nn.ModuleList(nn.Sequential(unit(a, b, 2), unit(b, b)) for a, b in pairs)
        self.heads = nn.ModuleList(
            nn.Sequential(unit(width, 64), nn.Conv2d(64, 5 + len(CLASSES), 1)) for width in widths[2:]
        )
        centres, strides = [], []
        for stride in STRIDES:
            cells = torch.arange(SIZE // stride) * float(stride) + stride / 2
            y, x = torch.meshgrid(cells, cells, indexing="ij")
            centres.append(torch.stack([x.flatten(), y.flatten()], dim=1))
            strides.append(torch.full((len(cells) ** 2, 1), float(stride)))
        self.register_buffer("centres", torch.cat(centres))
        self.register_buffer("strides", torch.cat(strides))

    def raw(self, images: torch.Tensor) -> torch.Tensor:
        """Numbers (N, cells, 5 + classes) before any function."""
        x, found = self.stem(images), []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            found.append(head(x).flatten(2).transpose(1, 2))
        return torch.cat(found, dim=1)

    def boxes(self, raw: torch.Tensor) -> torch.Tensor:
        """Centre, width and height in pixels (N, cells, 4)."""
        centre = self.centres + raw[..., :2] * self.strides
        return torch.cat([centre, raw[..., 2:4].clamp(-4, 4).exp() * 2 * self.strides], dim=-1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raw = self.raw(images)
        return torch.cat([self.boxes(raw), raw[..., 4:].sigmoid()], dim=-1)


def targets(boxes: Sequence[Boxes], centres: Array, strides: Array) -> tuple[Array, NDArray[np.int64]]:
    """For every cell the box it should return (N, cells, 4), and its class or −1 (N, cells)."""
    wanted = np.zeros((len(boxes), len(centres), 4), np.float32)
    kinds = np.full((len(boxes), len(centres)), -1)
    for i, found in enumerate(boxes):
        for (x1, y1, x2, y2), kind in zip(found.corners, found.classes, strict=True):
            centre, size = np.array([x1 + x2, y1 + y2]) / 2, np.array([x2 - x1, y2 - y1])
            stride = STRIDES[int(np.searchsorted(LIMITS, size.max()))]
            near = (np.abs(centres - centre) <= 0.75 * strides).all(axis=1) & (strides[:, 0] == stride)
            wanted[i, near], kinds[i, near] = np.concatenate([centre, size]), kind
    return wanted, kinds


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (k, 4) as centre and size."""
    low = torch.maximum(a[:, :2] - a[:, 2:] / 2, b[:, :2] - b[:, 2:] / 2)
    high = torch.minimum(a[:, :2] + a[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2)
    both = (high - low).clamp_min(0).prod(dim=1)
    return both / (a[:, 2:].prod(dim=1) + b[:, 2:].prod(dim=1) - both)


def train(steps: int, seed: int, console: Console) -> Detector:
    torch.manual_seed(seed)
    network = Detector()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    centres, strides = network.centres.numpy(), network.strides.numpy()
    start, mean = time.perf_counter(), math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 100, (1 + math.cos(math.pi * step / steps)) / 2)
        pictures, boxes = scenes(BATCH, 1000 + seed * steps + step)
        wanted, kinds = (torch.from_numpy(part) for part in targets(boxes, centres, strides))
        raw = network.raw(torch.from_numpy(pictures))
        is_object = kinds >= 0
        iou = overlap(network.boxes(raw)[is_object], wanted[is_object])
        onehot = functional.one_hot(kinds[is_object], len(CLASSES)).float()
        loss = (
            2 * (1 - iou).mean()
            + 3 * functional.binary_cross_entropy_with_logits(raw[..., 4], is_object.float()) * 10
            + functional.binary_cross_entropy_with_logits(raw[..., 5:][is_object], onehot)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            console.log(f"step {step + 1} of {steps}, {time.perf_counter() - start:.0f} s: {mean:.3f}")
    return network.eval()


def detect(model: onnx.ModelProto, pictures: Array) -> list[Boxes]:
    outputs = run(open_session(model), ["boxes"], {"images": pictures})
    layout = layout_of(outputs, len(pictures))
    if layout is None:
        raise SystemExit("the outputs are not recognised as boxes")
    return layout.detections(outputs)


def f1(right: Sequence[Boxes], found: Sequence[Boxes]) -> float:
    """The harmonic mean of precision and recall."""
    hits, wanted, given = found_again(right, found)
    return 2 * hits / max(wanted + given, 1)


def rows(
    path: Path, images: int, ratios: Sequence[float], methods: Sequence[str], seed: int
) -> Iterator[Row]:
    calibration, _ = scenes(images, 900_000_000 + seed)
    pictures, right = scenes(500, 910_000_000 + seed)
    original = detect(onnx.load(path), pictures)
    for method in methods:
        for ratio in ratios:
            start = time.perf_counter()
            result = netdecouple.decouple(str(path), calibration, macs=f"{ratio}x", settings=METHODS[method])
            seconds = time.perf_counter() - start
            found, agreement = detect(result.model, pictures), result.report.agreement
            hits, wanted, given = found_again(original, found)
            yield Row(
                method=method,
                images=images,
                ratio=result.plan.before.macs / result.plan.after.macs,
                divergence=agreement.divergence,
                predicted=agreement.predicted,
                held_out=agreement.boxes_found,
                found=hits / wanted,
                extra=(given - hits) / wanted,
                right=(f1(right, original), f1(right, found)),
                seconds=seconds,
            )


def main(
    ratio: Annotated[list[float] | None, typer.Option(help="Times fewer MACs.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(METHODS)}")] = None,
    images: Annotated[int, typer.Option(help="Pictures to calibrate with.")] = 128,
    steps: Annotated[int, typer.Option(help="Batches to train with.")] = 1500,
    retrain: Annotated[bool, typer.Option(help="Train even if there is a network.")] = False,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the network is kept.")] = Path("out/detector"),
) -> None:
    """Print the table of boxes found again against MACs."""
    console = Console()
    path = out / "shapes.onnx"
    if retrain or not path.exists():
        start = time.perf_counter()
        network = train(steps, seed, console)
        said = f"{steps} steps, {time.perf_counter() - start:.0f} s"
        export(network, torch.zeros(1, 3, SIZE, SIZE), path, said, ("images", "boxes"), {0: "n"})
    note = note_of(path)
    table = Table(title=f"Detector of {len(CLASSES)} shapes (trained {note}), 500 other pictures")
    for column in ("method", "MACs", "found again", "not the original's", "held out", "F1", "error", "s"):
        table.add_column(column)
    for row in rows(path, images, ratio or [1.5, 2.0, 3.0], method or list(METHODS), seed):
        table.add_row(
            row.method,
            f"{row.ratio:.2f}× fewer",
            f"{row.found:.1%}",
            f"{row.extra:.1%}",
            "–" if row.held_out is None else f"{row.held_out:.1%}",
            f"{row.right[0]:.1%} → {row.right[1]:.1%}",
            f"{row.divergence:.2g} (predicted {row.predicted:.2g})",
            f"{row.seconds:.0f}",
        )
        console.log(row)  # long runs are watched
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
