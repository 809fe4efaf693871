"""Options that several commands share."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from netdecouple.calibration import Preprocessing
from netdecouple.errors import CalibrationError

PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
"""For printing what may hold the names of files, which are nobody's markup."""

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


def console() -> Console:
    """Standard output; where it is no terminal, lines are wide enough for every table."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=150)


class Bars:
    """Progress bars on standard error, one per step, with the time that remains; on terminals only."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, tuple[TaskID, int]] = {}  # step → task, last done

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int) -> None:
        task, last = self._tasks.get(step, (None, 0))
        if task is None:
            task = self._progress.add_task(step, total=total)
        elif done < last:  # the step starts over, for the next group of layers
            self._progress.reset(task, total=total)
        self._tasks[step] = (task, done)
        self._progress.update(task, completed=done, total=total)
