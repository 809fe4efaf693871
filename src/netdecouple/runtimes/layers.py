"""Sum profiled times by layer: which nodes of an optimised network belong to which original layer.

ONNX Runtime renames and fuses nodes before it runs them, and its profiler names the nodes that result. A node
belongs to a layer if it has the layer's name, or a name below it (``conv1/depthwise0.2``). In the blocked
layout a convolution is named after the tensor it writes, which is that of the normalisation or the activation
it was fused with. Where a fused operator was replaced by its function, the nodes have the function's names
with a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from netdecouple.runtimes.onnxfile import copy_of

REORDER = "changes of layout"
REST = "rest"
TOTAL = "all nodes"
_FUSED = ("BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSigmoid")
_INLINED = re.compile(r"^_inlfunc_DecoupledConv_(token_\d+_)?")
_BLOCKED = re.compile(r"_nchwc(_token_\d+)?$")


def original_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Leave out names below another one: the stages of a layer that is decoupled in another network."""
    every = tuple(dict.fromkeys(names))
    return tuple(name for name in every if name.rpartition("/")[0] not in every)


@dataclass(frozen=True)
class Owners:
    """The layers that nodes, and the tensors they may write after fusion, belong to."""

    nodes: Mapping[str, str]
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, graph: onnx.GraphProto, layers: Iterable[str]) -> Owners:
        """Assign a graph's nodes and tensors to layers."""
        known = frozenset(layers)
        nodes: dict[str, str] = {}
        tensors: dict[str, str] = {}
        for node in graph.node:
            name = node_name(node)
            layer = next((n for n in (name, name.rpartition("/")[0]) if n in known), None)
            if layer is not None:
                nodes[name] = layer
                if node.overload:  # after which the nodes in its place are named
                    nodes[node.overload] = layer
            elif node.op_type in _FUSED:
                layer = tensors.get(node.input[0])
            if layer is not None:
                tensors[node.output[0]] = layer
        return cls(nodes, tensors)

    def find(self, name: str, operator: str) -> str:
        """Return the layer of a profiled node, or `REORDER` or `REST` if it belongs to none."""
        name = _INLINED.sub("", name)
        layer = self.nodes.get(name) or self.nodes.get(name.rpartition("/")[0])
        if layer is None and _BLOCKED.search(name):
            layer = self.tensors.get(_BLOCKED.sub("", name))
        return layer or (REORDER if operator.startswith("Reorder") else REST)


def node_name(node: onnx.NodeProto) -> str:
    """Return a node's name, or one made from its output, as layers are named."""
    return node.name or f"{node.op_type}:{node.output[0]}"


def with_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model and name every node; the profiler would number nodes without names.

    Nodes of subgraphs are named after the node that has these: loop/body/conv.
    """
    copy = copy_of(model)
    _name(copy.graph, "")
    return copy


def _name(graph: onnx.GraphProto, prefix: str) -> None:
    for node in graph.node:
        node.name = prefix + node_name(node)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _name(inner, f"{node.name}/{attribute.name}/")


def by_layer(times: Mapping[tuple[str, str], float], owners: Owners) -> dict[str, float]:
    """Sum one run's milliseconds by node over every layer, and over all."""
    sums = {TOTAL: sum(times.values())}
    for (name, operator), spent in times.items():
        layer = owners.find(name, operator)
        sums[layer] = sums.get(layer, 0.0) + spent
    return sums
