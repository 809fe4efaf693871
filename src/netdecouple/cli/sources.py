"""What a network is made from: an .onnx file, or the name of a PyTorch model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from netdecouple import doors
from netdecouple.cli import options
from netdecouple.errors import ModelError

STATES = (".pt", ".pth", ".safetensors")


def torch_model(console: Console, model: Path, weights: str | None, seed: int = 0) -> Any:
    """Build a PyTorch model, and say what its weights are."""
    opened = doors.named().build(str(model), weights, seed)
    console.print(f"Weights     {opened.weights}", **options.PLAIN)
    return opened


def check_onnx_only(model: Path, given: Mapping[str, object]) -> None:
    """Refuse what only PyTorch models take, and files that hold no more than weights.

    Raises:
        ModelError: see there.
    """
    if model.suffix in STATES:
        raise ModelError(
            f"{model}: holds weights and no network; name that as well: torchvision:NAME --weights {model}"
        )
    for option, value in given.items():
        if value is not None:
            raise ModelError(f"{option} is for PyTorch models, like torchvision:resnet18; {model} is a file")


def check_torch_only(model: Path, given: Mapping[str, object], command: str = "run") -> None:
    """Refuse what only ONNX models take.

    Raises:
        ModelError: see there.
    """
    for option, value in given.items():
        if value:
            raise ModelError(
                f"{option} is for .onnx models; export {model} first (torch.onnx.export), "
                f"then netdecouple {command} model.onnx {option} …"
            )
