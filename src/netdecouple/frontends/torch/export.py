"""Export a PyTorch module to ONNX, and check that it still computes the same."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from netdecouple.errors import ModelError, first_line
from netdecouple.execution.scratch import Scratch
from netdecouple.frontends.onnx.fused import fuse_separable
from netdecouple.frontends.torch.replacement import failures
from netdecouple.frontends.torch.samples import Samples, to_numpy
from netdecouple.frontends.torch.trace import tensors
from netdecouple.runtimes.onnxruntime import open_session, run

TOLERANCE = 1e-4  # relative difference between the outputs in ONNX Runtime and in PyTorch
TRIED = 3  # samples that an exported model is checked with
REMEDY = "save it as a folder instead of an .onnx file"


def export(
    module: nn.Module, images: torch.Tensor, metadata: Mapping[str, str], fused: bool = False
) -> onnx.ModelProto:
    """Trace a module that takes one tensor, with a free batch size, and compare outputs in ONNX Runtime.

    Args:
        module: in evaluation mode.
        images: three samples; it is traced with two of them and tried with all.
        metadata: to be written into the model.
        fused: whether separable pairs of convolutions are written as the fused operator.

    Raises:
        ModelError: PyTorch cannot export it, or the exported model computes something else.
    """
    with torch.inference_mode(), failures():
        outputs = list(tensors(module(images)))
    names = ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    axes = {
        name: {0: "batch"}
        for name, tensor in zip(["image", *names], [images, *outputs], strict=True)
        if tensor.ndim and len(tensor) == len(images)
    }
    with Scratch() as folder:
        path = Path(folder) / "model.onnx"
        try:
            with _silent(), torch.no_grad():
                # the exporter that traces: it needs no other package
                torch.onnx.export(
                    module, (images[:2],), str(path), dynamo=False,
                    input_names=["image"], output_names=names, dynamic_axes=axes,
                )  # fmt: skip
            proto = onnx.load(path)
        except Exception as error:  # of any type: the module's forward runs
            raise ModelError(
                f"PyTorch cannot export the {type(module).__name__} to ONNX "
                f"({type(error).__name__}: {first_line(error)}); {REMEDY}"
            ) from error
    if fused:
        proto = fuse_separable(proto)
    onnx.helper.set_model_props(proto, dict(metadata))
    session = open_session(proto)
    exported = run(session, None, {"image": to_numpy(images)})
    for name, expected, array in zip(names, outputs, exported, strict=True):
        difference = _difference(to_numpy(expected), array)
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the {type(module).__name__}'s {name} differs in ONNX Runtime by {difference:.1e} "
                f"(relative): its forward depends on more than its inputs' shapes; {REMEDY}"
            )
    return proto


def image_tensor(samples: Samples) -> torch.Tensor:
    """The first three samples as the one tensor (n, …) that an exported model takes.

    Raises:
        ModelError: the module takes something else.
    """
    few: Sequence[Any] = samples[:TRIED].units
    shapes = {tuple(a.shape) if isinstance(a, torch.Tensor) else None for args, _ in few for a in args}
    if any(kwargs or len(args) != 1 for args, kwargs in few) or len(shapes) != 1 or None in shapes:
        raise ModelError(f"only models that take one tensor are written as ONNX; {REMEDY}")
    return torch.cat([args[0] for args, _ in few])


def _difference(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        return np.inf
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(actual.astype(np.float64) - expected)) / max(size, 1e-30)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress the exporter's warnings, log and printed text: its result is checked."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
