"""Rules, per operator, that trace the channels of its inputs to its output, and that remove channels.

An operator that is not in the table at the end, or whose attributes are not supported, has no `Flow`: then
nothing is assumed about it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netdecouple.convolution import IntArray
from netdecouple.frontends.onnx.fusion import RESIDUAL, SLOPE
from netdecouple.frontends.onnx.lowering import is_fused
from netdecouple.frontends.onnx.proto import drop_unread, readers_of, reads, remove_named, replace_items

Shape = tuple[int | None, ...]  # None: not known, or may differ from run to run
Mask = NDArray[np.bool_]  # of a tensor's channels, (c,)


@dataclass(frozen=True)
class Link:
    """Output channel ``start + j`` is computed from channel ``source[j]`` of a tensor, and from no other.

    Where they are ``tied``, the output channel cannot be removed while that channel stays.
    """

    tensor: str
    source: IntArray
    start: int = 0
    tied: bool = True

    @property
    def target(self) -> slice:
        return slice(self.start, self.start + len(self.source))


@dataclass(frozen=True)
class Mix:
    """The channels of a tensor (columns) from which output channels (rows) are computed."""

    tensor: str
    used: Mask  # (n_o, n_i), or (1, n_i) for all outputs at once


@dataclass(frozen=True)
class Flow:
    """How a node's output depends on its inputs' channels.

    ``shape`` is the output's; None if no channel of the output may be removed.
    """

    shape: Shape | None
    links: Sequence[Link | Mix]

    def tensors(self, node: onnx.NodeProto) -> Iterator[str]:
        yield node.output[0]
        yield from (link.tensor for link in self.links)


class Graph:
    """A graph from which channels are removed: its tensors' shapes, and the channels that stay.

    Args:
        proto: is changed by `cut` and `clean`.
        given: shapes of tensors in a run; their numbers of channels are computed again from the weights.
    """

    def __init__(self, proto: onnx.GraphProto, given: Mapping[str, tuple[int, ...]]) -> None:
        self.proto = proto
        self.given = given
        self.inputs = {value.name for value in proto.input}  # constants among them may be overridden
        self.outputs = {value.name for value in proto.output}
        self.constants = {t.name: t for t in proto.initializer if t.name not in self.inputs}
        self.readers = readers_of(proto.node)
        self.shapes: dict[str, Shape] = {}  # of tensors with a known number of channels
        for value in proto.input:
            self._learn(
                value.name,
                tuple(d.dim_value if d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim),
            )
        self.flows = [self._flow(node) for node in proto.node]
        self.live: dict[str, Mask] = {t: np.ones(self.width(t) or 0, bool) for t in self.shapes}
        self._uses = Counter({t: len(nodes) for t, nodes in self.readers.items()}) + Counter(self.outputs)
        self._taken = {t for n in proto.node for t in chain(reads(n), n.output)} | self.inputs
        self._aliases: dict[str, str] = {}  # outputs of bypassed nodes: the tensors to read instead

    def _learn(self, tensor: str, shape: Shape) -> None:
        """Keep a shape with a known number of channels; other missing sizes are those in the run."""
        if len(shape) < 2 or shape[1] is None:
            return
        given = self.given.get(tensor, ())
        if len(given) == len(shape):
            shape = tuple(b if a is None else a for a, b in zip(shape, given, strict=True))
        self.shapes[tensor] = shape

    def _flow(self, node: onnx.NodeProto) -> Flow | None:
        rule = rule_of(node)
        flow = rule.flow(self, node) if rule and sum(map(bool, node.output)) == 1 else None
        if flow is None or any(
            isinstance(link, Mix) and self.width(link.tensor) not in (None, link.used.shape[1])
            for link in flow.links
        ):
            return None
        if flow.shape is not None:
            self._learn(node.output[0], flow.shape)
        return flow

    def width(self, tensor: str) -> int | None:
        """The number of a tensor's channels, if it is known."""
        return self.shapes[tensor][1] if tensor in self.shapes else None

    def images(self, tensor: str) -> int | None:
        """The size of a tensor's first axis in the run, if it is known."""
        return self.shapes[tensor][0] if tensor in self.shapes else None

    def array(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        """Return a constant input; None if it is not constant, or missing."""
        if index >= len(node.input) or node.input[index] not in self.constants:
            return None
        return numpy_helper.to_array(self.constants[node.input[index]])

    def integers(self, node: onnx.NodeProto, index: int, name: str) -> list[int] | None:
        """Return a list that is an attribute in older operators, and a constant input in newer ones."""
        if index < len(node.input) and node.input[index]:
            array = self.array(node, index)
            return None if array is None else [int(number) for number in array.ravel()]
        value = _attribute(node, name, None)
        return None if value is None else list(value)

    def cut(self, node: onnx.NodeProto, flow: Flow | None) -> None:
        """Adapt a node to the channels that stay of the tensors that it reads and writes."""
        rule = rule_of(node)
        tensors = flow.tensors(node) if flow else ()
        if rule and not all(self.live[tensor].all() for tensor in tensors if tensor in self.live):
            rule.cut(self, node)

    def take(self, node: onnx.NodeProto, index: int, tensor: str, axis: int) -> None:
        """Keep of a node's constant input, if it has one, the part for a tensor's live channels."""
        array = self.array(node, index)
        if array is not None and tensor in self.live and not self.live[tensor].all():
            self.store(node, index, np.compress(self.live[tensor], array, axis))

    def store(self, node: onnx.NodeProto, index: int, array: NDArray[Any]) -> None:
        """Replace a node's constant input; other nodes that read the constant keep the old one."""
        name = node.input[index]
        if self._uses[name] > 1:
            self._uses[name] -= 1
            name = next(n for n in (f"{name}.kept{i}" for i in count(1)) if n not in self._taken)
            self._taken.add(name)
            self._uses[name] = 1
            node.input[index] = name
            self.constants[name] = self.proto.initializer.add()
        self.constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def bypass(self, node: onnx.NodeProto) -> None:
        """Let the readers of a node's output read its input instead.

        Nothing happens if the output is one of the graph, or read within a subgraph.
        """
        output = node.output[0]
        readers = self.readers.get(output, [])
        inside = any([*reads(reader)].count(output) > [*reader.input].count(output) for reader in readers)
        if output not in self.outputs and not inside:
            self._aliases[output] = self._aliases.get(node.input[0], node.input[0])

    def clean(self) -> None:
        """Remove bypassed nodes, constants that nothing reads, and shapes that are no longer true."""
        nodes = self.proto.node
        replace_items(nodes, [node for node in nodes if node.output[0] not in self._aliases])
        for node in nodes:
            for index, tensor in enumerate(node.input):
                if tensor in self._aliases:
                    node.input[index] = self._aliases[tensor]
        drop_unread(self.proto)
        changed = {tensor for tensor, mask in self.live.items() if not mask.all()}
        remove_named(self.proto.value_info, changed | set(self._aliases))


class Rule(NamedTuple):
    """How an operator treats channels.

    ``flow`` returns None for what is not supported; ``cut`` adapts a node to the live channels of its inputs
    and output.
    """

    flow: Callable[[Graph, onnx.NodeProto], Flow | None]
    cut: Callable[[Graph, onnx.NodeProto], None]


def rule_of(node: onnx.NodeProto) -> Rule | None:
    if is_fused(node):
        return _FUSED
    return _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    remove_named(node.attribute, {name})
    node.attribute.append(helper.make_attribute(name, value))


def _tied(graph: Graph, node: onnx.NodeProto, shape: Shape) -> Flow:
    """Compute every channel from the same channel of the first input."""
    return Flow(shape, [Link(node.input[0], np.arange(graph.width(node.input[0]) or 0))])


def _leave(graph: Graph, node: onnx.NodeProto) -> None:
    """Change nothing: the node does not depend on the number of channels."""


def _elementwise(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace operators whose further inputs, if any, are scalars."""
    shape = graph.shapes.get(node.input[0])
    return _tied(graph, node, shape) if shape else None


def _dropout(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    training = len(node.input) > 2 and node.input[2]
    switch = graph.array(node, 2)
    return None if training and (switch is None or switch.any()) else _elementwise(graph, node)


def _pooled(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    shape = graph.shapes.get(node.input[0])
    size = 1 if node.op_type.startswith("Global") else None
    return _tied(graph, node, (*shape[:2], *[size] * (len(shape) - 2))) if shape else None


def _normalized(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace operators with one number per channel in every further input."""
    width = graph.width(node.input[0])
    parts = [graph.array(node, index) for index in range(1, len(node.input))]
    if _attribute(node, "training_mode", 0) or any(a is None or a.shape != (width,) for a in parts):
        return None
    return _elementwise(graph, node)


def _cut_normalized(graph: Graph, node: onnx.NodeProto) -> None:
    for index in range(1, len(node.input)):
        graph.take(node, index, node.output[0], 0)


def _broadcast(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace operators on tensors of one rank, and constants that may have fewer axes."""
    known: list[Shape | None] = [
        tuple(graph.constants[t].dims) if t in graph.constants else graph.shapes.get(t) for t in node.input
    ]
    shapes = [shape for shape in known if shape is not None]
    if len(shapes) < len(known):
        return None
    rank = max(map(len, shapes), default=0)
    tensors = [t for t in node.input if t not in graph.constants]
    if rank < 2 or any(len(graph.shapes[t]) != rank for t in tensors):
        return None
    axes = list(zip(*((*[1] * (rank - len(s)), *s) for s in shapes), strict=True))
    sizes = [None if None in axis else max(size or 0 for size in axis) for axis in axes]
    width = sizes[1]
    if width is None or any(size not in (1, width) for size in axes[1]):
        return None
    # a tensor with one channel for all is needed whole
    return Flow(tuple(sizes), [Link(t, np.arange(width)) for t in tensors if graph.width(t) == width])


def _cut_broadcast(graph: Graph, node: onnx.NodeProto) -> None:
    output = node.output[0]
    rank, width = len(graph.shapes[output]), graph.width(output)
    for index, name in enumerate(node.input):
        if name in graph.constants:
            dims = graph.constants[name].dims
            axis = 1 - rank + len(dims)
            if axis >= 0 and dims[axis] == width:
                graph.take(node, index, output, axis)


def _convolution(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    weight = graph.array(node, 1)
    if weight is None or any(t and t not in graph.constants for t in node.input[2:]):
        return None
    x, groups, transposed = node.input[0], _attribute(node, "group", 1), node.op_type == "ConvTranspose"
    rest = [None] * (weight.ndim - 2)
    if groups == 1:
        used = (weight != 0).any(axis=tuple(range(2, weight.ndim)))
        used = used.T if transposed else used
        return Flow((graph.images(x), len(used), *rest), [Mix(x, used)])
    if graph.width(x) != groups or transposed:
        return None
    source = np.arange(len(weight)) // (len(weight) // groups)
    return Flow((graph.images(x), len(weight), *rest), [Link(x, source)])


def _cut_convolution(graph: Graph, node: onnx.NodeProto) -> None:
    x, output = node.input[0], node.output[0]
    outputs, inputs = (1, 0) if node.op_type == "ConvTranspose" else (0, 1)
    graph.take(node, 1, output, outputs)
    graph.take(node, 2, output, 0)
    if _attribute(node, "group", 1) == 1:
        graph.take(node, 1, x, inputs)
    else:  # depthwise
        _set_attribute(node, "group", int(graph.live[x].sum()))


def _fused(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace the fused operator: outputs read the channels with non-zero rows; the residual is added."""
    depthwise, pointwise = graph.array(node, 1), graph.array(node, 2)
    constant = all(not t or t in graph.constants for t in node.input[3 : SLOPE + 1])
    if depthwise is None or pointwise is None or not constant or _attribute(node, "group", 1) > 1:
        return None
    x, channels = node.input[0], np.array(_attribute(node, "channels", []), np.int64)
    by_row = (pointwise[:, :, 0, 0] != 0) & (depthwise != 0).any(axis=(1, 2, 3))  # (n_o, rows)
    used = np.zeros((_attribute(node, "in_channels", 0), len(pointwise)), bool)
    np.logical_or.at(used, channels, by_row.T)
    links: list[Link | Mix] = [Mix(x, used.T)]
    residual = node.input[RESIDUAL] if len(node.input) > RESIDUAL else ""
    if residual:
        if graph.width(residual) != len(pointwise):
            return None
        links.append(Link(residual, np.arange(len(pointwise))))
    return Flow((graph.images(x), len(pointwise), None, None), links)


def _cut_fused(graph: Graph, node: onnx.NodeProto) -> None:
    x, output = node.input[0], node.output[0]
    for index in (2, 3, SLOPE):
        graph.take(node, index, output, 0)
    live = graph.live.get(x)
    if live is None or live.all():
        return
    channels = np.array(_attribute(node, "channels", []), np.int64)
    rows = np.flatnonzero(live[channels])
    if not len(rows):  # at least one is needed; its weights are zero, whatever it reads
        rows = np.arange(1)
    for index, axis in ((1, 0), (2, 1)):
        array = graph.array(node, index)
        assert array is not None
        graph.store(node, index, array.take(rows, axis))
    _set_attribute(node, "channels", np.maximum(np.cumsum(live) - 1, 0)[channels[rows]].tolist())
    _set_attribute(node, "in_channels", int(live.sum()))


def _concatenated(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    shapes = [graph.shapes.get(t) for t in node.input]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or _attribute(node, "axis", 1) not in (1, 1 - len(known[0])):
        return None
    ends = np.cumsum([shape[1] for shape in known]).tolist()
    links = [
        Link(t, np.arange(shape[1] or 0), end - (shape[1] or 0))
        for t, shape, end in zip(node.input, known, ends, strict=True)
    ]
    return Flow((known[0][0], ends[-1], *known[0][2:]), links)


def _gathered(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    shape, indices = graph.shapes.get(node.input[0]), graph.array(node, 1)
    if shape is None or len(shape) < 3 or _attribute(node, "axis", 0) not in (1, 1 - len(shape)):
        return None
    if indices is None or indices.ndim != 1 or not indices.size:
        return None
    links = [Link(node.input[0], indices.astype(np.int64) % (shape[1] or 1), tied=False)]
    return Flow((shape[0], len(indices), *shape[2:]), links)


def _cut_gathered(graph: Graph, node: onnx.NodeProto) -> None:
    live, indices = graph.live[node.input[0]], graph.array(node, 1)
    assert indices is not None
    kept = indices[graph.live[node.output[0]]]
    left = (np.cumsum(live) - 1)[kept].astype(indices.dtype)
    graph.store(node, 1, left)
    if np.array_equal(left, np.arange(live.sum())):
        graph.bypass(node)


def _padded(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace padding; channels that it adds can be removed one by one."""
    shape, pads = graph.shapes.get(node.input[0]), graph.integers(node, 1, "pads")
    if shape is None or pads is None or len(pads) != 2 * len(shape) or any(node.input[3:]):
        return None
    rank, width = len(shape), shape[1] or 0
    front, back = pads[1], pads[rank + 1]
    copied = _attribute(node, "mode", b"constant") != b"constant"
    if min(front, back) < 0 or (copied and front + back):
        return None
    sizes = [None if a is None else a + pads[i] + pads[rank + i] for i, a in enumerate(shape)]
    return Flow(tuple(sizes), [Link(node.input[0], np.arange(width), front)])


def _cut_padded(graph: Graph, node: onnx.NodeProto) -> None:
    pads, live = graph.integers(node, 1, "pads"), graph.live[node.output[0]]
    assert pads is not None
    front, rank = pads[1], len(pads) // 2
    pads[1] = int(live[:front].sum())
    pads[rank + 1] = int(live[len(live) - pads[rank + 1] :].sum())
    if len(node.input) > 1:
        graph.store(node, 1, np.array(pads, np.int64))
    else:
        _set_attribute(node, "pads", pads)


def _axes(shape: Shape, axes: list[int] | None) -> set[int]:
    """Count axes from the front; all, if none are given."""
    return {axis % len(shape) for axis in (range(len(shape)) if axes is None else axes)}


def _sliced(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    shape = graph.shapes.get(node.input[0])
    axes = _axes(shape, graph.integers(node, 3, "axes")) if shape else {1}
    if shape is None or 1 in axes:
        return None
    return _tied(graph, node, tuple(None if i in axes else a for i, a in enumerate(shape)))


def _reduced(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace reductions, which may keep their axes, and Squeeze, which does not."""
    shape = graph.shapes.get(node.input[0])
    axes = _axes(shape, graph.integers(node, 1, "axes")) if shape else {1}
    keep = _attribute(node, "keepdims", 1) if node.op_type != "Squeeze" else 0
    if shape is None or 1 in axes or not axes or (0 in axes and not keep):
        return None
    return _tied(
        graph, node, tuple(1 if i in axes else a for i, a in enumerate(shape) if keep or i not in axes)
    )


def _resized(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace resizing by constant factors, with 1 for the channels."""
    shape = graph.shapes.get(node.input[0])
    index = 2 if node.op_type == "Resize" and len(node.input) > 2 else 1
    scales = graph.array(node, index) if len(node.input) > 1 else _attribute(node, "scales", None)
    crops = _attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    if shape is None or scales is None or len(scales) != len(shape) or scales[1] != 1:
        return None
    if crops or _attribute(node, "axes", None) is not None or any(node.input[3:]):
        return None
    return _tied(graph, node, (*shape[:2], *[None] * (len(shape) - 2)))


def _flattened(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace flattening, where every channel becomes a block of features."""
    shape = graph.shapes.get(node.input[0])
    if shape is None or _attribute(node, "axis", 1) not in (1, 1 - len(shape)):
        return None
    return _blocks(graph, node, shape)


def _blocks(graph: Graph, node: onnx.NodeProto, shape: Shape) -> Flow | None:
    width, sizes = shape[1] or 1, [size for size in shape[1:] if size is not None]
    features = _features(graph, node.output[0])
    if features is None and len(sizes) == len(shape) - 1:
        features = math.prod(sizes)
    if not features or features % width:
        return None
    return Flow((shape[0], features), [Link(node.input[0], np.arange(features) // (features // width))])


def _features(graph: Graph, tensor: str) -> int | None:
    """The number of features that a matrix product behind a tensor, and elementwise operators, reads."""
    for reader in graph.readers.get(tensor, ()):
        weight = _matrix(graph, reader)
        if weight is not None and reader.input[0] == tensor:
            return int(weight.shape[1])
        if rule_of(reader) in (_ELEMENTWISE, _DROPOUT) and (found := _features(graph, reader.output[0])):
            return found
    return None


def _reshaped(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    """Trace a reshape that flattens all axes but the first."""
    shape, target = graph.shapes.get(node.input[0]), graph.integers(node, 1, "shape")
    if shape is None or target is None or len(target) != 2 or _attribute(node, "allowzero", 0):
        return None
    given = graph.given.get(node.output[0])
    if target[0] != 0 and (given is None or given[0] != shape[0]):
        return None
    flow = _blocks(graph, node, shape)
    return flow if flow and flow.shape and target[1] in (-1, flow.shape[1]) else None


def _cut_reshaped(graph: Graph, node: onnx.NodeProto) -> None:
    target = graph.array(node, 1)
    if target is not None and target[1] > 0:
        graph.store(node, 1, np.array([target[0], graph.live[node.output[0]].sum()], np.int64))


def _matrix(graph: Graph, node: onnx.NodeProto) -> NDArray[Any] | None:
    """Return the weight (n_o, n_i) of a matrix product."""
    if node.op_type not in ("Gemm", "MatMul") or _attribute(node, "transA", 0):
        return None
    weight = graph.array(node, 1)
    if weight is None or weight.ndim != 2:
        return None
    return weight if _attribute(node, "transB", 0) else weight.T


def _multiplied(graph: Graph, node: onnx.NodeProto) -> Flow | None:
    weight, shape = _matrix(graph, node), graph.shapes.get(node.input[0])
    if weight is None or shape is None or len(shape) != 2:
        return None
    return Flow(None, [Mix(node.input[0], (weight != 0).any(axis=0)[None])])


def _cut_multiplied(graph: Graph, node: onnx.NodeProto) -> None:
    graph.take(node, 1, node.input[0], 1 if _attribute(node, "transB", 0) else 0)


_CONVOLUTION = Rule(_convolution, _cut_convolution)
_FUSED = Rule(_fused, _cut_fused)
_ELEMENTWISE = Rule(_elementwise, _leave)
_DROPOUT = Rule(_dropout, _leave)

_OPERATORS: dict[Rule, str] = {
    _CONVOLUTION: "Conv ConvTranspose",
    _ELEMENTWISE: "Abs Cast Ceil Celu Clip Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu "
    "Log Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Softplus Softsign Sqrt Tanh ThresholdedRelu",
    _DROPOUT: "Dropout",
    Rule(_broadcast, _cut_broadcast): "Add Div Max Mean Min Mul PRelu Pow Sub Sum",
    Rule(_normalized, _cut_normalized): "BatchNormalization InstanceNormalization",
    Rule(_pooled, _leave): "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool",
    Rule(_reduced, _leave): "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Squeeze",
    Rule(_resized, _leave): "Resize Upsample",
    Rule(_concatenated, _leave): "Concat",
    Rule(_gathered, _cut_gathered): "Gather",
    Rule(_padded, _cut_padded): "Pad",
    Rule(_sliced, _leave): "Slice",
    Rule(_flattened, _leave): "Flatten",
    Rule(_reshaped, _cut_reshaped): "Reshape",
    Rule(_multiplied, _cut_multiplied): "Gemm MatMul",
}
_RULES = {name: rule for rule, names in _OPERATORS.items() for name in names.split()}
