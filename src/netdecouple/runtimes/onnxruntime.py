"""ONNX Runtime: open a model, run it, look into it with its profiler."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from netdecouple import kernels
from netdecouple.errors import ModelError, first_line
from netdecouple.execution.scratch import Scratch
from netdecouple.execution.threads import available
from netdecouple.runtimes import onnxfile
from netdecouple.runtimes.protocol import Feeds, Input, Session

OVERLOADS = (1, 27)  # the first version that tells functions of one name apart


def options(threads: int | None = None) -> ort.SessionOptions:
    """Make session options: no messages, ``threads`` intra-op threads (default: all this process may use).

    With ``threads`` given, the session is to be timed: its threads spin while it runs, as they do by default,
    but not afterwards, when another session runs.
    """
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 4
    chosen.inter_op_num_threads = 1
    chosen.intra_op_num_threads = threads or available()
    if threads is None:  # between runs NumPy works; threads that spin while they wait would slow it down
        chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        chosen.add_session_config_entry("session.force_spinning_stop", "1")
    return chosen


def open_session(
    model: onnx.ModelProto | str | os.PathLike[str],
    chosen: ort.SessionOptions | None = None,
    custom_ops: Sequence[str] = (),
) -> Any:
    """Open ``model`` for running on the CPU, with libraries of operators that it uses.

    Raises:
        ModelError: ONNX Runtime refuses it, or a library.
        NetDecoupleError: it uses netdecouple's own operators, which are not available, and has no functions
            that define them.
    """
    chosen = chosen or options()
    _register_kernels(model, chosen)
    for library in custom_ops:
        try:
            chosen.register_custom_ops_library(library)
        except Exception as error:
            problem = first_line(error) if os.path.isfile(library) else "no such file"
            raise ModelError(f"custom_ops={library}: cannot be loaded ({problem})") from error
    start = partial(ort.InferenceSession, sess_options=chosen, providers=["CPUExecutionProvider"])
    try:
        if not isinstance(model, onnx.ModelProto):
            return start(os.fspath(model))
        if not onnxfile.is_large(model):
            return start(model.SerializeToString())
        with Scratch() as folder:
            path = Path(folder) / "model.onnx"
            onnxfile.save(model, path)
            return start(str(path))
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        is_unknown = "is not a registered function/op" in str(error)
        advice = "; give the library that has it with custom_ops=" if is_unknown else ""
        raise ModelError(f"ONNX Runtime cannot open the model: {first_line(error)}{advice}") from error


def _register_kernels(model: onnx.ModelProto | str | os.PathLike[str], chosen: ort.SessionOptions) -> None:
    """Register our operators if the model uses them, unless they are not available and it has functions."""
    proto = _definition(model)
    if not uses_kernels(proto):
        return
    version = tuple(int(number) for number in ort.__version__.split(".")[:2])
    if version < OVERLOADS or not _has_fallbacks(proto) or kernels.usable():
        kernels.register(chosen)


def _has_fallbacks(proto: onnx.ModelProto) -> bool:
    """Whether a model has a function for every operator of ours."""
    functions = {(f.name, f.overload) for f in proto.functions if f.domain == kernels.DOMAIN}
    nodes = (node for node in proto.graph.node if node.domain == kernels.DOMAIN)
    return all((node.op_type, node.overload) in functions for node in nodes)


def uses_kernels(model: onnx.ModelProto | str | os.PathLike[str]) -> bool:
    """Whether a model has operators of ours, which run in ONNX Runtime only."""
    return any(node.domain == kernels.DOMAIN for node in _definition(model).graph.node)


def _definition(model: onnx.ModelProto | str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a file without external data; an empty model if it is a file for another runtime."""
    if isinstance(model, onnx.ModelProto):
        return model
    is_others = Path(model).suffix != ".onnx" and os.path.exists(model)
    return onnx.ModelProto() if is_others else onnxfile.definition(model)


