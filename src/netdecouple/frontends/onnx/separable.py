"""Replace depthwise convolutions and the 1×1 convolutions behind them by fused operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.frontends.onnx.emission import emit
from netdecouple.frontends.onnx.fallback import add_fallbacks
from netdecouple.frontends.onnx.fusion import absorb
from netdecouple.frontends.onnx.proto import (
    attributes_of,
    constants_of,
    drop_unread,
    readers_of,
    replace_items,
)
from netdecouple.kernels import DOMAIN
from netdecouple.runtimes.onnxfile import copy_of


def fuse_separable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with every separable pair of convolutions as one fused operator; it computes the same.

    A pair is a depthwise convolution, with or without a Gather that selects its channels, and a 1×1
    convolution that alone reads it; both have constant float32 weights. What follows a pair (an addition, an
    activation) is part of the operator where that is possible.
    """
    copy = copy_of(proto)
    graph = _Graph(copy.graph)
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        pair = graph.pair(node)
        if pair is None:
            nodes.append(node)
            continue
        factorization, x = pair
        fused, weights = emit(factorization, node.name or node.output[0], x, node.output[0], "fused")
        nodes += fused
        copy.graph.initializer.extend(weights)
    replace_items(copy.graph.node, _that_are_read(nodes, graph.outputs))
    drop_unread(copy.graph)
    if any(node.domain == DOMAIN for node in nodes):
        copy.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        absorb(copy.graph, graph.shapes)
        add_fallbacks(copy)
    return copy


def _that_are_read(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes that an output of the graph depends on."""
    kept: list[onnx.NodeProto] = []
    needed = set(outputs)
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(readers_of([node]))
    return kept[::-1]


@dataclass
class _Graph:
    """What is known about a graph's tensors."""

    proto: onnx.GraphProto
    constants: Mapping[str, onnx.TensorProto] = field(init=False)
    outputs: set[str] = field(init=False)
    shapes: dict[str, tuple[int, ...]] = field(init=False)  # 0 where a size is not fixed

    def __post_init__(self) -> None:
        self.constants = constants_of([self.proto])
        self.outputs = {value.name for value in self.proto.output}
        self._makers = {output: node for node in self.proto.node for output in node.output}
        self._readers = readers_of(self.proto.node)
        model = helper.make_model(self.proto)
        graph = shape_inference.infer_shapes(model).graph
        self.shapes = {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
        }

    def _maker(self, tensor: str, operator: str) -> onnx.NodeProto | None:
        """Return the node that makes a tensor for a single reader, if it is of this kind."""
        node = self._makers.get(tensor)
        alone = len(self._readers.get(tensor, [])) == 1 and tensor not in self.outputs
        return node if node is not None and alone and node.op_type == operator and not node.domain else None

    def _array(self, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
        if index >= len(node.input) or node.input[index] not in self.constants:
            return None
        return numpy_helper.to_array(self.constants[node.input[index]])

    def _convolution(
        self, node: onnx.NodeProto
    ) -> tuple[NDArray[Any], NDArray[np.float64], ConvGeometry] | None:
        """Return weight, bias and geometry of a 2-D convolution with constant float32 weights."""
        weight, attributes = self._array(node, 1), attributes_of(node)
        if weight is None or weight.ndim != 4 or weight.dtype != np.float32 or "auto_pad" in attributes:
            return None
        bias = self._array(node, 2)
        if bias is None and len(node.input) > 2 and node.input[2]:
            return None
        groups = attributes.get("group", 1)
        n_o, n_i, kh, kw = weight.shape
        geometry = ConvGeometry(
            n_o,
            n_i * groups,
            kh,
            kw,
            tuple(attributes.get("strides", (1, 1))),
            tuple(attributes.get("pads", (0, 0, 0, 0))),
            tuple(attributes.get("dilations", (1, 1))),
            groups,
        )
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
        is_plain = pointwise.is_pointwise and pointwise.groups == 1 and pointwise.pads == (0, 0, 0, 0)
        is_pair = is_plain and pointwise.strides == (1, 1) and min(depthwise.pads) >= 0
        if not is_pair or depthwise.groups != depthwise.n_i or depthwise.n_i < 2:
            return None
        x, reads = behind.input[0], np.arange(depthwise.n_i)
        gather = self._maker(x, "Gather")
        if gather is not None and attributes_of(gather).get("axis", 0) == 1:
            channels = self._array(gather, 1)
            if channels is not None and channels.ndim == 1:
                x, reads = gather.input[0], channels.astype(np.int64)
        shape = self.shapes.get(x, ())
        if len(shape) != 4 or shape[1] <= 0:
            return None
        terms, g = depthwise.n_o, depthwise
        whole = ConvGeometry(pointwise.n_o, shape[1], g.kh, g.kw, g.strides, g.pads, g.dilations)
        stage = ConvGeometry(terms, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, terms)
        stages = (
            ConvStage(stage, filters, (reads % shape[1]).repeat(terms // depthwise.n_i)),
            ConvStage(pointwise, points),
        )
        matrix = np.asarray(points[:, :, 0, 0], np.float64)
        return Factorization(whole, stages, (bias + matrix @ inner).astype(np.float32)), x
