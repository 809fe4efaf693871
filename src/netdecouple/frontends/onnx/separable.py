"""Replace depthwise convolutions and the 1×1 convolutions behind them by fused operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, shape_inference

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.frontends.onnx.emission import emit
from netdecouple.frontends.onnx.fused import absorb, add_fallbacks
from netdecouple.frontends.onnx.proto import (
    Nodes,
    Tensors,
    array_of,
    attributes_of,
    constants_of,
    drop_unread,
    geometry_of,
    nodes_for,
    readers_of,
    replace_items,
    replace_nodes,
)
from netdecouple.runtimes.onnxfile import copy_of


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
        stages = (
            ConvStage(
                replace(depthwise, n_i=terms, groups=terms),
                filters,
                (reads % shape[1]).repeat(terms // depthwise.n_i),
            ),
            ConvStage(pointwise, points),
        )
        whole = replace(depthwise, n_o=pointwise.n_o, n_i=shape[1], groups=1)
        matrix = np.asarray(points[:, :, 0, 0], np.float64)
        return Factorization(whole, stages, (bias + matrix @ inner).astype(np.float32)), x