def onnx_source(model: object, runtime: str) -> onnx.ModelProto | str:
    """Return a ModelProto or a path; raise ModelError for anything else, and for damaged files."""
    if isinstance(model, onnx.ModelProto):
        return model
    if not isinstance(model, str | os.PathLike):
        raise ModelError(f"{runtime} runs .onnx files and not a {type(model).__name__}; export it first")
    try:
        _definition(model)
    except ModelError as error:  # the caller names the model
        raise ModelError(str(error).removeprefix(f"{model}: ")) from error
    return os.fspath(model)


def run(session: Any, names: Sequence[str] | None, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Run once; raise ModelError if the inputs do not fit the network, or it fails on them."""
    try:
        return list(session.run(names, feeds))
    except Exception as error:
        raise ModelError(f"the network failed on its input: {first_line(error)}") from error


class OnnxRuntime:
    """ONNX Runtime on the CPU, with libraries of operators that networks use."""

    name = "onnxruntime"
    version: str = ort.__version__

    def __init__(self, custom_ops: Sequence[str] = ()) -> None:
        self._custom_ops = custom_ops

    def open(self, model: object, threads: int) -> Session:
        """Open a file or a ModelProto; raise ModelError if it is neither, or ONNX Runtime refuses it."""
        session = open_session(onnx_source(model, "ONNX Runtime"), options(threads), self._custom_ops)
        return Session(tuple(map(_input, session.get_inputs())), partial(run, session, None))


_TYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
}
_TYPES |= {f"tensor({n})": np.dtype(n) for n in ("float16", "uint8", "int8", "int32", "int64", "bool")}


def _input(value: Any) -> Input:
    if value.type not in _TYPES:
        raise ModelError(f"input {value.name!r} is a {value.type}; numbers are supported")
    shape = tuple(size if isinstance(size, int) and size > 0 else None for size in value.shape)
    return Input(value.name, shape, _TYPES[value.type])


class Profiled:
    """A model that runs with ONNX Runtime's profiler.

    The profile's file is named ``prefix`` and the time in milliseconds: two models need two prefixes.
    """

    def __init__(
        self, model: onnx.ModelProto, threads: int, prefix: Path, custom_ops: Sequence[str] = ()
    ) -> None:
        chosen = options(threads)
        chosen.enable_profiling = True
        chosen.profile_file_prefix = str(prefix)
        self._session = open_session(model, chosen, custom_ops)

    def run(self, feeds: Feeds) -> None:
        """Run once."""
        run(self._session, None, feeds)

    def finish(self) -> list[dict[tuple[str, str], float]]:
        """End profiling; return every run's milliseconds by a node's name and operator."""
        path = Path(self._session.end_profiling())
        return node_times(json.loads(path.read_text(encoding="utf-8")))


Call = tuple[
    list[tuple[int, ...]], list[tuple[int, ...]]
]  # shapes of inputs and outputs that are not left out


def calls_of(model: onnx.ModelProto, feeds: Feeds, custom_ops: Sequence[str] = ()) -> dict[str, list[Call]]:
    """Run a model once as it is written, and list every node's calls by its name, in subgraphs too.

    Raises ModelError as `open_session` and `run` do.
    """
    chosen = options()
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are not listed
    chosen.enable_profiling = True
    with Scratch() as folder:
        chosen.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(model, chosen, custom_ops)
        run(session, None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    calls: dict[str, list[Call]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            inputs, outputs = (
                [tuple(size) for tensor in event["args"][key] for size in tensor.values()]
                for key in ("input_type_shape", "output_type_shape")
            )
            calls.setdefault(event["name"].removesuffix("_kernel_time"), []).append((inputs, outputs))
    return calls


def node_times(events: Sequence[dict[str, Any]]) -> list[dict[tuple[str, str], float]]:
    """Sum a profile's events, run by run, by a node's name (as it is after optimisation) and operator."""
    runs: list[dict[tuple[str, str], float]] = []
    current: dict[tuple[str, str], float] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            node = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            current[node] = current.get(node, 0.0) + event["dur"] / 1000
        elif event["name"] == "model_run":  # is written after the nodes that ran in it
            runs.append(current)
            current = {}
    return runs
