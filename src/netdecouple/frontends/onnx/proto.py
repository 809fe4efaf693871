"""Traverse and edit the protobuf messages of an ONNX model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import onnx
from onnx import helper

from netdecouple.runtimes.onnxfile import with_graph


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node holds, such as the branches of an If."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph, then its subgraphs at every depth."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs_of(inner)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield every node of a graph, those of its subgraphs included."""
    for inner in graphs_of(graph):
        yield from inner.node


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every tensor that a node reads, those that its subgraphs read included."""
    yield from (t for t in node.input if t)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from reads(inner)
        yield from (value.name for value in graph.output)


def readers_of(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """List, for every tensor, the nodes that read it: a node that reads it twice is listed twice."""
    readers: dict[str, list[onnx.NodeProto]] = {}
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


def replace_items(field: Any, items: Iterable[Any]) -> None:
    """Replace the messages of a repeated field; the new ones may come from the field itself."""
    kept = list(items)
    del field[:]
    field.extend(kept)


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


def up_to(proto: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """Copy the part of a model that computes some of its tensors, with those as its only outputs."""
    outputs = list(tensors)
    needed = set(outputs)
    nodes = []
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(reads(node))
    return with_graph(
        proto,
        nodes[::-1],
        proto.graph.input,
        [onnx.ValueInfoProto(name=t) for t in outputs],
        (t for t in proto.graph.initializer if t.name in needed),
    )
