"""ONNX Runtime: open a model, run it in batches, time two models fairly."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from netdecouple.errors import ModelError

PROTOBUF_LIMIT = 1_900_000_000  # bytes; protobuf itself refuses 2 GiB


def options(threads: int | None = None) -> ort.SessionOptions:
    """Session options: quiet, CPU, ``threads`` intra-op threads (default: all this process may use)."""
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 4
    chosen.inter_op_num_threads = 1
    chosen.intra_op_num_threads = threads or _cores()
    if threads is None:  # between runs NumPy works; threads that spin while they wait would slow it down
        chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def _cores() -> int:
    """Processors this process may use; where the system does not tell, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    model: onnx.ModelProto | str | os.PathLike[str], chosen: ort.SessionOptions | None = None
) -> Any:
    """Open ``model`` for running on the CPU.

    Raises:
        ModelError: ONNX Runtime refuses it.
    """
    chosen = chosen or options()
    try:
        if not isinstance(model, onnx.ModelProto):
            return ort.InferenceSession(os.fspath(model), chosen, providers=["CPUExecutionProvider"])
        if model.ByteSize() < PROTOBUF_LIMIT:
            return ort.InferenceSession(model.SerializeToString(), chosen, providers=["CPUExecutionProvider"])
        with tempfile.TemporaryDirectory(prefix="netdecouple-") as folder:
            path = Path(folder) / "model.onnx"
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            onnx.save_model(copy, path, save_as_external_data=True, location="model.data")
            return ort.InferenceSession(str(path), chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        raise ModelError(f"ONNX Runtime cannot open the model: {first_line(error)}") from error


def run(session: Any, names: Sequence[str] | None, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Run once.

    Raises:
        ModelError: the inputs do not fit the network, or it fails on them.
    """
    try:
        return list(session.run(names, feeds))
    except Exception as error:
        raise ModelError(f"the network failed on its input: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; ONNX Runtime's run over several."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: quartiles over interleaved rounds."""

    lower: float
    median: float
    upper: float


def time_models(
    models: Sequence[onnx.ModelProto | str | os.PathLike[str]],
    feeds: dict[str, NDArray[Any]],
    *,
    threads: int = 1,
    seconds: float = 4.0,
) -> list[Timing]:
    """Time several models on the same input: in turn, round by round, so that drift hits all alike."""
    sessions = [open_session(m, options(threads)) for m in models]
    rounds: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        for _ in range(3):
            run(session, None, feeds)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds[0]) < 5:
        for session, times in zip(sessions, rounds, strict=True):
            start = time.perf_counter()
            run(session, None, feeds)
            times.append(1e3 * (time.perf_counter() - start))
    return [Timing(*(float(q) for q in np.percentile(times, (25, 50, 75)))) for times in rounds]
