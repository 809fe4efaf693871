"""Replace fused operators by standard ones, for runtimes that do not have the fused operator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from netdecouple.convolution import Array, ConvGeometry, ConvStage, Factorization
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.emission import Writer, write
from netdecouple.frontends.onnx.proto import (
    attributes_of,
    constants_of,
    drop_unread,
    graphs_of,
    nodes_of,
    replace_items,
)
from netdecouple.kernels import DOMAIN, OPERATOR
from netdecouple.runtimes.onnxfile import copy_of

Constants = Mapping[str, onnx.TensorProto]


def lower(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every fused operator written as standard operators, in the "parallel" form.

    Raises:
        ModelError: an operator's weights are not constant, or do not fit each other.
    """
    copy = copy_of(proto)
    opset = standard_opset(copy)
    graphs = list(graphs_of(copy.graph))
    names = {
        name for graph in graphs for node in graph.node for name in (node.name, *node.input, *node.output)
    }
    names.update(tensor.name for graph in graphs for tensor in graph.initializer)
    constants = constants_of(graphs)
    weights: set[str] = set()
    for graph in reversed(graphs):  # inner ones first: replacing a graph's nodes copies their subgraphs
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if not is_fused(node):
                nodes.append(node)
                continue
            new, initializers = _named(read_fused(node, constants), names, opset)
            nodes += new
            graph.initializer.extend(initializers)
            weights.update(node.input[1:5])
        replace_items(graph.node, nodes)
    drop_unread(copy.graph, weights)
    if not any(node.domain == DOMAIN for node in nodes_of(copy.graph)):
        for field in (copy.opset_import, copy.functions):
            replace_items(field, [entry for entry in field if entry.domain != DOMAIN])
    return copy


def is_fused(node: onnx.NodeProto) -> bool:
    """Whether this is a fused operator."""
    return node.domain == DOMAIN and node.op_type == OPERATOR


def standard_opset(proto: onnx.ModelProto) -> int:
    """Return the version of a model's standard operators, which is added if the model names none."""
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is None:  # nothing but fused operators
        opset = onnx.defs.onnx_opset_version()
        proto.opset_import.append(helper.make_opsetid("", opset))
    return opset


def _named(fused: Fused, names: set[str], opset: int) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Write standard operators under names that are not in ``names``, and add theirs."""
    for name in chain([fused.name], (f"{fused.name}_{i}" for i in count(2))):
        writer = Writer(name)
        fused.write(writer, opset)
        new = {node.name for node in writer.nodes} | {tensor.name for tensor in writer.initializers}
        new.update(t for node in writer.nodes for t in node.output if t != fused.output)
        if not new & names:
            break
    names |= new
    return writer.nodes, writer.initializers


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


def read_fused(node: onnx.NodeProto, constants: Constants) -> Fused:
    """Read a fused operator.

    Raises:
        ModelError: its weights are not constant, or do not fit each other.
    """
    name = node.name or node.output[0]
    values = attributes_of(node)
    inputs = [*node.input, *[""] * (6 - len(node.input))]
    for tensor in inputs[1:5]:
        if tensor and tensor not in constants:
            raise ModelError(f"layer {name!r}: its weight {tensor!r} is computed, not constant")
    try:
        depthwise, pointwise, bias = (numpy_helper.to_array(constants[t]) for t in inputs[1:4])
        slope = numpy_helper.to_array(constants[inputs[4]]) if inputs[4] else None
        rows, _, kh, kw = depthwise.shape
        n_o, channels = len(pointwise), np.array(values["channels"], np.int64)
        g = ConvGeometry(
            n_o,
            values["in_channels"],
            kh,
            kw,
            tuple(values.get("strides", (1, 1))),
            tuple(values.get("pads", (0, 0, 0, 0))),
            tuple(values.get("dilations", (1, 1))),
            values.get("group", 1),
        )
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
        inputs[5],
        values.get("minimum", -math.inf),
        values.get("maximum", math.inf),
    )
