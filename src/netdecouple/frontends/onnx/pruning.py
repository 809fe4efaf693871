"""Drop the channels that nobody reads: the filters that make them, and all that belongs to them on the way.

Where no reader of a tensor needs some of its channels, the network computes the same without them. Which are
needed goes from the outputs back to the input (a convolution needs what its weights are not zero for); which
can be dropped goes forth (a sum keeps what any of its operands keeps). Both only ever add channels, so that
they come to rest. Operators that are not known need all they read, and keep all they write.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from netdecouple.frontends.onnx.channels import Flow, Graph, Link, Mask, Mix, is_convolution
from netdecouple.frontends.onnx.model import reads

Live = dict[str, Mask]  # which channels of which tensors stay


def drop_unread_channels(
    proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """Drop, in place, every filter whose output is not read; the network computes the same.

    ``shapes`` are those of tensors and constants, as far as they are known. Returns, for every convolution
    that lost filters, by its output: how many it has kept, of how many.
    """
    graph = Graph(proto.graph, shapes)
    graph.live = _settled(graph)
    dropped: dict[str, tuple[int, int]] = {}
    for node, flow in zip(proto.graph.node, graph.flows, strict=True):
        if graph.cut(node, flow) and is_convolution(node):
            live = graph.live[node.output[0]]
            dropped[node.output[0]] = (int(live.sum()), len(live))
    graph.clean()
    return {output: (kept, before) for output, (kept, before) in dropped.items() if kept < before}


def _settled(graph: Graph) -> Live:
    """Find the fewest channels that do: all of the network's inputs and outputs, one at least of the rest."""
    whole = graph.inputs | graph.outputs
    live = {tensor: np.full(graph.width(tensor) or 0, tensor in whole) for tensor in graph.shapes}
    nodes = list(zip(graph.proto.node, graph.flows, strict=True))
    while True:
        before = sum(int(mask.sum()) for mask in live.values())
        for node, flow in reversed(nodes):
            _need(live, node, flow)
        for node, flow in nodes:
            _keep(live, node, flow)
        if sum(int(mask.sum()) for mask in live.values()) > before:
            continue
        empty = [tensor for tensor, mask in live.items() if not mask.any()]
        if not empty:
            return live
        live[empty[-1]][0] = True  # the last first: what that is made of is not empty then


def _need(live: Live, node: onnx.NodeProto, flow: Flow | None) -> None:
    """Add what a node needs, for its output's live channels, of what it reads."""
    output = live.get(node.output[0]) if flow else None
    links = flow.links if flow else ()
    for link in links:
        if link.tensor not in live:
            continue
        if isinstance(link, Mix):
            live[link.tensor] |= (link.used if output is None else link.used[output]).any(axis=0)
        else:
            live[link.tensor][link.source if output is None else link.source[output[link.made]]] = True
    for tensor in {*reads(node)} - {link.tensor for link in links}:
        if tensor in live:
            live[tensor][:] = True


def _keep(live: Live, node: onnx.NodeProto, flow: Flow | None) -> None:
    """Add the outputs that a node makes of live channels whether they are needed or not."""
    for link in flow.links if flow else ():
        if isinstance(link, Link) and link.tied and node.output[0] in live:
            live[node.output[0]][link.made] |= live[link.tensor][link.source]
