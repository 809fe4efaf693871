"""Merge the addition of a shortcut, the activation and the clipping into the fused operator before them.

The operator computes ``clamp(prelu(conv + bias + residual))``: it absorbs, in this order, an Add, a LeakyRelu
or PRelu, and a Relu or Clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from netdecouple.frontends.onnx.lowering import is_fused
from netdecouple.frontends.onnx.proto import readers_of, replace_items

SLOPE, RESIDUAL = 4, 5  # positions of the optional inputs


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
    inputs = [*node.input, *[""] * (RESIDUAL + 1 - len(node.input))]
    clipped = any(a.name in ("minimum", "maximum") for a in node.attribute)
    limits: dict[str, float] = {}
    if clipped or follower.domain not in ("", "ai.onnx"):
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
    elif follower.op_type == "Relu":
        limits = {"minimum": 0.0}
    elif follower.op_type == "Clip":
        bounds = _limits(follower, constants)
        if bounds is None:
            return False
        limits = bounds
    else:
        return False
    while not inputs[-1]:
        inputs.pop()
    node.input[:] = inputs
    node.output[0] = follower.output[0]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in limits.items())
    return True


def _slope(
    node: onnx.NodeProto, channels: int, constants: Mapping[str, onnx.TensorProto]
) -> np.ndarray | None:
    """Factors of negative values, one per channel."""
    if node.op_type == "LeakyRelu":
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 0.01)
        return np.full(channels, alpha, np.float32)
    if node.input[1] not in constants:
        return None
    slope = numpy_helper.to_array(constants[node.input[1]])
    per_channel = slope.size == 1 or (slope.size == channels and slope.shape[-3:] == (channels, 1, 1))
    return np.broadcast_to(slope.ravel(), channels).astype(np.float32) if per_channel else None


def _limits(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> dict[str, float] | None:
    """What a Clip clips to: constant inputs, or attributes before opset 11."""
    limits = {f"{a.name}imum": a.f for a in node.attribute if a.name in ("min", "max")}
    for name, tensor in zip(("minimum", "maximum"), node.input[1:], strict=False):
        if tensor and tensor not in constants:
            return None
        if tensor:
            limits[name] = numpy_helper.to_array(constants[tensor]).item()
    return None if any(math.isnan(limit) for limit in limits.values()) else limits
