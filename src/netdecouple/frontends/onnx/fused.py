"""The fused operator in ONNX graphs: put it in, let it absorb what follows, and take it out again.

The operator computes ``clamp(prelu(conv + bias + residual))``: it absorbs, in this order, an Add, a LeakyRelu
or PRelu, and a Relu or Clip.

Every operator comes with a function that defines it. Where the operator is registered, a runtime uses it and
ignores the functions; elsewhere it replaces the nodes by the functions' bodies, which are standard operators.
The weights are in the file once: the functions select what they need from the operators' inputs, and runtimes
compute that once, when they open the file. The functions differ by their ``overload`` only, which ONNX
Runtime supports from 1.27 on. Older versions use the last function for every node without a warning; so the
first and the last are functions that they refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from netdecouple.convolution import Array, ConvGeometry, ConvStage, Factorization, IntArray
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.emission import Writer, emit, write
from netdecouple.frontends.onnx.proto import (
    Constants,
    Nodes,
    Tensors,
    array_of,
    attributes_of,
    constants_of,
    drop_unread,
    fixed,
    geometry_of,
    graphs_of,
    names_of,
    nodes_for,
    nodes_of,
    readers_of,
    replace_items,
    replace_nodes,
)
from netdecouple.kernels import DOMAIN, OPERATOR
from netdecouple.runtimes.onnxfile import copy_of

INPUTS = ("x", "depthwise", "pointwise", "bias", "slope", "residual")
SLOPE, RESIDUAL = 4, 5  # positions of the optional inputs
IR_VERSION = 10  # the first with overloads of functions
FIRST, LAST = ("first: overloads needed", "last: overloads needed")  # overloads that no node has


def is_fused(node: onnx.NodeProto) -> bool:
    """Whether this is a fused operator."""
    return node.domain == DOMAIN and node.op_type == OPERATOR


def fuse_separable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every separable pair of convolutions as one fused operator; it computes the same.

    A pair is a depthwise convolution, with or without a Gather that selects its channels, and a 1×1
    convolution that alone reads it; both have constant float32 weights. What follows a pair (an addition, an
    activation) is part of the operator where that is possible.
    """
    copy = copy_of(proto)
    graph = _Graph(copy.graph)

    def fused(node: onnx.NodeProto) -> tuple[Nodes, Tensors] | None:
        pair = graph.pair(node)
        return pair and emit(pair[0], node.name or node.output[0], pair[1], node.output[0], "fused")

    replace_nodes(copy.graph, fused)
    replace_items(copy.graph.node, nodes_for(copy.graph.node, graph.outputs)[0])
    drop_unread(copy.graph)
    absorb(copy.graph, graph.shapes)
    add_fallbacks(copy)
    return copy


