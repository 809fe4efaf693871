"""Read an ONNX model, fold its BatchNorms, write the result."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper

from netdecouple.errors import ModelError, first_line
from netdecouple.execution.scratch import Scratch, check_onnx, check_writable, publishing, unwritable
from netdecouple.frontends.onnx.emission import PRODUCTS
from netdecouple.frontends.onnx.products import is_convolution
from netdecouple.frontends.onnx.proto import (
    attributes_of,
    drop_unread,
    drop_unread_nodes,
    nodes_of,
    reads,
    remove_named,
    replace_items,
)
from netdecouple.kernels import DOMAIN, OPERATOR
from netdecouple.network import INPUT_SHAPE, Array
from netdecouple.runtimes import onnxfile
from netdecouple.runtimes.feeds import describe_shape, fitted, parse_shape
from netdecouple.runtimes.layers import node_name
from netdecouple.runtimes.onnxfile import copy_of, is_large, save, size_of
from netdecouple.runtimes.onnxruntime import open_session, options, uses_kernels
from netdecouple.runtimes.protocol import Feeds, Input

ModelSource = str | os.PathLike[str] | onnx.ModelProto
TO_CHANNELS_FIRST, TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]  # axes of a Transpose
PICTURES, COLOURS = (1, 3, 4), 3  # channels that pictures have, and those that are likely
DTYPES = (np.float32, np.float16)  # of weights that can be decoupled
_FINITE = ("Conv", "ConvTranspose", OPERATOR, *PRODUCTS, "BatchNormalization")  # their weights must be


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """A model as it was read, with BatchNorm folded; nothing has been run yet."""

    proto: onnx.ModelProto  # folded
    fingerprint: str  # of the operators and weights as read
    origin: str  # file name, for messages
    input_name: str
    batch: int | None  # None if dynamic
    shape: tuple[int | None, ...]  # of one input, as declared; None where dynamic
    channels: int  # 0 if its inputs are no images
    size: tuple[int, int] | None  # h, w; None if dynamic
    channels_last: bool  # images are (n, h, w, c)
    bytes: int  # as read, external data included
    dtype: np.dtype[Any]  # of the input
    unread: tuple[str, ...]  # nodes that were left out, as no output needs them
    others: tuple[Input, ...] = ()  # inputs besides the images, which have one value for all of them
    given: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # their values; some have defaults
    custom_ops: tuple[str, ...] = ()  # libraries of operators

    @property
    def has_fixed_size(self) -> bool:
        """Whether all inputs have one size."""
        return self.size is not None if self.channels else None not in self.shape

    def session(self, proto: onnx.ModelProto | Path) -> Any:
        """Open this model, or one made of it, for running; ModelError if ONNX Runtime refuses it."""
        return open_session(proto, custom_ops=self.custom_ops)

    def with_constants(self, values: Mapping[str, Any]) -> OnnxModel:
        """Give other inputs than the images their values; ModelError if one does not fit."""
        known = {other.name: other for other in self.others}
        for name in values:
            if name not in known:
                there = f"there are {', '.join(known)}" if known else "there are none"
                raise ModelError(f"{self.origin}: it has no input {name!r} besides the images; {there}")
        given = {name: fitted(known[name], value) for name, value in values.items()}
        return replace(self, given={**self.given, **given})

    def feeds(self, images: Array) -> Feeds:
        """Return all inputs for some images; ModelError if the value of another one is not known."""
        defaults = {tensor.name for tensor in self.proto.graph.initializer} if self.others else set()
        for other in self.others:
            if other.name not in {*self.given, *defaults}:
                declared = f"{other.dtype} {describe_shape(other.shape)}".rstrip()
                raise ModelError(
                    f"{self.origin}: input {other.name!r} ({declared}) has no value; save one under its name "
                    "in the .npz with the images, or give constants="
                )
        return {self.input_name: images, **self.given}

    def channels_first(self, images: Array) -> Array:
        """View images as (n, c, h, w)."""
        return np.moveaxis(images, -1, 1) if self.channels_last else images


def read_model(source: ModelSource, custom_ops: Sequence[str] = ()) -> OnnxModel:
    """Read a model from a file or a ModelProto, which is left as it is.

    ``custom_ops`` are libraries of operators that it uses.

    Raises:
        ModelError: not an ONNX model, weights missing or not finite, no convolutions, or no floating-point
            input (N, …).
    """
    proto, origin = load(source)
    _check_weights(proto, origin)
    whole = _with_initializers(proto)
    unread = tuple(map(node_name, drop_unread_nodes(whole.graph)))
    folded = _fold(whole, custom_ops)
    if not any(map(is_convolution, nodes_of(folded.graph))):
        raise ModelError(f"{origin}: the model has no convolutions; there is nothing to decouple")
    inputs = [_declared(value) for value in folded.graph.input]
    image = _of_samples(inputs)
    if image is None:
        declared = ", ".join(f"{i.name!r} is {i.dtype} of {len(i.shape)} dimensions" for i in inputs)
        raise ModelError(
            f"{origin}: input {declared or 'is missing'}; float32 or float16 images (N, C, H, W) or "
            "(N, H, W, C), or other numbers (N, …), are supported: export the part that takes such numbers"
        )
    others, dims = tuple(i for i in inputs if i is not image), image.shape
    is_alone = any(other.shape[:1] == (None,) for other in others)  # it may count the images
    is_image = len(dims) == 4
    channels_last = is_image and _has_channels_last(folded.graph, image.name, dims)
    order = (3, 1, 2) if channels_last else (1, 2, 3)
    channels, height, width = (dims[i] for i in order) if is_image else (0, None, None)
    return OnnxModel(
        proto=folded,
        fingerprint=_fingerprint(proto),
        origin=origin,
        input_name=image.name,
        batch=dims[0] or (1 if is_alone else None),
        shape=dims[1:],
        channels=COLOURS if channels is None else channels,
        size=(height, width) if height and width else None,
        channels_last=channels_last,
        bytes=size_of(proto),
        dtype=image.dtype,
        unread=unread,
        others=others,
        custom_ops=tuple(custom_ops),
    )


def _of_samples(inputs: Sequence[Input]) -> Input | None:
    """Return the input of images, or else the first one of other floating-point samples (N, …)."""
    numbers = [i for i in inputs if len(i.shape) > 1 and i.dtype in DTYPES]
    return next((i for i in numbers if len(i.shape) == 4), numbers[0] if numbers else None)


def _declared(value: onnx.ValueInfoProto) -> Input:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
    is_known = kind.elem_type in helper.get_all_tensor_dtypes()  # files may hold any number
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type) if is_known else np.dtype(object)
    return Input(value.name, dims, dtype)


def _has_channels_last(graph: onnx.GraphProto, image: str, dims: Sequence[int | None]) -> bool:
    """Whether images are (n, h, w, c).

    A Transpose before the first convolution shows it; without one, the last axis does.
    """
    reached = {image}
    for node in graph.node:
        if reached.isdisjoint(reads(node)):
            continue
        axes = list(attributes_of(node).get("perm", ()))
        if axes in (TO_CHANNELS_FIRST, TO_CHANNELS_LAST):
            return axes == TO_CHANNELS_FIRST
        if node.op_type == "Conv":
            break
        reached.update(node.output)
    return dims[1] not in PICTURES and dims[3] in PICTURES


def load(source: ModelSource) -> tuple[onnx.ModelProto, str]:
    """Copy a model from a file or a ModelProto as it is; return its name, for messages, as well.

    Raises:
        ModelError: there is no such file, or it or its external data cannot be read.
    """
    if isinstance(source, onnx.ModelProto):
        copy = copy_of(source)
        onnxfile.check(copy, "the model")
        return copy, source.graph.name or "the model"
    return onnxfile.read(source), Path(source).name


def noted_shape(source: ModelSource) -> tuple[int, ...] | None:
    """Return the shape of the inputs that a model was decoupled with, if it leaves more than the batch open.

    None if that is not noted in it, as in other models, and if it cannot be read.
    """
    try:
        proto = source if isinstance(source, onnx.ModelProto) else onnxfile.read(source)
    except ModelError:
        return None
    noted = {entry.key: entry.value for entry in proto.metadata_props}.get(INPUT_SHAPE)
    images = _of_samples([_declared(value) for value in proto.graph.input])
    return parse_shape(noted) if noted and images and None in images.shape[1:] else None


def _arrays(proto: onnx.ModelProto) -> Iterable[tuple[str, NDArray[Any]]]:
    for tensor in proto.graph.initializer:
        yield tensor.name, numpy_helper.to_array(tensor)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.type == onnx.AttributeProto.TENSOR:
                yield node.output[0], numpy_helper.to_array(attribute.t)


def _check_weights(proto: onnx.ModelProto, origin: str) -> None:
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(f"{origin}: {name!r} is stored as a sparse tensor; export it with dense weights")
    used_by = {name: node for node in proto.graph.node for name in node.input}
    try:
        for name, array in _arrays(proto):
            if array.dtype.kind != "f":
                continue
            reader = used_by.get(name, onnx.NodeProto(name="?"))
            # constants of masks, shape arithmetic and padding may well be infinite; weights may not
            is_weight = reader.op_type in _FINITE
            good = np.isfinite(array) if is_weight else ~np.isnan(array)
            if array.size > 1 and not good.all():
                raise ModelError(
                    f"{origin}: NaN or Inf in {name!r}, a weight of layer {reader.name or reader.op_type!r}"
                )
    except (ValueError, TypeError, KeyError, OSError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{origin}: broken weights ({first_line(error)}); export it again") from error


def _fingerprint(proto: onnx.ModelProto) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(_arrays(proto), key=lambda pair: pair[0]):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    for node in proto.graph.node:
        digest.update(f"{node.op_type} {list(node.input)} {list(node.output)}".encode())
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
            digest.update(attribute.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _with_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every constant, under every name it has, as an initializer, and its nodes in an order
    in which they can be run. Only default values of inputs stay inputs: before IR 4, weights were."""
    copy = copy_of(proto)
    graph, outputs = copy.graph, {value.name for value in copy.graph.output}
    for node in nodes_of(graph):
        node.domain = "" if node.domain == "ai.onnx" else node.domain  # two names of one
    for entry in copy.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    defaults = _defaults(copy)
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in defaults}
    nodes: list[onnx.NodeProto] = []
    for node in _in_order(list(graph.node)):
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Identity":
            value = constants.get(node.input[0])
        if node.op_type in ("Constant", "Identity") and value is not None and node.output[0] not in outputs:
            constants[node.output[0]] = tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    replace_items(graph.node, nodes)
    for tensor in graph.initializer:
        tensor.ClearField("data_location")  # external data have been loaded
    remove_named(graph.input, constants)
    copy.ir_version = max(copy.ir_version, 4)
    return copy


