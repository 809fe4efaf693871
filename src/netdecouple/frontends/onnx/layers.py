"""Find the layers of an ONNX model that cost MACs, and what each computes, by running a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from netdecouple.convolution import ConvGeometry
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.emission import PRODUCTS
from netdecouple.frontends.onnx.model import DTYPES, OnnxModel
from netdecouple.frontends.onnx.products import has_unknown_weights, product_of
from netdecouple.frontends.onnx.proto import (
    Nodes,
    array_of,
    attributes_of,
    constants_of,
    fixed,
    geometry_of,
    graphs_of,
    nodes_of,
    subgraphs_of,
    up_to,
)
from netdecouple.kernels import OPERATOR
from netdecouple.network import ONE_CHANNEL, Array, Layer
from netdecouple.runtimes.layers import node_name, with_names
from netdecouple.runtimes.onnxruntime import calls_of, run

Shapes = dict[str, tuple[int, ...]]


class Found(NamedTuple):
    """The layers of a model, and what running a sample told of them."""

    layers: tuple[Layer, ...]  # those in the bodies of If, Loop and Scan stand where these do
    nodes: Nodes  # of each layer
    shapes: Shapes  # of the tensors that layers outside of bodies, and all additions, read and write
    mixed: frozenset[str]  # tensors (…, c) in which the rows of all images take turns


def find_layers(model: OnnxModel, sample: Array) -> Found:
    """List every layer that costs MACs, by running ``sample`` (n, c, h, w) a few times.

    Raises:
        ModelError: it fails on the sample, or weights are NaN or Inf.
    """
    graph, feeds = model.proto.graph, model.feeds(sample)
    constants = fixed(graph)
    listed = [product_of(n) is not None or has_unknown_weights(n, constants) for n in graph.node]
    ends = [
        t for n, is_layer in zip(graph.node, listed, strict=True) if is_layer for t in (*n.input, *n.output)
    ]
    ends += [t for n in graph.node if n.op_type == "Add" for t in n.input]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes |= {name: array.shape for name, array in feeds.items()}
    tensors = [t for t in dict.fromkeys(ends) if t and t not in shapes]
    if tensors:  # none if all layers are in bodies
        values = run(model.session(up_to(model.proto, tensors)), tensors, feeds)
        shapes |= {name: tuple(value.shape) for name, value in zip(tensors, values, strict=True)}
    read = [node.input[0] for node in graph.node if _is_product(node, constants)]
    orders = _row_orders(model, sample, read, shapes)
    context = _Context(len(sample), model.has_fixed_size, constants, shapes, orders)
    inner, layers, nodes = _inner_layers(model, sample), [], []
    for index, (node, is_layer) in enumerate(zip(graph.node, listed, strict=True)):
        found = [(_read(node, context), node)] if is_layer else inner.get(index, ())
        layers += [layer for layer, _ in found]
        nodes += [place for _, place in found]
    for la in layers:
        if not all(np.isfinite(array).all() for array in (la.weight, la.bias)):
            raise ModelError(
                f"{model.origin}: the weights of layer {la.name!r} overflow once they are folded"
            )
    return Found(tuple(layers), nodes, shapes, frozenset(t for t, is_mixed in orders.items() if is_mixed))


def _is_product(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node multiplies rows by constant weights."""
    is_weighed = len(node.input) > 1 and node.input[1] in constants
    return node.domain == "" and node.op_type in PRODUCTS and is_weighed


def _row_orders(model: OnnxModel, sample: Array, tensors: Sequence[str], shapes: Shapes) -> dict[str, bool]:
    """Find which rows of tensors (…, c) belong to one image: by tensor, whether the images take turns.

    The rows of one image stand side by side, or the images take turns, as in (time, image, c). Where the rows
    go when the images are turned round tells it. Tensors of which neither is true are left out.
    """
    images = len(sample)
    plain = [t for t in tensors if images == 1 or t == model.input_name or shapes[t][:-1] == (images,)]
    orders = dict.fromkeys(plain, False)
    known = {*orders, *model.given, *fixed(model.proto.graph)}
    asked = [t for t in dict.fromkeys(tensors) if t not in known and math.prod(shapes[t][:-1]) % images == 0]
    if not asked:
        return orders
    session = model.session(up_to(model.proto, asked))
    there, back = (run(session, asked, model.feeds(batch)) for batch in (sample, sample[::-1]))
    for tensor, rows, turned in zip(asked, there, back, strict=True):
        size = np.abs(rows).max(initial=0.0)
        side_by_side, in_turns = (
            np.allclose(by_image(rows, images, mixed)[::-1], by_image(turned, images, mixed), 0, 1e-3 * size)
            for mixed in (False, True)
        )
        if side_by_side != in_turns:
            orders[tensor] = in_turns
    return orders


