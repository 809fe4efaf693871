"""Not only classifiers: a denoiser trained here, decoupled, and what it loses in dB. Prints a table.

Trains a DnCNN (Zhang et al. 2017: 17 layers of 3×3, 64 channels, grey images, the noise is predicted and
subtracted inside the network) on images that come inside scikit-image's wheel, for noise of standard
deviation 25/255, exports it to out/denoiser/dncnn.onnx, where the next run finds it again, and decouples
it with noisy patches of the training images. Clean images are only ever looked at to train and to print;
no test image is seen before that. Or a VDSR (Kim et al. 2016: 20 such layers without BatchNorm), for images
that were halved and enlarged again.

Needs PyTorch and scikit-image: pip install 'netdecouple[torch]' scikit-image

    python benchmarks/denoiser.py                       # everything: 20 minutes of training, then as long
    python benchmarks/denoiser.py --network vdsr --ratio 2
    python benchmarks/denoiser.py --retrain --steps 500
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import netdecouple
from netdecouple import Settings
from netdecouple.errors import BudgetError
from training import export, note_of

try:
    import torch
    from skimage import color, data, filters, img_as_float32, restoration, transform
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'netdecouple[torch]' scikit-image") from None

Image = NDArray[np.float32]  # (h, w) in 0 to 1, or many: (n, 1, h, w)

SIGMA = 25 / 255
TRAINING = (
    "brick",
    "chelsea",
    "clock",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "motorcycle_left",
    "motorcycle_right",
    "page",
    "rocket",
    "text",
)
TEST = ("camera", "astronaut", "coffee")
SCALES = (1.0, 0.75, 0.5)
PATCH, BATCH = 40, 16  # of training
CALIBRATION_PATCH, TEST_CROP = 64, 256
METHODS = {
    "paper: data-free, one T": Settings(data_free=True, uniform_rank=True),
    "data-aware ND, T per channel": Settings(families=("nd-dp",)),
    "data-aware, all families": Settings(),
}
FILTERS: dict[str, Callable[[Image], Image]] = {  # usual settings, not tuned
    "median": lambda image: filters.median(image, np.ones((3, 3))),
    "bilateral": lambda image: restoration.denoise_bilateral(image, sigma_color=0.3, sigma_spatial=1.5),
    "total variation": lambda image: restoration.denoise_tv_chambolle(image, weight=0.1),
    "non-local means": lambda image: restoration.denoise_nl_means(
        image, patch_size=5, patch_distance=8, h=0.7 * SIGMA, sigma=SIGMA
    ),
}


@dataclass(frozen=True)
class Row:
    method: str
    images: int
    asked: float
    reached: float
    before: float
    after: float
    held_back: float  # relative squared error of the new output
    seconds: float


def picture(name: str) -> Image:
    """A grey image (h, w) of scikit-image's wheel."""
    if name.startswith("motorcycle"):
        found = data.stereo_motorcycle()[name.endswith("right")]
    else:
        found = getattr(data, name)()
    return img_as_float32(color.rgb2gray(found) if found.ndim == 3 else found)


def pyramid(names: tuple[str, ...]) -> list[Image]:
    """The images at several scales: smaller ones are sharper and have less noise of their own."""
    return [
        transform.rescale(picture(name), scale, anti_aliasing=scale < 1).astype(np.float32)
        for name, scale in product(names, SCALES)
    ]


def patches(images: list[Image], count: int, size: int, rng: np.random.Generator) -> Image:
    """Random patches (count, 1, size, size), turned and mirrored."""
    found = np.empty((count, 1, size, size), np.float32)
    for row, index in enumerate(rng.integers(len(images), size=count)):
        top, left = (rng.integers(0, length - size + 1) for length in images[index].shape)
        patch = np.rot90(images[index][top : top + size, left : left + size], rng.integers(4))
        found[row, 0] = patch if rng.random() < 0.5 else patch.T
    return found


def noisy(images: Image, rng: np.random.Generator) -> Image:
    return images + SIGMA * rng.standard_normal(images.shape, np.float32)


def enlarged(images: Image, rng: np.random.Generator) -> Image:
    """Halve images and enlarge them again: details are missing. Nothing is random."""
    resize = partial(torch.nn.functional.interpolate, mode="bicubic", antialias=True)
    half = resize(torch.from_numpy(images), scale_factor=0.5)
    return np.ascontiguousarray(resize(half, scale_factor=2.0).numpy())


def crops(names: tuple[str, ...], size: int) -> Image:
    """As many crops (n, 1, size, size) as fit side by side."""
    found = [
        image[top : top + size, left : left + size]
        for image in map(picture, names)
        for top in range(0, image.shape[0] - size + 1, size)
        for left in range(0, image.shape[1] - size + 1, size)
    ]
    return np.stack(found)[:, None]


def psnr(clean: Image, restored: Image) -> float:
    """Mean over images (n, 1, h, w), in dB."""
    error = np.square(clean - np.clip(restored, 0, 1), dtype=np.float64).mean(axis=(1, 2, 3))
    return float(np.mean(-10 * np.log10(error)))


@dataclass(frozen=True)
class Task:
    """A network, and what it repairs."""

    title: str
    depth: int
    has_norms: bool
    damaged: Callable[[Image, np.random.Generator], Image]


TASKS = {
    "dncnn": Task("DnCNN, noise 25/255", 17, True, noisy),
    "vdsr": Task("VDSR, twice the size", 20, False, enlarged),
}