def _defaults(proto: onnx.ModelProto) -> set[str]:
    """Return the initializers that are default values of inputs; none where weights are inputs, too."""
    names = {value.name for value in proto.graph.input} & {t.name for t in proto.graph.initializer}
    weights = {t for node in nodes_of(proto.graph) if node.op_type in _FINITE for t in node.input[1:]}
    return set() if proto.ir_version < 4 or names & weights else names


def _in_order(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Put nodes behind those whose outputs they read: ONNX requires that, ONNX Runtime does not."""
    producers = {t: i for i, node in enumerate(nodes) for t in node.output}
    needs = {i: [producers[t] for t in reads(node) if t in producers] for i, node in enumerate(nodes)}
    if all(producer < i for i, producers_of in needs.items() for producer in producers_of):
        return nodes
    try:
        return [nodes[i] for i in TopologicalSorter(needs).static_order()]
    except CycleError:
        return nodes  # ONNX Runtime refuses the model, and says why


def _fold(proto: onnx.ModelProto, custom_ops: Sequence[str]) -> onnx.ModelProto:
    """Fold BatchNorm and constants with ONNX Runtime's offline optimizer at its basic level.

    The result keeps the model's inputs, outputs, opset and metadata. Where the optimizer would add operators
    of its own or change types, only BatchNorm is folded; where it would replace the fused operator by its
    function, the model is returned as it is.
    """
    chosen = options()
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with Scratch() as folder:
        path = Path(folder) / "folded.onnx"
        chosen.optimized_model_filepath = str(path)
        if is_large(proto):
            chosen.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "folded.data"
            )
        open_session(proto, chosen, custom_ops)
        folded = onnx.load(path)
    known = {entry.domain for entry in proto.opset_import} | {""}
    before, after = (
        {node.output[0] for node in nodes_of(p.graph) if node.op_type == "Cast"} for p in (proto, folded)
    )
    # a cast may take the name of an Identity behind it
    before |= {n.output[0] for n in nodes_of(proto.graph) if n.op_type == "Identity" and n.input[0] in before}
    if any(node.domain not in known for node in nodes_of(folded.graph)) or not after <= before:
        folded = _with_norms_folded(_inlined(proto))
    if uses_kernels(proto) and not uses_kernels(folded):  # inlined, as they are not available
        folded = proto
    used = {node.domain for node in nodes_of(folded.graph)} | {""}
    replace_items(folded.graph.input, proto.graph.input)
    replace_items(folded.graph.output, proto.graph.output)
    replace_items(folded.metadata_props, proto.metadata_props)
    replace_items(folded.opset_import, [entry for entry in folded.opset_import if entry.domain in used])
    replace_items(folded.graph.initializer, sorted(folded.graph.initializer, key=lambda tensor: tensor.name))
    # messages that were replaced take memory until the model that held them is freed
    return folded if is_large(folded) else copy_of(folded)


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Put the nodes of functions in the place of their calls, as the optimizer does; ours stay."""
    if all(function.domain == DOMAIN for function in proto.functions):
        return proto
    return _with_initializers(inliner.inline_selected_functions(proto, [(DOMAIN, OPERATOR)], exclude=True))


def _with_norms_folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every BatchNorm behind a convolution folded into its weights, of any type.

    ONNX Runtime's optimizer does so for float32; float16 it runs between casts only.
    """
    copy = copy_of(proto)
    graph = copy.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    convolutions = {node.output[0]: node for node in graph.node if node.op_type == "Conv"}
    readers = Counter(t for node in graph.node for t in reads(node)) + Counter(v.name for v in graph.output)
    for norm in list(graph.node):
        convolution = convolutions.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if convolution is None or readers[norm.input[0]] != 1 or len(norm.output) != 1:
            continue
        names = [*convolution.input[1:], *norm.input[1:]]
        if not all(name in constants for name in names):
            continue
        weight, *bias, scale, shift, mean, variance = (
            numpy_helper.to_array(constants[name]).astype(np.float64) for name in names
        )
        factor = scale / np.sqrt(variance + attributes_of(norm).get("epsilon", 1e-5))
        arrays = {
            "weight": weight * factor.reshape(-1, *[1] * (weight.ndim - 1)),
            "bias": shift + ((bias[0] if bias else 0.0) - mean) * factor,
        }
        dtype = helper.tensor_dtype_to_np_dtype(constants[names[0]].data_type)
        with np.errstate(over="ignore"):
            folded = {
                f"{norm.output[0]}/folded.{part}": array.astype(dtype) for part, array in arrays.items()
            }
        if not all(np.isfinite(array).all() for array in folded.values()):
            continue
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in folded.items())
        convolution.input[:] = [convolution.input[0], *folded]
        convolution.output[:] = norm.output
        graph.node.remove(norm)
    drop_unread(graph)
    return copy


def write_model(proto: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write a model under a temporary name, read it again, and rename it: a killed run leaves no half file.

    Raises:
        OutputError: the folder is missing or not writable, or the name does not end in .onnx.
        ModelError: the file holds another network than ``proto``.
    """
    target = check_writable(path)
    check_onnx(path)
    try:
        with Scratch(parent=target.parent) as folder:
            written = Path(folder) / target.name
            data = Path(folder) / f"{target.name}.data"
            save(proto, written)
            if _fingerprint(load(written)[0]) != _fingerprint(proto):
                raise ModelError(f"{target.name}: another network once written; choose another place")
            with publishing(path):
                if data.exists():
                    os.replace(data, target.parent / data.name)
                os.replace(written, target)
    except OSError as error:
        raise unwritable(path, error) from error