def by_image(values: Array, images: int, mixed: bool) -> Array:
    """View rows (…, c) of some images as (images, rows, c)."""
    if mixed:
        return values.reshape(-1, images, values.shape[-1]).swapaxes(0, 1)
    return values.reshape(images, -1, values.shape[-1])


def _inner_layers(model: OnnxModel, sample: Array) -> dict[int, list[tuple[Layer, onnx.NodeProto]]]:
    """List the layers in the bodies of If, Loop and Scan, by the place of the node that has the body.

    The MACs are those of all calls in one run, none in a branch that was not taken.
    """
    bodies = list(graphs_of(model.proto.graph))[1:]
    if not any(product_of(node) for graph in bodies for node in graph.node):
        return {}
    named = with_names(model.proto)
    calls = calls_of(named, model.feeds(sample), model.custom_ops)
    constants = constants_of(list(graphs_of(named.graph)))
    layers: dict[int, list[tuple[Layer, onnx.NodeProto]]] = {}
    for index, owner in enumerate(named.graph.node):
        for node in (node for graph in subgraphs_of(owner) for node in nodes_of(graph)):
            if (product := product_of(node)) is None:
                continue
            macs = sum(
                product.macs(node, _aligned(node.input, inputs), _aligned(node.output, outputs))
                for inputs, outputs in calls.get(node.name, ())
            )
            parameters = sum(math.prod(constants[t].dims) for t in node.input if t in constants)
            reason = (
                f"in the body of {owner.op_type} {owner.name!r}; export the model without {owner.op_type}"
            )
            layer = Layer(node.name, node.op_type, macs // len(sample), parameters, reason=reason)
            layers.setdefault(index, []).append((layer, node))
    return layers


def _aligned(names: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Put () in the places of tensors that are left out, which have no names and no shapes."""
    given = iter(shapes)
    return [next(given, ()) if name else () for name in names]


class _Context(NamedTuple):
    """What is known of the graph in which a layer is."""

    images: int  # in the sample
    has_fixed_size: bool
    constants: dict[str, onnx.TensorProto]
    shapes: Shapes
    orders: Mapping[str, bool]  # of the rows of tensors (…, c), see `_row_orders`


def _read(node: onnx.NodeProto, context: _Context) -> Layer:
    product, shapes, constants = product_of(node), context.shapes, context.constants
    macs, reason = 0, f"an operator of {node.domain}, whose MACs are not known"
    if product is not None:
        inputs, outputs = ([shapes.get(t, ()) for t in tensors] for tensors in (node.input, node.output))
        macs, reason = product.macs(node, inputs, outputs) // context.images, product.reason
    if node.domain == "" and node.op_type == "Conv":
        return _read_conv(node, context, macs)
    if _is_product(node, constants):
        return _read_matmul(node, context, macs)
    if node.op_type in PRODUCTS and node.input[0] in constants:
        reason = "its weights are on the left"
    weights = (
        node.input[:4] if node.op_type == OPERATOR else node.input
    )  # not an activation's that it took over
    parameters = sum(math.prod(constants[t].dims) for t in weights if t in constants)
    return Layer(node_name(node), node.op_type, macs, parameters, reason=reason)


def _read_conv(node: onnx.NodeProto, context: _Context, macs: int) -> Layer:
    images, has_fixed_size, constants, shapes, _ = context
    maps, _, *spatial = shapes[node.input[0]]
    kernel, out = shapes[node.input[1]], shapes[node.output[0]]
    has_bias = any(node.input[2:])
    parameters = math.prod(kernel) + (out[1] if has_bias else 0)
    layer = partial(Layer, node_name(node), node.op_type, macs, parameters)
    if any(t not in constants for t in node.input[1:] if t):
        return layer(reason="its weights are computed, not constant")
    if maps != images:
        return layer(reason="it does not see one map per image")
    if len(spatial) != 2:
        return layer(reason=f"{len(spatial)}-D convolution")
    weight = numpy_helper.to_array(constants[node.input[1]])
    if weight.dtype not in DTYPES:
        return layer(reason=f"its weights are {weight.dtype}, not float32 or float16")
    attributes = attributes_of(node)
    auto = attributes.get("auto_pad", b"NOTSET").decode()
    if auto != "NOTSET":
        attributes["pads"] = (0, 0, 0, 0)
    n_o, n_i, *size = kernel
    geometry = geometry_of(n_o, n_i * attributes.get("group", 1), size, attributes)
    if auto.startswith("SAME"):
        geometry = replace(geometry, pads=_same_pads(geometry, spatial, auto))
    bias = numpy_helper.to_array(constants[node.input[2]]) if has_bias else np.zeros(n_o, np.float32)
    reason = ""
    if geometry.is_depthwise:
        reason = "depthwise convolution" if geometry.n_i > 1 else ONE_CHANNEL
    elif min(geometry.pads) < 0:
        reason = "negative padding"
    elif auto.startswith("SAME") and not has_fixed_size and max(geometry.strides) > 1:
        reason = f"its padding ({auto}) depends on the image size, which is dynamic"
    return layer(geometry, weight, bias, (spatial[0], spatial[1]), reason)


def _same_pads(g: ConvGeometry, size: list[int], mode: str) -> tuple[int, int, int, int]:
    """Compute the pads of auto_pad SAME_*: an odd pixel is last (UPPER) or first."""
    n, s, d, k = map(np.array, (size, g.strides, g.dilations, (g.kh, g.kw)))
    total = np.maximum((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
    begin = total // 2 if mode == "SAME_UPPER" else total - total // 2
    return tuple(np.concatenate([begin, total - begin]).tolist())


def _read_matmul(node: onnx.NodeProto, context: _Context, macs: int) -> Layer:
    images, _, constants, shapes, orders = context
    rows, kernel, shape = (shapes[t] for t in (*node.input[:2], node.output[0]))
    attributes = attributes_of(node)
    is_turned = bool(attributes.get("transB", 0))
    added = node.input[2] if len(node.input) > 2 else ""
    parameters = math.prod(kernel) + math.prod(shapes.get(added, (0,)))
    layer = partial(Layer, node_name(node), node.op_type, macs, parameters)
    weight, bias = numpy_helper.to_array(constants[node.input[1]]), array_of(constants, node, 2)
    scales = [name for name in ("alpha", "beta") if attributes.get(name, 1.0) != 1]
    bias_shape = () if bias is None else bias.shape
    allowed = ((), (1,), (1, 1), shape[1:], (1, *shape[1:]))
    reasons = {
        "its input is transposed": attributes.get("transA", 0),
        f"its {' and '.join(scales)} {'is' if len(scales) == 1 else 'are'} not 1": scales,
        "its rows do not belong to one image each": node.input[0] not in orders,
        f"its weights have {len(kernel)} axes, not 2": len(kernel) != 2,
        "its bias is computed, not constant": added and bias is None,
        f"its bias {bias_shape} is not one number per output": bias_shape not in allowed,
        f"its weights are {weight.dtype}, not float32 or float16": weight.dtype not in DTYPES,
    }
    if reason := next((text for text, applies in reasons.items() if applies), ""):
        return layer(reason=reason)
    weight = weight if is_turned else weight.T
    n_o, n_i = weight.shape
    bias = np.zeros(n_o, np.float32) if bias is None else np.broadcast_to(bias.ravel(), n_o)
    size = (math.prod(rows[:-1]) // images, 1)
    return layer(ConvGeometry(n_o, n_i, 1, 1), weight.reshape(n_o, n_i, 1, 1), bias, size, is_linear=True)
