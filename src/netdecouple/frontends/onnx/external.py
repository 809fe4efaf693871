"""A model whose weights lie in a file, so that models made of it can be run without copies of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch
from netdecouple.runtimes.onnxruntime import open_session

SMALL = 1 << 12  # bytes: weights below stay in the model
PAGE = 1 << 12  # bytes: where weights begin, so that they can be mapped
WEIGHTS = "weights"


class Lean:
    """A model without its large weights. ONNX Runtime maps them, and the system takes that memory back.

    Args:
        model: is not changed.
        beside: where to put the file; None: where temporary files go.

    Raises:
        OutputError: there is no room for the weights.
    """

    def __init__(self, model: onnx.ModelProto, beside: Path | None) -> None:
        self.proto = onnx.ModelProto(ir_version=model.ir_version)
        self.proto.opset_import.extend(model.opset_import)
        self.proto.functions.extend(model.functions)
        graph = self.proto.graph
        graph.name = model.graph.name
        graph.node.extend(model.graph.node)
        graph.input.extend(model.graph.input)
        graph.output.extend(model.graph.output)
        try:
            self._folder = Scratch(beside)
            with (Path(self._folder.name) / WEIGHTS).open("wb") as file:
                for tensor in model.graph.initializer:
                    if len(tensor.raw_data) < SMALL:
                        graph.initializer.add().CopyFrom(tensor)
                        continue
                    file.write(bytes(-file.tell() % PAGE))
                    graph.initializer.append(_outside(tensor, file.tell()))
                    file.write(numpy_helper.to_array(tensor).tobytes())
        except OSError as error:
            raise OutputError(
                f"{beside or 'the temporary folder'}: no room for the model's weights "
                f"({error.strerror or error}); make room, or let TMPDIR or --work name another place"
            ) from error

    def opened(self, proto: onnx.ModelProto) -> Any:
        """Open a model that was made of this one.

        Raises:
            ModelError: ONNX Runtime refuses it.
        """
        path = Path(self._folder.name) / "model.onnx"
        onnx.save_model(proto, path)
        return open_session(path)


def _outside(tensor: onnx.TensorProto, offset: int) -> onnx.TensorProto:
    """The tensor, to be read from the file."""
    found = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    found.data_location = TensorProto.EXTERNAL
    about = {"location": WEIGHTS, "offset": offset, "length": len(tensor.raw_data)}
    for key, value in about.items():
        found.external_data.add(key=key, value=str(value))
    return found
