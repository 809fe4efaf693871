"""A model whose weights are in a file, so that models made of it run without copies of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch
from netdecouple.runtimes.onnxfile import with_graph
from netdecouple.runtimes.onnxruntime import open_session

SMALL = 1 << 12  # bytes: smaller weights stay in the model
PAGE = 1 << 12  # bytes: weights begin at multiples of it, so that they can be mapped into memory
WEIGHTS = "weights"


class ExternalWeights:
    """A copy of a model with its large weights in a file, which ONNX Runtime maps into memory.

    Args:
        model: is not changed.
        beside: folder for the file; None: the system's temporary folder.

    Raises:
        OutputError: there is no room for the weights.
    """

    def __init__(self, model: onnx.ModelProto, beside: Path | None) -> None:
        graph = model.graph
        self.proto = with_graph(model, graph.node, graph.input, graph.output)
        try:
            self._folder = Scratch(beside)
            with (Path(self._folder.name) / WEIGHTS).open("wb") as file:
                for tensor in graph.initializer:
                    if len(tensor.raw_data) < SMALL:
                        self.proto.graph.initializer.add().CopyFrom(tensor)
                        continue
                    file.write(bytes(-file.tell() % PAGE))
                    self.proto.graph.initializer.append(_reference(tensor, file.tell()))
                    file.write(numpy_helper.to_array(tensor).tobytes())
        except OSError as error:
            raise OutputError(
                f"{beside or 'the temporary folder'}: no room for the model's weights "
                f"({error.strerror or error}); make room, or name another folder with TMPDIR or work="
            ) from error

    def opened(self, proto: onnx.ModelProto) -> Any:
        """Open a model that was made of ``proto``.

        Raises:
            ModelError: ONNX Runtime refuses it.
        """
        path = Path(self._folder.name) / "model.onnx"
        onnx.save_model(proto, path)
        return open_session(path)


def _reference(tensor: onnx.TensorProto, offset: int) -> onnx.TensorProto:
    """Describe a tensor whose values are in the file of weights."""
    reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    reference.data_location = TensorProto.EXTERNAL
    for key, value in {"location": WEIGHTS, "offset": offset, "length": len(tensor.raw_data)}.items():
        reference.external_data.add(key=key, value=str(value))
    return reference