class Chain(torch.nn.Module):
    """Layers one after the other, whose output is subtracted from the input."""

    def __init__(self, depth: int, has_norms: bool, width: int = 64) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = [torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.ReLU()]
        for _ in range(depth - 2):
            layers.append(torch.nn.Conv2d(width, width, 3, padding=1, bias=not has_norms))
            if has_norms:
                layers.append(torch.nn.BatchNorm2d(width))
            layers.append(torch.nn.ReLU())
        if not has_norms:  # without them the usual start lets 20 layers say nothing
            for layer in layers[::2]:
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.noise = torch.nn.Sequential(*layers, torch.nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image - self.noise(image)


def train(task: Task, steps: int, seed: int, bfloat16: bool, console: Console) -> Chain:
    """Adam from 1e-3 down to nothing (cosine, after a short rise); the same seed gives the same network."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = pyramid(TRAINING)
    network = Chain(task.depth, task.has_norms).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters())
    start, mean = time.perf_counter(), math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        clean = patches(images, BATCH, PATCH, rng)
        target = torch.from_numpy(clean)
        image = torch.from_numpy(task.damaged(clean, rng))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            predicted = network.noise(image)
        loss = torch.nn.functional.mse_loss(image - predicted.float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            console.log(f"step {step + 1} of {steps}, {seconds:.0f} s: {-10 * math.log10(mean):.2f} dB")
    return network.eval()


def restore(model: str | bytes, images: Image) -> Image:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"noisy": image[None]})[0] for image in images])


def rows(
    path: Path,
    task: Task,
    clean: Image,
    test: Image,
    images: int,
    ratios: list[float],
    methods: list[str],
    seed: int,
) -> Iterator[Row]:
    """Decouple at every ratio, each time from the beginning."""
    rng = np.random.default_rng([seed, 1])
    calibration = task.damaged(patches(pyramid(TRAINING), images, CALIBRATION_PATCH, rng), rng)
    before = psnr(clean, restore(str(path), test))
    for method, ratio in product(methods, ratios):
        start = time.perf_counter()
        try:
            result = netdecouple.decouple(
                str(path), calib=calibration, macs=f"{ratio}x", settings=METHODS[method]
            )
        except BudgetError:
            continue
        seconds = time.perf_counter() - start
        after = psnr(clean, restore(result.model.SerializeToString(), test))
        agreement = result.report.agreement
        yield Row(
            method,
            0 if METHODS[method].data_free else images,
            ratio,
            result.plan.before.macs / result.plan.after.macs,
            before,
            after,
            agreement.divergence if agreement else math.nan,
            seconds,
        )


def main(
    network: Annotated[str, typer.Option(help=f"Among: {', '.join(TASKS)}")] = "dncnn",
    ratio: Annotated[list[float] | None, typer.Option(help="Times fewer MACs.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(METHODS)}")] = None,
    images: Annotated[int, typer.Option(help="Noisy patches to calibrate with.")] = 300,
    steps: Annotated[int, typer.Option(help="Batches to train with.")] = 2400,
    retrain: Annotated[bool, typer.Option(help="Train even if there is a network.")] = False,
    bfloat16: Annotated[
        bool, typer.Option(help="Train in mixed precision: twice as fast where the processor has it.")
    ] = True,
    threads: Annotated[int, typer.Option(help="Threads to train with.")] = 1,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the network is kept.")] = Path("out/denoiser"),
) -> None:
    """Print the table of dB against MACs."""
    console = Console()
    path, task = out / f"{network}.onnx", TASKS[network]
    if retrain or not path.exists():
        torch.set_num_threads(threads)
        start = time.perf_counter()
        trained = train(task, steps, seed, bfloat16, console)
        said = f"{steps} steps, {time.perf_counter() - start:.0f} s on {threads} thread(s)"
        example = torch.zeros(1, 1, CALIBRATION_PATCH, CALIBRATION_PATCH)
        export(trained, example, path, said, ("noisy", "restored"), {0: "n", 2: "h", 3: "w"})
    note = note_of(path)
    clean = crops(TEST, TEST_CROP)
    test = task.damaged(clean, np.random.default_rng([seed, 2]))
    console.print(f"{path}: trained {note}; {len(test)} test crops of {', '.join(TEST)}")
    sanity = Table(title="Mean PSNR on the test crops, dB")
    sanity.add_column("filter")
    sanity.add_column("PSNR", justify="right")
    sanity.add_row("none", f"{psnr(clean, test):.2f}")
    for name, restored in FILTERS.items() if task.damaged is noisy else ():
        sanity.add_row(name, f"{psnr(clean, np.stack([restored(crop[0])[None] for crop in test])):.2f}")
    sanity.add_row("this network", f"{psnr(clean, restore(str(path), test)):.2f}")
    console.print(sanity)

    table = Table(title=f"{task.title}, {len(test)} test crops of {TEST_CROP} × {TEST_CROP}")
    for column in (
        "method",
        "patches",
        "asked",
        "MACs",
        "dB before",
        "dB after",
        "dB lost",
        "relative error, held back",
        "seconds",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows(
        path, task, clean, test, images, ratio or [1.5, 2.0, 2.5, 3.0], method or list(METHODS), seed
    ):
        cells = (
            row.method,
            str(row.images or "–"),
            f"{row.asked:g}×",
            f"{row.reached:.2f}× fewer",
            f"{row.before:.2f}",
            f"{row.after:.2f}",
            f"{row.before - row.after:+.2f}",
            f"{row.held_back:.1e}",
            f"{row.seconds:.0f}",
        )
        table.add_row(*cells)
        console.log(" ".join(cells))  # long runs are watched
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
