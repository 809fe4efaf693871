"""netdecouple eval: accuracy of one network, and how another compares."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.terminal import Json, Terminal
from netdecouple.report.text import scores_table


def evaluate(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Labelled images, FILE.npz:IMAGES,LABELS.", show_default=False)],
    other: Annotated[
        Path | None, typer.Argument(help="A second network to compare.", show_default=False)
    ] = None,
    preset: options.Preset = None,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    as_json: Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy, and how often two networks agree.

    \b
    Example:
      netdecouple eval model.onnx --data test.npz:images,labels --preset imagenet
    """
    terminal = Terminal(as_json=as_json)
    scores = api.evaluate(
        [model] if other is None else [model, other],
        data,
        options.preprocessing(preset, input_size, mean, std),
    )
    terminal.console.print(scores_table(scores))
    terminal.give({"scores": [asdict(score) for score in scores]})
