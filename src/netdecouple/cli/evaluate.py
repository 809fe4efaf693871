"""netdecouple eval: accuracy of one network, and how another compares."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from netdecouple import api
from netdecouple.cli import options
from netdecouple.cli.results import check_model
from netdecouple.cli.terminal import Json, Output, Terminal
from netdecouple.report.text import scores_table


@options.expanded
def evaluate(
    model: options.Model,
    data: Annotated[str, options.option(help="Labelled images, FILE.npz:IMAGES,LABELS.")],
    other: Annotated[
        Path | None, typer.Argument(help="A second network to compare.", show_default=False)
    ] = None,
    pictures: options.Pictures = options.Pictures(),
    weights: options.Weights = None,
    as_json: Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy, and how often two networks agree.

    \b
    Example:
      netdecouple eval model.onnx --data test.npz:images,labels --preset imagenet
    """
    terminal = Terminal(Output(as_json=as_json))
    paths = [model] if other is None else [model, other]
    for path in paths:
        check_model(path)
    sources = [options.open_model(path, weights if api.is_named(path) else None) for path in paths]
    scores = api.evaluate(sources, data, pictures.preprocessing(sources[0].preprocessing))
    terminal.console.print(scores_table(scores))
    terminal.give({"scores": [asdict(score) for score in scores]})
