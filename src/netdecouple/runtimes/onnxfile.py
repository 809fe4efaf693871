"""Read ONNX files that may be damaged or hostile, within limits; write them; copy models in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import helper

from netdecouple.errors import ModelError, first_line
from netdecouple.execution import limits

TENSOR = onnx.TensorProto.DESCRIPTOR.full_name
PROTOBUF_LIMIT = 1_900_000_000  # bytes; protobuf itself refuses 2 GiB


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model, weights included."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def with_graph(
    model: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
    initializers: Iterable[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Make a model of these nodes, with the versions and the functions of another."""
    made = onnx.ModelProto(ir_version=model.ir_version)
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.graph.name = model.graph.name or "graph"
    made.graph.node.extend(nodes)
    made.graph.input.extend(inputs)
    made.graph.output.extend(outputs)
    made.graph.initializer.extend(initializers)
    return made


def size_of(model: onnx.ModelProto) -> int:
    """Count a model's bytes; beyond protobuf's limit, where it cannot, those of the weights."""
    constants = (a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))
    tensors = (*model.graph.initializer, *constants)
    inside = (t for t in tensors if t.data_location != onnx.TensorProto.EXTERNAL and t.data_type)
    weights = sum(map(_tensor_bytes, inside))
    return weights if weights >= PROTOBUF_LIMIT else int(model.ByteSize())


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def is_large(model: onnx.ModelProto) -> bool:
    """Whether a model is beyond protobuf's limit, and its weights need a file of their own."""
    return size_of(model) >= PROTOBUF_LIMIT


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model; the weights of a large one go to a file beside it, ``path`` with ``.data`` appended."""
    if is_large(model):
        copy = copy_of(model)  # saving moves the weights out of what is saved
        onnx.save_model(copy, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save_model(model, path)


def read(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a model with its external data; raise ModelError as `definition`, or if it cannot read them."""
    proto = definition(path)
    try:
        for tensor in filter(_is_external, _tensors(proto)):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            with (Path(path).parent / entries["location"]).open("rb") as file:
                file.seek(int(entries.get("offset") or 0))
                tensor.raw_data = file.read(int(entries.get("length") or _tensor_bytes(tensor)))
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
    except OSError as error:
        raise ModelError(f"{path}: cannot read its external data: {first_line(error)}") from error
    return proto


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return a model's file and those of its external data; raise ModelError as `definition`."""
    entries = (entry for tensor in _tensors(definition(path)) for entry in tensor.external_data)
    locations = [entry.value for entry in entries if entry.key == "location"]
    return [Path(path), *(Path(path).parent / location for location in dict.fromkeys(locations))]


def definition(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a model without its external data, but check that they exist.

    Raises:
        ModelError: there is no such file, it is no ONNX model, too large, or its weights are missing.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such file; give the path of an .onnx model")
    try:
        size = path.stat().st_size
        limits.MODEL_BYTES.check(size, f"{path}: the model", ModelError)
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: not an ONNX file, or cut short; export or copy it again") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot read it: {first_line(error)}") from error
    if not proto.graph.node:
        raise ModelError(f"{path}: not an ONNX file, or an empty graph; export or copy it again")
    check(proto, str(path), path.parent, size)
    return proto


def check(proto: onnx.ModelProto, origin: str, folder: Path | None = None, size: int = 0) -> None:
    """Refuse a model that no runtime should open, before its external data are loaded from their ``folder``.

    ``origin`` is its name, for messages; ``size`` the bytes of its file. A model in memory has neither a
    folder nor a size.

    Raises:
        ModelError: it has names that are no text, nodes without outputs, external data that are missing, too
            large or outside its folder, or a tensor that is too large.
    """
    if not all(map(_is_text, _messages(proto))):
        raise ModelError(
            f"{origin}: not an ONNX file, or damaged (names are no text); export or copy it again"
        )
    for tensor in filter(_is_external, _tensors(proto)):
        size += _external(tensor, origin, folder)
        limits.MODEL_BYTES.check(size, f"{origin}: the model with its external data", ModelError)
    for node in proto.graph.node:
        if not node.output:
            name = node.name or node.op_type
            raise ModelError(f"{origin}: node {name!r} has no output; export or copy the model again")
    check_sizes(proto, origin)


