"""OpenVINO: open a model and run it in float32, one request at a time."""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from netdecouple.errors import ModelError, first_line
from netdecouple.runtimes.onnxruntime import onnx_source, uses_kernels
from netdecouple.runtimes.protocol import Feeds, Input, Session

_TELEMETRY = "openvino_telemetry"  # would send data to its authors; hidden while OpenVINO is imported
_was_imported = _TELEMETRY in sys.modules
sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]
try:
    import openvino
finally:
    if not _was_imported:
        del sys.modules[_TELEMETRY]


@cache
def _core() -> Any:
    """Return the one core of this process.

    Its CPU plugin gives the thread that loads it another stack for signals. Of two plugins the first one to
    go leaves a freed stack behind, on which the next Ctrl-C ends the process (OpenVINO 2026.4).
    """
    return openvino.Core()


class OpenVino:
    """OpenVINO on the CPU."""

    name = "openvino"
    version: str = openvino.__version__.partition("-")[0]

    def open(self, model: object, threads: int) -> Session:
        """Open an .onnx file or a ModelProto; raise ModelError if it is neither, or OpenVINO refuses it."""
        source = onnx_source(model, "OpenVINO")
        if uses_kernels(source):
            raise ModelError(
                "it holds netdecouple's own operators, which run in onnxruntime only; "
                "write standard ones with: netdecouple lower"
            )
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # on some processors the default is bfloat16
        }
        try:
            read = _core().read_model(_bytes(source) if isinstance(source, onnx.ModelProto) else source)
            compiled = _core().compile_model(read, "CPU", settings)
            request = compiled.create_infer_request()
            return Session(tuple(map(_input, compiled.inputs)), partial(_run, request))
        except RuntimeError as error:
            raise ModelError(f"OpenVINO cannot open the model: {_reason(error)}; try onnxruntime") from error


def _bytes(model: onnx.ModelProto) -> bytes:
    try:
        return bytes(model.SerializeToString())
    except ValueError as error:  # protobuf's own limit
        raise ModelError("it is too large to be opened from memory; save it, and open the file") from error


def _run(request: Any, feeds: Feeds) -> list[NDArray[Any]]:
    try:
        results = request.infer(feeds, share_inputs=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"the network failed on its input: {_reason(error)}") from error
    return [np.asarray(value) for value in results.values()]


def _input(port: Any) -> Input:
    shape = port.partial_shape
    sizes = () if shape.rank.is_dynamic else tuple(None if d.is_dynamic else d.get_length() for d in shape)
    return Input(port.get_any_name(), sizes, np.dtype(port.element_type.to_dtype()))


def _reason(error: Exception) -> str:
    """Return the line of a message that gives the reason; others name places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [t for t in lines if t and not t.startswith(("Exception from", "Check '")) and t[-1] != ":"]
    return reasons[0].rstrip(".") if reasons else first_line(error)
