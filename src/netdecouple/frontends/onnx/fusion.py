"""Let fused operators take over what follows them: the addition of a shortcut, the activation, the clipping.

The operator computes ``clamp(prelu(conv + bias + residual))``, so that what is absorbed is, in this order,
an Add, a LeakyRelu or PRelu, and a Relu or Clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from netdecouple.frontends.onnx.lowering import is_fused
from netdecouple.frontends.onnx.model import reads

SLOPE, RESIDUAL = 4, 5  # positions of the optional inputs


def absorb(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Merge what follows every fused operator into it, in place. ``shapes`` are the tensors' shapes.

    Only what reads the operator's output alone is absorbed; an output of the graph stays as it is.
    """
    nodes = list(graph.node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kept = {value.name for value in graph.output}
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        for tensor in reads(node):
            readers.setdefault(tensor, []).append(index)
    dropped: set[int] = set()
    # one in the middle of a chain of stages has no known shape, and nothing to absorb
    for index in [i for i, n in enumerate(nodes) if is_fused(n) and n.output[0] in shapes]:
        at, shape = index, shapes[nodes[index].output[0]]
        while (output := nodes[at].output[0]) not in kept and len(readers.get(output, [])) == 1:
            follower = readers[output][0]
            merged = _merged(nodes[at], nodes[follower], shape, shapes, constants)
            if merged is None:
                break
            # the operator moves to where what it absorbed was: everything that one reads is known there
            nodes[follower] = merged
            dropped.add(at)
            at = follower
    left = [node for index, node in enumerate(nodes) if index not in dropped]
    del graph.node[:]
    graph.node.extend(left)
    known = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(tensor for name, tensor in constants.items() if name not in known)


def _merged(
    node: onnx.NodeProto,
    follower: onnx.NodeProto,
    shape: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    constants: dict[str, onnx.TensorProto],
) -> onnx.NodeProto | None:
    """Return ``node`` with ``follower`` in it, or None if it cannot do what that does."""
    inputs = [*node.input, *[""] * (RESIDUAL + 1 - len(node.input))]
    clipped = any(a.name in ("minimum", "maximum") for a in node.attribute)
    limits: dict[str, float] = {}
    if clipped or follower.domain not in ("", "ai.onnx"):
        return None
    if follower.op_type == "Add" and not inputs[RESIDUAL] and not inputs[SLOPE]:
        other = next((t for t in follower.input if t != node.output[0]), None)
        if other is None or other in constants or shapes.get(other) != shape:
            return None
        inputs[RESIDUAL] = other
    elif follower.op_type in ("LeakyRelu", "PRelu") and not inputs[SLOPE]:
        slope = _slope(follower, shape[1], constants)
        if slope is None:
            return None
        inputs[SLOPE] = f"{node.name}.slope"
        constants[inputs[SLOPE]] = numpy_helper.from_array(slope, inputs[SLOPE])
    elif follower.op_type == "Relu":
        limits = {"minimum": 0.0}
    elif follower.op_type == "Clip":
        found = _limits(follower, constants)
        if found is None:
            return None
        limits = found
    else:
        return None
    while not inputs[-1]:
        inputs.pop()
    merged: onnx.NodeProto = onnx.NodeProto.FromString(node.SerializeToString())
    merged.input[:] = inputs
    merged.output[0] = follower.output[0]
    merged.attribute.extend(helper.make_attribute(name, value) for name, value in limits.items())
    return merged


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