def check_sizes(
    proto: onnx.ModelProto, origin: str, image: str = "", sample: NDArray[Any] | None = None
) -> None:
    """Refuse, before it is run, a model with a tensor larger than `limits.TENSOR_BYTES`.

    Shapes are inferred, for images of the size of ``sample`` as the input ``image``.

    Raises:
        ModelError: a tensor is too large; the message names it and its layer.
    """
    copy = with_graph(proto, proto.graph.node, proto.graph.input, proto.graph.output)
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() < 1000:  # may be a shape
            copy.graph.initializer.add().CopyFrom(tensor)
        else:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for value in copy.graph.input:
        if value.name == image and sample is not None:
            for dim, size in zip(value.type.tensor_type.shape.dim, (1, *sample.shape[1:]), strict=False):
                dim.dim_value = dim.dim_value or size
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception:  # whatever is wrong, running the model gives a better message
        return
    producer = {name: node.name or node.op_type for node in proto.graph.node for name in node.output}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim if d.dim_value > 0]
        of = f" of layer {producer[value.name]!r}" if value.name in producer else ""
        limits.TENSOR_BYTES.check(4 * math.prod(dims), f"{origin}: tensor {value.name!r}{of}", ModelError)


def _external(tensor: onnx.TensorProto, origin: str, folder: Path | None) -> int:
    """Check that a tensor's external data are in the model's folder; return their bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    what = f"{origin}: external data of {tensor.name!r}"
    if folder is None:
        raise ModelError(f"{what} lie in {location!r:.80} and are not loaded; give the model as a file")
    place = Path(location)
    if not location or "\0" in location or place.is_absolute() or ".." in place.parts:
        raise ModelError(f"{what} are said to lie in {location!r:.80}, not beside the model; export it again")
    path = folder / place
    if not os.path.isfile(path):
        advice = f"give {os.path.realpath(origin)}" if os.path.islink(origin) else "copy it beside the model"
        raise ModelError(f"{what}: there is no {location!r:.80}; {advice}")
    if limits.leads_elsewhere(path, folder):
        raise ModelError(
            f"{what} are a link to another place, {location!r:.80}; put the file itself beside the model"
        )
    try:
        offset = int(entries.get("offset") or 0)
        wanted = _tensor_bytes(tensor)
        length = int(entries.get("length") or wanted)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{what} are described in no way known ({first_line(error)}); export it again"
        ) from error
    limits.MODEL_BYTES.check(max(length, wanted), what, ModelError)
    if min(offset, length, *tensor.dims) < 0 or offset + length > path.stat().st_size:
        raise ModelError(f"{what} go beyond the end of {location!r:.80}; copy both files again")
    return length


def _tensors(proto: onnx.ModelProto) -> Iterator[Any]:
    return (message for message in _messages(proto) if message.DESCRIPTOR.full_name == TENSOR)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _messages(message: Message) -> Iterator[Message]:
    """Yield a message and all messages in it; of a tensor, which may be large, only its external data."""
    yield message
    if message.DESCRIPTOR.full_name == TENSOR:
        yield from message.external_data
        return
    for inner in _values(message, FieldDescriptor.TYPE_MESSAGE):
        yield from _messages(inner)


def _is_text(message: Message) -> bool:
    """Whether a message's names are text: protobuf returns what is not UTF-8 as bytes."""
    if message.DESCRIPTOR.full_name == TENSOR:
        return isinstance(message.name, str)
    return all(isinstance(text, str) for text in _values(message, FieldDescriptor.TYPE_STRING))


def _values(message: Message, kind: int) -> Iterator[Any]:
    """Yield the values of all fields of a type, repeated ones one by one."""
    for field, value in message.ListFields():
        if field.type == kind:
            is_repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == 3
            yield from value if is_repeated else [value]
