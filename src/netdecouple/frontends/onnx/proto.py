"""Traverse and edit the protobuf messages of an ONNX model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netdecouple.convolution import ConvGeometry
from netdecouple.runtimes.onnxfile import with_graph

Nodes = list[onnx.NodeProto]
Tensors = list[onnx.TensorProto]
Constants = Mapping[str, onnx.TensorProto]
_SPATIAL = ("strides", "pads", "dilations")


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph, then its subgraphs, such as the branches of an If, at every depth."""
    yield graph
    for node in graph.node:
        for inner in subgraphs_of(node):
            yield from graphs_of(inner)


def subgraphs_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the subgraphs of a node, such as the branches of an If, and none of theirs."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of a graph, those of its subgraphs included."""
    for inner in graphs_of(graph):
        yield from inner.node


def names_of(graph: onnx.GraphProto) -> set[str]:
    """Return every name in a graph: of nodes and of tensors, those of its subgraphs included."""
    names = {name for node in nodes_of(graph) for name in (node.name, *node.input, *node.output)}
    return names | {tensor.name for inner in graphs_of(graph) for tensor in inner.initializer}


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every tensor that a node reads, those that its subgraphs read included."""
    yield from (t for t in node.input if t)
    for graph in subgraphs_of(node):
        for inner in graph.node:
            yield from reads(inner)
        yield from (value.name for value in graph.output)


def readers_of(nodes: Iterable[onnx.NodeProto]) -> dict[str, Nodes]:
    """List, for every tensor, the nodes that read it: a node that reads it twice is listed twice."""
    readers: dict[str, Nodes] = {}
    for node in nodes:
        for tensor in reads(node):
            readers.setdefault(tensor, []).append(node)
    return readers


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def constants_of(graphs: Sequence[onnx.GraphProto]) -> dict[str, onnx.TensorProto]:
    """Return the initializers and the values of Constant nodes, by name."""
    constants = {tensor.name: tensor for graph in graphs for tensor in graph.initializer}
    for node in (node for graph in graphs for node in graph.node if node.op_type == "Constant"):
        constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return constants


def fixed(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the initializers, by name, that are no default values of inputs."""
    inputs = {value.name for value in graph.input}
    return {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}


def array_of(constants: Constants, node: onnx.NodeProto, index: int) -> NDArray[Any] | None:
    """Return a constant input of a node; None if it is missing or computed."""
    name = node.input[index] if index < len(node.input) else ""
    return numpy_helper.to_array(constants[name]) if name in constants else None


def geometry_of(n_o: int, n_i: int, kernel: Sequence[int], attributes: Mapping[str, Any]) -> ConvGeometry:
    """Read the geometry of a 2-D convolution from its node's attributes."""
    kh, kw = kernel
    given: dict[str, Any] = {name: tuple(attributes[name]) for name in _SPATIAL if name in attributes}
    return ConvGeometry(n_o, n_i, kh, kw, groups=attributes.get("group", 1), **given)


def attributes_for(g: ConvGeometry) -> dict[str, Any]:
    """Write the attributes of a convolution's node, except the groups."""
    return {name: list(getattr(g, name)) for name in _SPATIAL}


def replace_items(field: Any, items: Iterable[Any]) -> None:
    """Replace the messages of a repeated field; the new ones may come from the field itself."""
    kept = list(items)
    del field[:]
    field.extend(kept)


def replace_nodes(
    graph: onnx.GraphProto, replacement: Callable[[onnx.NodeProto], tuple[Nodes, Tensors] | None]
) -> None:
    """Put others in the place of nodes; ``replacement`` returns None for nodes that stay as they are."""
    nodes: Nodes = []
    for node in graph.node:
        new, initializers = replacement(node) or ([node], [])
        nodes += new
        graph.initializer.extend(initializers)
    replace_items(graph.node, nodes)


def remove_named(field: Any, names: Collection[str]) -> None:
    """Remove messages by name from a repeated field, in place: those that stay may be too large to copy."""
    for index in reversed(range(len(field))):
        if field[index].name in names:
            del field[index]


def drop_unread(graph: onnx.GraphProto, among: Collection[str] | None = None) -> None:
    """Remove initializers that nothing reads, in subgraphs too; only those in ``among``, if given."""
    graphs = list(graphs_of(graph))
    read = {t for inner in graphs for node in inner.node for t in node.input}
    read |= {value.name for inner in graphs for value in inner.output}
    for inner in graphs:
        unread = {t.name for t in inner.initializer} - read
        unread &= unread if among is None else set(among)
        remove_named(inner.initializer, unread)
        remove_named(inner.input, unread)  # before IR 4, initializers are inputs too


def drop_unread_nodes(graph: onnx.GraphProto) -> Nodes:
    """Remove the nodes that no output needs, with their constants; return them."""
    kept, _ = nodes_for(graph.node, (value.name for value in graph.output))
    needed = {id(node) for node in kept}
    dropped = [node for node in graph.node if id(node) not in needed]
    if dropped:
        replace_items(graph.node, kept)
        drop_unread(graph)
    return dropped


def nodes_for(nodes: Sequence[onnx.NodeProto], tensors: Iterable[str]) -> tuple[Nodes, set[str]]:
    """Return the nodes that compute some tensors, and all tensors that are needed for them."""
    kept, needed = [], set(tensors)
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(reads(node))
    return kept[::-1], needed


def up_to(proto: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """Copy the part of a model that computes some of its tensors, with those as its only outputs."""
    outputs = [onnx.ValueInfoProto(name=t) for t in tensors]
    nodes, needed = nodes_for(proto.graph.node, (value.name for value in outputs))
    needed |= {value.name for value in proto.graph.input}  # which have default values
    initializers = (t for t in proto.graph.initializer if t.name in needed)
    return with_graph(proto, nodes, proto.graph.input, outputs, initializers)
