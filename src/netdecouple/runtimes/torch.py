"""PyTorch, eager or compiled: open a module or an exported program and run it."""

from __future__ import annotations

import copy
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from netdecouple.errors import ModelError, first_line
from netdecouple.runtimes.protocol import Feeds, Input, Session


class Torch:
    """PyTorch on the CPU; ``trust`` allows it to open files, which can run any code of their authors."""

    def __init__(self, *, compiled: bool = False, trust: bool = False) -> None:
        self.name = "torch.compile" if compiled else "torch"
        self.version: str = torch.__version__.partition("+")[0]
        self._compiled = compiled
        self._trust = trust

    def open(self, model: object, threads: int) -> Session:
        """Open a module, an exported program or, if files are trusted, a .pt2 file; else raise ModelError."""
        if isinstance(model, str | os.PathLike):
            model = self._load(Path(model))
        if isinstance(model, torch.export.ExportedProgram):
            inputs, call = _inputs(model), model.module()
        elif isinstance(model, torch.nn.Module):
            inputs, call = (), copy.deepcopy(model).eval()
        else:
            raise ModelError(f"PyTorch runs modules and exported programs, and not a {type(model).__name__}")
        return Session(inputs, partial(_run, torch.compile(call) if self._compiled else call, threads))

    def _load(self, path: Path) -> Any:
        if path.suffix != ".pt2":
            raise ModelError(
                "PyTorch runs modules and exported programs (.pt2), not ONNX files; "
                "run it with runtime='onnxruntime' or 'openvino'"
            )
        if not os.path.isfile(path):
            raise ModelError("no such file; give the path of an exported program (.pt2)")
        if not self._trust:
            raise ModelError(
                "PyTorch unpickles .pt2 files, which can run any code; if you trust its author, give trust="
            )
        if not zipfile.is_zipfile(path):  # PyTorch would print a stack trace of its own
            raise ModelError("not an exported program, or cut short; export or copy it again")
        import_module("netdecouple.kernels.torch")  # registers our operator, which the program may hold
        try:
            return torch.export.load(path)
        except Exception as error:  # unpickling raises anything
            raise ModelError(f"PyTorch cannot open the file: {first_line(error)}") from error


def _run(call: Callable[..., Any], threads: int, feeds: Feeds) -> list[NDArray[Any]]:
    """Run a module once. Inputs are given in their order; PyTorch knows no names."""
    before = torch.get_num_threads()  # a setting of the process, not of the session
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            outputs = call(*(torch.from_numpy(array) for array in feeds.values()))
        return [tensor.numpy() for tensor in _tensors(outputs)]
    except Exception as error:  # modules raise anything
        raise ModelError(f"the network failed on its input: {first_line(error)}") from error
    finally:
        torch.set_num_threads(before)


def _tensors(outputs: Any) -> Iterator[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, Mapping | list | tuple):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(value)


def _inputs(program: torch.export.ExportedProgram) -> tuple[Input, ...]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    return tuple(_input(name, values[name]) for name in names)


def _input(name: str, value: torch.Tensor) -> Input:
    try:
        empty: NDArray[Any] = torch.empty(0, dtype=value.dtype).numpy()
    except TypeError as error:
        raise ModelError(f"an input is {value.dtype}, which NumPy does not know") from error
    return Input(name, tuple(size if isinstance(size, int) else None for size in value.shape), empty.dtype)
