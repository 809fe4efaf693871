"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from netdecouple.data.calibration import PRESETS, Preprocessing
from netdecouple.errors import CalibrationError
from netdecouple.families.base import groups
from netdecouple.families.chain import methods
from netdecouple.planning.divergence import Loss

EMITS = ("standard", "fused")
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
"""For printing what may hold the names of files, which are nobody's markup."""


def among(words: Sequence[str]) -> Callable[[str], list[str]]:
    """Complete one of some words for the shell."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def complete_families(incomplete: str) -> list[str]:
    """Complete the last of several families or methods with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    words = dict.fromkeys(("all", "paper", *groups(), *methods(["all"])))
    return [before + comma + word for word in words if word.startswith(last)]


Model = Annotated[Path, typer.Argument(help="The network, an .onnx file.", show_default=False)]
AnyModel = Annotated[
    Path,
    typer.Argument(
        help="The network: an .onnx file, torchvision:NAME, timm:NAME, or MODULE:FUNCTION that makes a "
        "PyTorch module.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Of a PyTorch model: default (what its library downloads), random, or FILE.safetensors, .pt, "
        ".pth.",
        show_default=False,
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        help="Unlabelled inputs: a folder of images, FILE.npy, FILE.npz:KEY, or MODULE:FUNCTION.",
        show_default=False,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Preprocessing of images: imagenet, cifar10, or none (scale to 0..1); default what the weights "
        "of a PyTorch model say, else none.",
        show_default=False,
        autocompletion=among(PRESETS),
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        help="Height and width: 224 or 480x640, where the model leaves it open.", show_default=False
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(help="Mean per channel, of values in 0..1: 0.485,0.456,0.406.", show_default=False),
]
Std = Annotated[
    str | None, typer.Option(help="Standard deviation per channel: 0.229,0.224,0.225.", show_default=False)
]
Labels = Annotated[str | None, typer.Option(help="Labelled images, FILE.npz:IMAGES,LABELS.")]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Layer to leave alone; a name or a glob. Repeatable.")
]
DataFree = Annotated[bool, typer.Option("--data-free", help="Fit from the weights alone, as the paper does.")]
UniformRank = Annotated[
    bool,
    typer.Option(
        "--uniform-rank", help="One rank per layer; with --data-free one for all, as the paper does."
    ),
]
HowCompared = Annotated[
    Loss | None,
    typer.Option(
        "--loss",
        help="How outputs are compared: kl (a classifier's scores) or relative (numbers). Default: kl for a "
        "single output (N, classes).",
        show_default=False,
    ),
]
Families = Annotated[
    str,
    typer.Option(
        help=f"What may be done to a layer: {', '.join(groups())} and all their combinations; paper; all; "
        "or methods in full, like nd-dp,sd+nd-dp.",
        autocompletion=complete_families,
    ),
]
Emit = Annotated[
    str,
    typer.Option(
        help="Operators to write: standard, or fused (faster; ONNX Runtime with netdecouple; .onnx only).",
        autocompletion=among(EMITS),
    ),
]
Samples = Annotated[int, typer.Option(min=10, help="Calibration images to take at most.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Work = Annotated[
    Path | None,
    typer.Option(
        "--work",
        help="Folder to keep what has been found in: a run that was ended, started again with it, goes on.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Memory to do with, like 4GB: layers are taken in smaller groups; those too wide for it are "
        "fitted from their weights alone.",
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Processes on this machine to share the work.", show_default=False),
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="Dask cluster to share the work: tcp://HOST:8786.", show_default=False),
]
Shards = Annotated[
    int | None,
    typer.Option(
        "--shards",
        min=1,
        help="Parts to cut the inputs into for workers; the same parts give the same result. Default 8.",
        show_default=False,
    ),
]
Output = Annotated[
    Path, typer.Option("-o", "--output", help="Where to write the new .onnx file.", show_default=False)
]
Outputs = Annotated[
    list[Path],
    typer.Option(
        "-o",
        "--output",
        help="Where to write the new network: an .onnx file; of a PyTorch model also a folder, or both.",
        show_default=False,
    ),
]
Reports = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        help="Write the report here: as a page (.html; both networks are timed for it) or as data (.json). "
        "Repeatable.",
        show_default=False,
    ),
]


def preprocessing(
    preset: str | None,
    input_size: str | None,
    mean: str | None,
    std: str | None,
    known: Preprocessing = Preprocessing(),
) -> Preprocessing:
    """Put the preprocessing options together; what they leave open is as ``known``."""
    chosen = known if preset is None else Preprocessing.preset(preset)
    if mean is not None:
        chosen = replace(chosen, mean=_floats(mean, "--mean"))
    if std is not None:
        chosen = replace(chosen, std=_floats(std, "--std"))
    if input_size is not None:
        try:
            numbers = [int(n) for n in input_size.lower().replace(",", "x").split("x")]
        except ValueError as error:
            raise CalibrationError(f"--input-size {input_size!r}: write 224 or 480x640") from error
        if len(numbers) > 2 or min(numbers) < 1:
            raise CalibrationError(f"--input-size {input_size!r}: write 224 or 480x640")
        chosen = chosen.resized_for((numbers[0], numbers[-1]))
    return chosen


def _floats(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(t) for t in text.replace(",", " ").split())
    except ValueError as error:
        raise CalibrationError(f"{option} {text!r}: write numbers separated by commas") from error
