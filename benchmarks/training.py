"""What the benchmarks that train their own networks share: export, and the note of how it was trained."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch


def export(
    network: torch.nn.Module,
    example: torch.Tensor,
    path: Path,
    note: str,
    names: tuple[str, str],
    free: dict[int, str],
) -> None:
    """Write a network with the names of its input and output and its free axes, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    warnings.filterwarnings("ignore", "You are using the legacy TorchScript", DeprecationWarning)
    torch.onnx.export(
        network,
        (example,),
        str(unfinished),
        input_names=names[:1],
        output_names=names[1:],
        dynamic_axes=dict.fromkeys(names, free),
        opset_version=17,
        dynamo=False,
    )
    model = onnx.load(unfinished)
    onnx.helper.set_model_props(model, {"training": note})
    onnx.save(model, unfinished)
    unfinished.replace(path)


def note_of(path: Path) -> str:
    """How an exported network was trained."""
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}.get("training", "unknown")