class _Graph:
    """What is known about a graph's tensors."""

    def __init__(self, proto: onnx.GraphProto) -> None:
        self._constants = constants_of([proto])
        self.outputs = {value.name for value in proto.output}
        self._makers = {output: node for node in proto.node for output in node.output}
        self._readers = readers_of(proto.node)
        graph = shape_inference.infer_shapes(helper.make_model(proto)).graph
        self.shapes = {  # 0 where a size is not fixed
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
        }

    def _maker(self, tensor: str, operator: str) -> onnx.NodeProto | None:
        """Return the node that makes a tensor for a single reader, if it is of this kind."""
        node = self._makers.get(tensor)
        alone = len(self._readers.get(tensor, [])) == 1 and tensor not in self.outputs
        return node if node is not None and alone and node.op_type == operator and not node.domain else None

    def _convolution(
        self, node: onnx.NodeProto
    ) -> tuple[NDArray[Any], NDArray[np.float64], ConvGeometry] | None:
        """Return weight, bias and geometry of a 2-D convolution with constant float32 weights."""
        weight, bias = (array_of(self._constants, node, index) for index in (1, 2))
        attributes = attributes_of(node)
        if weight is None or weight.ndim != 4 or weight.dtype != np.float32 or "auto_pad" in attributes:
            return None
        if bias is None and any(node.input[2:]):
            return None
        n_o, n_i, *kernel = weight.shape
        geometry = geometry_of(n_o, n_i * attributes.get("group", 1), kernel, attributes)
        return weight, np.zeros(n_o) if bias is None else bias.astype(np.float64), geometry

    def pair(self, node: onnx.NodeProto) -> tuple[Factorization, str] | None:
        """Return the pair that ends in a node, and the tensor that it reads; None if there is none."""
        behind = self._maker(node.input[0], "Conv") if node.op_type == "Conv" and not node.domain else None
        if behind is None:
            return None
        last, first = self._convolution(node), self._convolution(behind)
        if last is None or first is None:
            return None
        (points, bias, pointwise), (filters, inner, depthwise) = last, first
        plain = ConvGeometry(pointwise.n_o, pointwise.n_i, 1, 1, dilations=pointwise.dilations)
        if pointwise != plain or not depthwise.is_depthwise or depthwise.n_i < 2 or min(depthwise.pads) < 0:
            return None
        x, reads = behind.input[0], np.arange(depthwise.n_i)
        gather = self._maker(x, "Gather")
        if gather is not None and attributes_of(gather).get("axis", 0) == 1:
            channels = array_of(self._constants, gather, 1)
            if channels is not None and channels.ndim == 1:
                x, reads = gather.input[0], channels.astype(np.int64)
        shape = self.shapes.get(x, ())
        if len(shape) != 4 or shape[1] <= 0:
            return None
        terms = depthwise.n_o
        rows = (reads % shape[1]).repeat(terms // depthwise.n_i)
        stage = ConvStage(replace(depthwise, n_i=terms, groups=terms), filters, rows)
        whole = replace(depthwise, n_o=pointwise.n_o, n_i=shape[1], groups=1)
        matrix = np.asarray(points[:, :, 0, 0], np.float64)
        bias = (bias + matrix @ inner).astype(np.float32)
        return Factorization(whole, (stage, ConvStage(pointwise, points)), bias), x


def absorb(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Merge what follows every fused operator into it, in place, as far as tensors' shapes are known.

    A node is absorbed if it alone reads the operator's output; an output of the graph stays as it is.
    """
    constants = fixed(graph)
    outputs = {value.name for value in graph.output}
    readers = readers_of(graph.node)
    nodes: list[onnx.NodeProto | None] = list(graph.node)
    position = {tensor: index for index, node in enumerate(graph.node) for tensor in node.output}
    # a fused operator in the middle of a chain of stages has no known shape, and nothing to absorb
    for node in [n for n in graph.node if is_fused(n) and n.output[0] in shapes]:
        shape = shapes[node.output[0]]
        while (output := node.output[0]) not in outputs and len(readers.get(output, [])) == 1:
            follower = nodes[position[readers[output][0].output[0]]]  # may be a fused operator by now
            if follower is None or not _absorb(node, follower, shape, shapes, constants):
                break
            # the operator moves to the place of what it absorbed: everything that one reads is known there
            nodes[position[node.output[0]]], nodes[position[output]] = node, None
    replace_items(graph.node, (node for node in nodes if node is not None))
    known = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for name, tensor in constants.items() if name not in known)


def _absorb(
    node: onnx.NodeProto,
    follower: onnx.NodeProto,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    constants: dict[str, onnx.TensorProto],
) -> bool:
    """Let ``node`` compute what ``follower`` does, if it can."""
    inputs = _padded(node.input)
    limits: dict[str, float] | None = {}
    if follower.domain not in ("", "ai.onnx") or {"minimum", "maximum"} & attributes_of(node).keys():
        return False
    if follower.op_type == "Add" and not inputs[RESIDUAL] and not inputs[SLOPE]:
        other = next((t for t in follower.input if t != node.output[0]), None)
        if other is None or other in constants or shapes.get(other) != shape:
            return False
        inputs[RESIDUAL] = other
    elif follower.op_type in ("LeakyRelu", "PRelu") and not inputs[SLOPE]:
        slope = _slope(follower, shape[1], constants)
        if slope is None:
            return False
        inputs[SLOPE] = f"{node.name}.slope"
        constants[inputs[SLOPE]] = numpy_helper.from_array(slope, inputs[SLOPE])
    elif follower.op_type in ("Relu", "Clip"):
        limits = _limits(follower, constants)
    else:
        return False
    if limits is None:
        return False
    while not inputs[-1]:
        inputs.pop()
    node.input[:] = inputs
    node.output[0] = follower.output[0]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in limits.items())
    return True


def _padded(inputs: Sequence[str]) -> list[str]:
    """Fill a fused operator's inputs up with the optional ones that it does not have."""
    return [*inputs, *[""] * (len(INPUTS) - len(inputs))]


def _slope(node: onnx.NodeProto, channels: int, constants: Constants) -> np.ndarray | None:
    """Factors of negative values, one per channel."""
    if node.op_type == "LeakyRelu":
        return np.full(channels, attributes_of(node).get("alpha", 0.01), np.float32)
    slope = array_of(constants, node, 1)
    if slope is None or (slope.size != 1 and (slope.size, *slope.shape[-3:]) != (channels, channels, 1, 1)):
        return None
    return np.broadcast_to(slope.ravel(), channels).astype(np.float32)


def _limits(node: onnx.NodeProto, constants: Constants) -> dict[str, float] | None:
    """What a Relu or a Clip limits to: constant inputs of the latter, or attributes before opset 11."""
    if node.op_type == "Relu":
        return {"minimum": 0.0}
    limits = {f"{a.name}imum": a.f for a in node.attribute if a.name in ("min", "max")}
    for index, name in enumerate(("minimum", "maximum"), 1):
        bound = array_of(constants, node, index)
        if bound is not None:
            limits[name] = bound.item()
        elif any(node.input[index : index + 1]):  # computed
            return None
    return None if any(math.isnan(limit) for limit in limits.values()) else limits


@dataclass(frozen=True)
class _Fused:
    """What a fused operator computes."""

    name: str
    factorization: Factorization
    slope: Array | None
    limits: dict[str, float]

    def write(self, writer: Writer, opset: int, x: str, output: str, residual: str) -> None:
        """Add standard operators, in the "parallel" form, that compute the same."""
        steps: list[tuple[str, list[str], dict[str, Any]]] = []
        if residual:
            steps.append(("Add", [residual], {}))
        if self.slope is not None and (self.slope == self.slope[0]).all():
            steps.append(("LeakyRelu", [], {"alpha": float(self.slope[0])}))
        elif self.slope is not None:
            each = np.arange(len(self.slope))[:, None, None]  # the shape that PRelu wants
            steps.append(("PRelu", [writer.weight("slope", self.slope, each)], {}))
        finite = {label: limit for label, limit in self.limits.items() if math.isfinite(limit)}
        if finite == {"min": 0.0}:
            steps.append(("Relu", [], {}))
        elif finite and opset < 11:
            steps.append(("Clip", [], finite))
        elif finite:
            bounds = [writer.constant(label, np.array(v, np.float32)) for label, v in finite.items()]
            steps.append(("Clip", bounds if "min" in finite else ["", *bounds], {}))

        tensors = [f"{writer.name}/{operator.lower()}_input" for operator, *_ in steps] + [output]
        write(writer, self.factorization, x, tensors[0])
        for (operator, inputs, attributes), (before, after) in zip(steps, pairwise(tensors), strict=True):
            writer.node(operator, operator.lower(), [before, *inputs], after, **attributes)


def _read(node: onnx.NodeProto, constants: Constants) -> _Fused:
    """Read a fused operator, or raise ModelError: its weights are not constant, or do not fit each other."""
    name = node.name or node.output[0]
    values, inputs = attributes_of(node), _padded(node.input)
    for tensor in inputs[1:RESIDUAL]:
        if tensor and tensor not in constants:
            raise ModelError(f"layer {name!r}: its weight {tensor!r} is computed, not constant")
    try:
        depthwise, pointwise, bias = (numpy_helper.to_array(constants[t]) for t in inputs[1:SLOPE])
        slope = array_of(constants, node, SLOPE)
        rows, _, *kernel = depthwise.shape
        n_o, channels = len(pointwise), np.array(values["channels"], np.int64)
        g = geometry_of(n_o, values["in_channels"], kernel, values)
        first = ConvStage(replace(g, n_o=rows, n_i=rows, groups=rows), depthwise, channels)
        second = ConvStage(ConvGeometry(n_o, rows, 1, 1, groups=g.groups), pointwise)
        for label, array, size in (("channels", channels, rows), ("bias", bias, n_o), ("slope", slope, n_o)):
            if array is not None and array.shape != (size,):
                raise ValueError(f"{label} {array.shape} instead of {(size,)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"layer {name!r}: not a {OPERATOR} that can be read ({error})") from error
    limits = {"min": values.get("minimum", -math.inf), "max": values.get("maximum", math.inf)}
    return _Fused(name.removesuffix("/fused"), Factorization(g, (first, second), bias), slope, limits)


def lower(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every fused operator written as standard operators, in the "parallel" form."""
    copy = copy_of(proto)
    opset = _standard_opset(copy)
    graphs = list(graphs_of(copy.graph))
    taken = names_of(copy.graph)
    constants = constants_of(graphs)
    weights: set[str] = set()

    def lowered(node: onnx.NodeProto) -> tuple[Nodes, Tensors] | None:
        if not is_fused(node):
            return None
        fused = _read(node, constants)
        weights.update(node.input[1:RESIDUAL])
        for name in _names(fused.name):
            writer = Writer(name)
            fused.write(writer, opset, node.input[0], node.output[0], _padded(node.input)[RESIDUAL])
            new = {made.name for made in writer.nodes} | {tensor.name for tensor in writer.initializers}
            new.update(t for made in writer.nodes for t in made.output if t != node.output[0])
            if not new & taken:
                break
        taken.update(new)
        return writer.nodes, writer.initializers

    for graph in reversed(graphs):  # inner ones first: replacing a graph's nodes copies their subgraphs
        replace_nodes(graph, lowered)
    drop_unread(copy.graph, weights)
    if not any(node.domain == DOMAIN for node in nodes_of(copy.graph)):
        for entries in (copy.opset_import, copy.functions):
            replace_items(entries, [entry for entry in entries if entry.domain != DOMAIN])
    return copy


def _standard_opset(proto: onnx.ModelProto) -> int:
    """Return the version of a model's standard operators, which is added if the model names none."""
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is None:  # nothing but fused operators
        opset = onnx.defs.onnx_opset_version()
        proto.opset_import.append(helper.make_opsetid("", opset))
    return opset


def _names(name: str) -> Iterator[str]:
    return chain([name], (f"{name}_{i}" for i in count(2)))


def add_fallbacks(proto: onnx.ModelProto) -> None:
    """Give every fused operator of a model its own function, in place of existing ones."""
    replace_items(proto.functions, [f for f in proto.functions if (f.domain, f.name) != (DOMAIN, OPERATOR)])
    graphs = list(graphs_of(proto.graph))
    nodes = [node for graph in graphs for node in graph.node if is_fused(node)]
    if not nodes:
        return
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    opset, constants = _standard_opset(proto), constants_of(graphs)

    def add(name: str, inputs: Sequence[str], body: Nodes) -> None:
        versions = [helper.make_opsetid("", opset)]
        proto.functions.append(
            helper.make_function(DOMAIN, OPERATOR, inputs, ["y"], body, versions, overload=name)
        )

    # fails if a runtime uses it: it reads one input more than the operator has
    guard = helper.make_node("Add", ["x", "missing"], ["y"], "this_runtime_cannot_tell_overloads_apart")
    add(FIRST, [*INPUTS, "missing"], [guard])
    taken = {FIRST, LAST}
    for node in nodes:
        fused = _read(node, constants)
        node.overload = next(name for name in _names(fused.name) if name not in taken)
        taken.add(node.overload)
        depthwise, pointwise = (stage.weight for stage in fused.factorization.stages)
        weights = (depthwise, pointwise, fused.factorization.bias, fused.slope)
        body = _Body(node.overload, given=dict(zip(INPUTS[1:RESIDUAL], weights, strict=True)))
        fused.write(body, opset, "x", "y", "residual" if any(node.input[RESIDUAL:]) else "")
        add(node.overload, INPUTS[: len(node.input)], body.nodes)
    add(LAST, [*INPUTS, "missing"], [guard])


@dataclass
class _Body(Writer):
    """Collect a function's nodes; weights are the function's inputs, not constants in it."""

    given: Mapping[str, Array | None] = field(default_factory=dict)

    def constant(self, label: str, array: np.ndarray) -> str:
        return self.node("Constant", label, [], value=numpy_helper.from_array(np.asarray(array, order="C")))

    def weight(self, label: str, array: Array, taken: IntArray | None = None, axis: int = 0) -> str:
        name = next(name for name, given in self.given.items() if given is array)
        if taken is None or np.array_equal(taken, np.arange(array.shape[axis])):
            return name
        return self.node("Gather", label, [name, self.constant(f"{label}.taken", taken)], axis=axis)
