"""Traversal and editing of protobuf graphs, subgraphs included."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from netdecouple.frontends.onnx.proto import (
    constants_of,
    drop_unread,
    graphs_of,
    nodes_of,
    readers_of,
    reads,
    replace_items,
)


def constant(name: str) -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0])


def nested() -> onnx.GraphProto:
    """An If that reads an initializer of the outer graph, and one of its own."""
    number = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])
    branch = helper.make_graph(
        [helper.make_node("Add", ["outer", "mine"], ["inner"])],
        "branch",
        [],
        [number],
        [constant("mine"), constant("idle")],
    )
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [helper.make_tensor_value_info(t, TensorProto.FLOAT, [1]) for t in ("condition", "unread")]
    outputs = [helper.make_tensor_value_info(t, TensorProto.FLOAT, [1]) for t in ("y", "result")]
    twice = helper.make_node("Mul", ["y", "y"], ["z"])
    initializers = [constant(t) for t in ("outer", "unread", "spare", "result")]
    return helper.make_graph([node, twice], "graph", inputs, outputs, initializers)


def test_subgraphs_are_traversed() -> None:
    """Both branches, with what they read."""
    graph = nested()
    assert [inner.name for inner in graphs_of(graph)] == ["graph", "branch", "branch"]
    assert sorted(node.op_type for node in nodes_of(graph)) == ["Add", "Add", "If", "Mul"]
    assert set(reads(graph.node[0])) == {"condition", "outer", "mine", "inner"}
    assert {"outer", "mine", "idle", "spare"} <= constants_of(list(graphs_of(graph))).keys()


def test_a_node_that_reads_a_tensor_twice_is_listed_twice() -> None:
    readers = readers_of(nested().node)
    assert [node.op_type for node in readers["y"]] == ["Mul", "Mul"]
    assert [node.op_type for node in readers["condition"]] == ["If"]


def test_unread_initializers_are_removed() -> None:
    """With the inputs that declare them; what a subgraph or an output needs stays."""
    graph = nested()
    drop_unread(graph)
    assert [t.name for t in graph.initializer] == ["outer", "result"]
    assert [value.name for value in graph.input] == ["condition"]
    assert {t.name for inner in graphs_of(graph) for t in inner.initializer} == {"outer", "result", "mine"}


def test_unread_initializers_are_removed_by_name() -> None:
    graph = nested()
    drop_unread(graph, {"spare", "outer"})
    assert [t.name for t in graph.initializer] == ["outer", "unread", "result"]


def test_items_are_replaced_by_items_of_the_same_field() -> None:
    graph = nested()
    replace_items(graph.node, reversed(graph.node))
    assert [node.op_type for node in graph.node] == ["Mul", "If"]
