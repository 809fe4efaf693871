"""Rules, per operator, that trace the channels of its inputs to its output, and that remove channels.

Nothing is assumed about an operator that is not in the table at the end, or has unsupported attributes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netdecouple.convolution import IntArray
from netdecouple.frontends.onnx.fused import RESIDUAL, SLOPE
from netdecouple.frontends.onnx.proto import (
    array_of,
    attributes_of,
    drop_unread,
    readers_of,
    reads,
    remove_named,
    replace_items,
)
from netdecouple.kernels import DOMAIN, OPERATOR

Shape = tuple[int | None, ...]  # None: not known, or may differ from run to run
Mask = NDArray[np.bool_]  # of a tensor's channels, (c,)


class UntracedError(Exception):
    """A node's channels cannot be traced."""


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


UNTRACED = Flow(None, ())  # all channels of all inputs are needed


class Graph:
    """A graph from which channels are removed: its tensors' shapes, and the channels that stay.

    The numbers of channels are computed again from the weights; other sizes may be ``given`` by a run.
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
            dims = value.type.tensor_type.shape.dim
            self._learn(value.name, tuple(d.dim_value if d.dim_value > 0 else None for d in dims))
        self.flows = [self._flow(node) for node in proto.node]
        self.live: dict[str, Mask] = {t: np.ones(self.width(t), bool) for t in self.shapes}
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

    def _flow(self, node: onnx.NodeProto) -> Flow:
        rule = rule_of(node)
        if rule is None or sum(map(bool, node.output)) != 1:
            return UNTRACED
        try:
            flow = rule.flow(self, node)
        except UntracedError:
            return UNTRACED
        for link in flow.links:
            shape = self.shapes.get(link.tensor)
            if isinstance(link, Mix) and shape and shape[1] != link.used.shape[1]:
                return UNTRACED
        if flow.shape is not None:
            self._learn(node.output[0], flow.shape)
        return flow

    def shape(self, tensor: str) -> Shape:
        """Return a tensor's shape, or raise UntracedError if its number of channels is not known."""
        if tensor not in self.shapes:
            raise UntracedError
        return self.shapes[tensor]

    def width(self, tensor: str) -> int:
        """Return a tensor's number of channels, or raise UntracedError if it is not known."""
        return self.shape(tensor)[1] or 0

    def images(self, tensor: str) -> int | None:
        """The size of a tensor's first axis in the run, if it is known."""
        return self.shapes.get(tensor, (None,))[0]

    def array(self, node: onnx.NodeProto, index: int) -> NDArray[Any]:
        """Return a constant input, or raise UntracedError if it is not constant, or missing."""
        array = array_of(self.constants, node, index)
        if array is None:
            raise UntracedError
        return array

    def integers(self, node: onnx.NodeProto, index: int, name: str) -> list[int] | None:
        """Return a list that is an attribute in older operators, and a constant input in newer ones."""
        if any(node.input[index : index + 1]):
            return [int(number) for number in self.array(node, index).ravel()]
        return attributes_of(node).get(name)

    def cut(self, node: onnx.NodeProto, flow: Flow) -> None:
        """Adapt a node to the channels that stay of the tensors that it reads and writes."""
        rule, tensors = rule_of(node), (node.output[0], *(link.tensor for link in flow.links))
        if rule and rule.cut and not all(self.live[t].all() for t in tensors if t in self.live):
            rule.cut(self, node)

    def take(self, node: onnx.NodeProto, index: int, tensor: str, axis: int) -> None:
        """Keep of a node's constant input, if it has one, the part for a tensor's live channels."""
        array = array_of(self.constants, node, index)
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
        """Let a node's readers read its input instead, unless they are the graph's caller or a subgraph."""
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

    ``flow`` raises UntracedError for what is not supported; ``cut`` adapts a node to the live channels of its
    inputs and output, None if it does not depend on their number.
    """

    flow: Callable[[Graph, onnx.NodeProto], Flow]
    cut: Callable[[Graph, onnx.NodeProto], None] | None = None


def rule_of(node: onnx.NodeProto) -> Rule | None:
    return _RULES.get(node.op_type) if node.domain in ("", "ai.onnx", DOMAIN) else None


def _require(condition: bool) -> None:
    if not condition:
        raise UntracedError


def _set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    remove_named(node.attribute, {name})
    node.attribute.append(helper.make_attribute(name, value))


def _tied(graph: Graph, node: onnx.NodeProto, shape: Shape) -> Flow:
    """Compute every channel from the same channel of the first input."""
    return Flow(shape, [Link(node.input[0], np.arange(graph.width(node.input[0])))])


def _elementwise(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace operators whose further inputs, if any, are scalars."""
    return _tied(graph, node, graph.shape(node.input[0]))


