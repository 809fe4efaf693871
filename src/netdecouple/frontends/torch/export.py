"""Write a PyTorch module as ONNX, and make sure that it still computes the same."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from netdecouple.errors import ModelError
from netdecouple.execution.scratch import Scratch
from netdecouple.frontends.torch.replacement import first_line
from netdecouple.frontends.torch.samples import to_numpy
from netdecouple.frontends.torch.trace import tensors
from netdecouple.runtimes.onnxruntime import open_session, run

TOLERANCE = 1e-4  # relative difference between what ONNX Runtime and PyTorch compute


def export(module: nn.Module, images: torch.Tensor, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Trace a module that takes one tensor, with a free batch size, and compare outputs in ONNX Runtime.

    Args:
        module: in evaluation mode.
        images: three samples; it is traced with two of them and tried with all.
        metadata: to be written into the model.

    Raises:
        ModelError: PyTorch cannot export it, or what it writes computes something else.
    """
    with torch.inference_mode():
        outputs = list(tensors(module(images)))
    inside = ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    axes = {
        name: {0: "batch"}
        for name, tensor in zip(["image", *inside], [images, *outputs], strict=True)
        if tensor.ndim and len(tensor) == len(images)
    }
    with Scratch() as folder:
        path = Path(folder) / "model.onnx"
        try:
            with _hushed(), torch.no_grad():
                # the exporter that traces: it needs no other package
                torch.onnx.export(
                    module, (images[:2],), str(path), dynamo=False,
                    input_names=["image"], output_names=inside, dynamic_axes=axes,
                )  # fmt: skip
            proto = onnx.load(path)
        except Exception as error:  # whatever the module's forward comes upon
            raise ModelError(
                f"PyTorch cannot export the {type(module).__name__} to ONNX "
                f"({type(error).__name__}: {first_line(error)}); write a folder: -o FOLDER"
            ) from error
    onnx.helper.set_model_props(proto, dict(metadata))
    session = open_session(proto)
    found = run(session, None, {"image": to_numpy(images)})
    for name, expected, array in zip(inside, outputs, found, strict=True):
        difference = _difference(to_numpy(expected), array)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the {type(module).__name__}'s {name} differs in ONNX Runtime by {difference:.1e} "
                "(relative): its forward depends on more than its inputs' shapes; write a folder: -o FOLDER"
            )
    return proto


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape:
        return np.inf
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / max(size, 1e-30)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporter talks, on every channel there is, of what is checked afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
