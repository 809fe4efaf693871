"""The fused operator in ONNX graphs: absorb what follows it, read it, and express it by standard operators.

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
from itertools import chain, count
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from netdecouple.convolution import Array, ConvGeometry, ConvStage, Factorization, IntArray
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.emission import Writer, write
from netdecouple.frontends.onnx.proto import (
    Constants,
    Nodes,
    Tensors,
    array_of,
    attributes_of,
    constants_of,
    drop_unread,
    geometry_of,
    graphs_of,
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


def absorb(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Merge what follows every fused operator into it, in place.

    A node is absorbed if it alone reads the operator's output; an output of the graph stays as it is.

    Args:
        graph: is changed.
        shapes: of tensors, as far as they are known.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
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
class Fused:
    """All that a fused operator computes."""

    name: str
    factorization: Factorization
    x: str
    output: str
    slope: Array | None
    residual: str
    minimum: float
    maximum: float

    def write(self, writer: Writer, opset: int) -> None:
        """Add standard operators, in the "parallel" form, that compute the same."""
        steps: list[tuple[str, list[str], dict[str, Any]]] = []
        if self.residual:
            steps.append(("Add", [self.residual], {}))
        if self.slope is not None and (self.slope == self.slope[0]).all():
            steps.append(("LeakyRelu", [], {"alpha": float(self.slope[0])}))
        elif self.slope is not None:
            each = np.arange(len(self.slope))[:, None, None]  # the shape that PRelu wants
            steps.append(("PRelu", [writer.weight("slope", self.slope, each)], {}))
        limits = {"min": self.minimum, "max": self.maximum}
        finite = {label: limit for label, limit in limits.items() if math.isfinite(limit)}
        if finite == {"min": 0.0}:
            steps.append(("Relu", [], {}))
        elif finite and opset < 11:
            steps.append(("Clip", [], finite))
        elif finite:
            bounds = [
                writer.constant(k, np.array(v, np.float32)) if k in finite else "" for k, v in limits.items()
            ]
            steps.append(("Clip", bounds[: 1 + ("max" in finite)], {}))

        tensors = [f"{writer.name}/{operator.lower()}_input" for operator, *_ in steps] + [self.output]
        write(writer, self.factorization, self.x, tensors[0])
        for (operator, inputs, attributes), x, y in zip(steps, tensors[:-1], tensors[1:], strict=True):
            writer.node(operator, operator.lower(), [x, *inputs], y, **attributes)


def _read(node: onnx.NodeProto, constants: Constants) -> Fused:
    """Read a fused operator.

    Raises:
        ModelError: its weights are not constant, or do not fit each other.
    """
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
    return Fused(
        name.removesuffix("/fused"),
        Factorization(g, (first, second), bias),
        inputs[0],
        node.output[0],
        slope,
        inputs[RESIDUAL],
        values.get("minimum", -math.inf),
        values.get("maximum", math.inf),
    )


def lower(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every fused operator written as standard operators, in the "parallel" form.

    Raises:
        ModelError: an operator's weights are not constant, or do not fit each other.
    """
    copy = copy_of(proto)
    opset = _standard_opset(copy)
    graphs = list(graphs_of(copy.graph))
    taken = {name for node in nodes_of(copy.graph) for name in (node.name, *node.input, *node.output)}
    taken.update(tensor.name for graph in graphs for tensor in graph.initializer)
    constants = constants_of(graphs)
    weights: set[str] = set()

    def lowered(node: onnx.NodeProto) -> tuple[Nodes, Tensors] | None:
        if not is_fused(node):
            return None
        fused = _read(node, constants)
        weights.update(node.input[1:RESIDUAL])
        for name in _names(fused.name):
            writer = Writer(name)
            fused.write(writer, opset)
            new = {node.name for node in writer.nodes} | {tensor.name for tensor in writer.initializers}
            new.update(t for node in writer.nodes for t in node.output if t != fused.output)
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
    """Give every fused operator of a model its own function, in place of existing ones.

    Raises:
        ModelError: an operator's weights are not constant, or do not fit each other.
    """
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
        local = replace(fused, x="x", output="y", residual="residual" if fused.residual else "")
        local.write(body, opset)
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