def _dropout(graph: Graph, node: onnx.NodeProto) -> Flow:
    _require(not any(node.input[2:]) or not graph.array(node, 2).any())  # not in training mode
    return _elementwise(graph, node)


def _pooled(graph: Graph, node: onnx.NodeProto) -> Flow:
    shape = graph.shape(node.input[0])
    size = 1 if node.op_type.startswith("Global") else None
    return _tied(graph, node, (*shape[:2], *[size] * (len(shape) - 2)))


def _normalized(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace operators with one number per channel in every further input."""
    width = graph.width(node.input[0])
    _require(all(graph.array(node, index).shape == (width,) for index in range(1, len(node.input))))
    _require(not attributes_of(node).get("training_mode", 0))
    return _elementwise(graph, node)


def _cut_normalized(graph: Graph, node: onnx.NodeProto) -> None:
    for index in range(1, len(node.input)):
        graph.take(node, index, node.output[0], 0)


def _broadcast(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace operators on tensors of one rank, and constants that may have fewer axes."""
    tensors = [t for t in node.input if t not in graph.constants]
    shapes = [graph.shape(t) if t in tensors else tuple(graph.constants[t].dims) for t in node.input]
    rank = max(map(len, shapes), default=0)
    _require(rank >= 2 and all(len(graph.shapes[t]) == rank for t in tensors))
    axes = list(zip(*((*[1] * (rank - len(s)), *s) for s in shapes), strict=True))
    sizes = [None if None in axis else max(size or 0 for size in axis) for axis in axes]
    width = sizes[1] or 0
    _require(all(size in (1, width) for size in axes[1]))
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


def _convolution(graph: Graph, node: onnx.NodeProto) -> Flow:
    weight, groups = graph.array(node, 1), attributes_of(node).get("group", 1)
    _require(all(t in graph.constants for t in node.input[2:] if t))
    x, is_transposed = node.input[0], node.op_type == "ConvTranspose"
    rest = [None] * (weight.ndim - 2)
    if groups == 1:
        used = (weight != 0).any(axis=tuple(range(2, weight.ndim)))
        used = used.T if is_transposed else used
        return Flow((graph.images(x), len(used), *rest), [Mix(x, used)])
    _require(graph.width(x) == groups and not is_transposed)
    source = np.arange(len(weight)) // (len(weight) // groups)
    return Flow((graph.images(x), len(weight), *rest), [Link(x, source)])


def _cut_convolution(graph: Graph, node: onnx.NodeProto) -> None:
    x, output = node.input[0], node.output[0]
    outputs, inputs = (1, 0) if node.op_type == "ConvTranspose" else (0, 1)
    graph.take(node, 1, output, outputs)
    graph.take(node, 2, output, 0)
    if attributes_of(node).get("group", 1) == 1:
        graph.take(node, 1, x, inputs)
    else:  # depthwise
        _set_attribute(node, "group", int(graph.live[x].sum()))


def _fused(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace the fused operator: outputs read the channels with non-zero rows; the residual is added."""
    depthwise, pointwise, attributes = graph.array(node, 1), graph.array(node, 2), attributes_of(node)
    _require(all(t in graph.constants for t in node.input[3 : SLOPE + 1] if t))
    _require(attributes.get("group", 1) == 1)
    x, n_o = node.input[0], len(pointwise)
    by_row = (pointwise[:, :, 0, 0] != 0) & (depthwise != 0).any(axis=(1, 2, 3))  # (n_o, rows)
    used = np.zeros((attributes.get("in_channels", 0), n_o), bool)
    np.logical_or.at(used, np.array(attributes.get("channels", []), np.int64), by_row.T)
    links: list[Link | Mix] = [Mix(x, used.T)]
    if any(node.input[RESIDUAL:]):
        residual = node.input[RESIDUAL]
        _require(graph.width(residual) == n_o)
        links.append(Link(residual, np.arange(n_o)))
    return Flow((graph.images(x), n_o, None, None), links)


def _cut_fused(graph: Graph, node: onnx.NodeProto) -> None:
    x, output = node.input[0], node.output[0]
    for index in (2, 3, SLOPE):
        graph.take(node, index, output, 0)
    live = graph.live.get(x)
    if live is None or live.all():
        return
    channels = np.array(attributes_of(node)["channels"], np.int64)
    rows = np.flatnonzero(live[channels])
    if not len(rows):  # at least one is needed; its weights are zero, whatever it reads
        rows = np.arange(1)
    for index, axis in ((1, 0), (2, 1)):
        graph.store(node, index, graph.array(node, index).take(rows, axis))
    _set_attribute(node, "channels", np.maximum(np.cumsum(live) - 1, 0)[channels[rows]].tolist())
    _set_attribute(node, "in_channels", int(live.sum()))


def _concatenated(graph: Graph, node: onnx.NodeProto) -> Flow:
    shapes = [graph.shape(t) for t in node.input]
    _require(attributes_of(node).get("axis", 1) in (1, 1 - len(shapes[0])))
    widths = [graph.width(t) for t in node.input]
    starts = np.cumsum([0, *widths]).tolist()
    links = [Link(t, np.arange(n), start) for t, n, start in zip(node.input, widths, starts, strict=False)]
    return Flow((shapes[0][0], starts[-1], *shapes[0][2:]), links)


def _gathered(graph: Graph, node: onnx.NodeProto) -> Flow:
    x, indices = node.input[0], graph.array(node, 1)
    shape = graph.shape(x)
    _require(len(shape) >= 3 and attributes_of(node).get("axis", 0) in (1, 1 - len(shape)))
    _require(indices.ndim == 1 and indices.size > 0)
    links = [Link(x, indices.astype(np.int64) % graph.width(x), tied=False)]
    return Flow((shape[0], len(indices), *shape[2:]), links)


def _cut_gathered(graph: Graph, node: onnx.NodeProto) -> None:
    live, indices = graph.live[node.input[0]], graph.array(node, 1)
    kept = indices[graph.live[node.output[0]]]
    left = (np.cumsum(live) - 1)[kept].astype(indices.dtype)
    graph.store(node, 1, left)
    if np.array_equal(left, np.arange(live.sum())):
        graph.bypass(node)


def _padded(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace padding; channels that it adds can be removed one by one."""
    shape, pads = graph.shape(node.input[0]), graph.integers(node, 1, "pads") or []
    rank = len(shape)
    _require(len(pads) == 2 * rank and not any(node.input[3:]))
    front, back = pads[1], pads[rank + 1]
    is_copied = attributes_of(node).get("mode", b"constant") != b"constant"
    _require(min(front, back) >= 0 and not (is_copied and front + back))
    sizes = [None if a is None else a + pads[i] + pads[rank + i] for i, a in enumerate(shape)]
    return Flow(tuple(sizes), [Link(node.input[0], np.arange(graph.width(node.input[0])), front)])


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


def _axes(graph: Graph, node: onnx.NodeProto, index: int) -> set[int]:
    """Return the axes on which an operator works, counted from the front; all, if none are named."""
    rank, axes = len(graph.shape(node.input[0])), graph.integers(node, index, "axes")
    counted = {axis % rank for axis in (range(rank) if axes is None else axes)}
    _require(1 not in counted)
    return counted


def _sliced(graph: Graph, node: onnx.NodeProto) -> Flow:
    shape, axes = graph.shape(node.input[0]), _axes(graph, node, 3)
    return _tied(graph, node, tuple(None if i in axes else a for i, a in enumerate(shape)))


def _reduced(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace reductions, which may keep their axes, and Squeeze, which does not."""
    shape, axes = graph.shape(node.input[0]), _axes(graph, node, 1)
    keep = attributes_of(node).get("keepdims", 1) if node.op_type != "Squeeze" else 0
    _require(bool(axes) and (0 not in axes or bool(keep)))
    left = [1 if i in axes else a for i, a in enumerate(shape) if keep or i not in axes]
    return _tied(graph, node, tuple(left))


def _resized(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace resizing by constant factors, with 1 for the channels."""
    shape, attributes = graph.shape(node.input[0]), attributes_of(node)
    index = 2 if node.op_type == "Resize" and len(node.input) > 2 else 1
    scales = graph.array(node, index) if len(node.input) > 1 else attributes.get("scales", ())
    _require(len(scales) == len(shape) and scales[1] == 1 and "axes" not in attributes)
    _require(attributes.get("coordinate_transformation_mode") != b"tf_crop_and_resize")
    _require(not any(node.input[3:]))
    return _tied(graph, node, (*shape[:2], *[None] * (len(shape) - 2)))


def _flattened(graph: Graph, node: onnx.NodeProto) -> Flow:
    _require(attributes_of(node).get("axis", 1) in (1, 1 - len(graph.shape(node.input[0]))))
    return _blocks(graph, node)


def _blocks(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace flattening, where every channel becomes a block of features."""
    shape, width = graph.shape(node.input[0]), graph.width(node.input[0])
    features = _features(graph, node.output[0]) or math.prod(size or 0 for size in shape[1:])
    _require(features > 0 and features % width == 0)
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


def _reshaped(graph: Graph, node: onnx.NodeProto) -> Flow:
    """Trace a reshape that flattens all axes but the first."""
    images, target = graph.shape(node.input[0])[0], graph.integers(node, 1, "shape") or []
    given = graph.given.get(node.output[0], (-1,))
    _require(len(target) == 2 and not attributes_of(node).get("allowzero", 0))
    _require(target[0] == 0 or given[0] == images)
    flow = _blocks(graph, node)
    _require(flow.shape is not None and target[1] in (-1, flow.shape[1]))
    return flow


def _cut_reshaped(graph: Graph, node: onnx.NodeProto) -> None:
    target = array_of(graph.constants, node, 1)
    if target is not None and target[1] > 0:
        graph.store(node, 1, np.array([target[0], graph.live[node.output[0]].sum()], np.int64))


def _matrix(graph: Graph, node: onnx.NodeProto) -> NDArray[Any] | None:
    """Return the weight (n_o, n_i) of a matrix product."""
    weight, attributes = array_of(graph.constants, node, 1), attributes_of(node)
    if node.op_type not in ("Gemm", "MatMul") or attributes.get("transA", 0):
        return None
    if weight is None or weight.ndim != 2:
        return None
    return weight if attributes.get("transB", 0) else weight.T


def _multiplied(graph: Graph, node: onnx.NodeProto) -> Flow:
    x, weight = node.input[0], _matrix(graph, node)
    if weight is None or len(graph.shape(x)) != 2:
        raise UntracedError
    return Flow(None, [Mix(x, (weight != 0).any(axis=0)[None])])


def _cut_multiplied(graph: Graph, node: onnx.NodeProto) -> None:
    graph.take(node, 1, node.input[0], 1 if attributes_of(node).get("transB", 0) else 0)


_ELEMENTWISE = Rule(_elementwise)
_DROPOUT = Rule(_dropout)

_OPERATORS: dict[Rule, str] = {
    _ELEMENTWISE: "Abs Cast Ceil Celu Clip Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu "
    "Log Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Softplus Softsign Sqrt Tanh ThresholdedRelu",
    _DROPOUT: "Dropout",
    Rule(_convolution, _cut_convolution): "Conv ConvTranspose",
    Rule(_fused, _cut_fused): OPERATOR,
    Rule(_broadcast, _cut_broadcast): "Add Div Max Mean Min Mul PRelu Pow Sub Sum",
    Rule(_normalized, _cut_normalized): "BatchNormalization InstanceNormalization",
    Rule(_pooled): "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool",
    Rule(_reduced): "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Squeeze",
    Rule(_resized): "Resize Upsample",
    Rule(_concatenated): "Concat",
    Rule(_gathered, _cut_gathered): "Gather",
    Rule(_padded, _cut_padded): "Pad",
    Rule(_sliced): "Slice",
    Rule(_flattened): "Flatten",
    Rule(_reshaped, _cut_reshaped): "Reshape",
    Rule(_multiplied, _cut_multiplied): "Gemm MatMul",
}
_RULES = {name: rule for rule, names in _OPERATORS.items() for name in names.split()}
