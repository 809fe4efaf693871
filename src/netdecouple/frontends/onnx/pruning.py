"""Remove the channels that nothing reads, with the filters and other constants that belong to them.

Where no reader of a tensor needs some of its channels, the network computes the same without them. The
channels that stay are the fixed point of two passes. Backward, from outputs to inputs: a node needs the input
channels from which its remaining outputs are computed (for a convolution, those with non-zero weights).
Forward: some outputs cannot be removed while their inputs stay (a sum keeps what any of its operands keeps).
Both passes only add channels, so they end. Operators without a rule need and keep all channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from netdecouple.frontends.onnx.channels import Flow, Graph, Link, Mask, Mix
from netdecouple.frontends.onnx.proto import reads

Live = dict[str, Mask]  # the channels that stay, by tensor


def drop_unread_channels(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Remove, in place, every filter whose output nothing reads, and unread initializers.

    ``shapes`` are those of tensors and constants, as far as they are known.
    """
    graph = Graph(proto.graph, shapes)
    graph.live = _fewest(graph)
    for node, flow in zip(proto.graph.node, graph.flows, strict=True):
        graph.cut(node, flow)
    graph.clean()


def _fewest(graph: Graph) -> Live:
    """Find the fewest channels: all of the graph's inputs and outputs, and at least one of other tensors."""
    whole = graph.inputs | graph.outputs
    live = {tensor: np.full(graph.width(tensor), tensor in whole) for tensor in graph.shapes}
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
        live[empty[-1]][0] = True  # the last first: then the tensors it is computed from are not empty


def _need(live: Live, node: onnx.NodeProto, flow: Flow) -> None:
    """Add the channels of its inputs that a node needs to compute its output's live channels."""
    output = live.get(node.output[0])
    for link in flow.links:
        if link.tensor not in live:
            continue
        if isinstance(link, Mix):
            live[link.tensor] |= (link.used if output is None else link.used[output]).any(axis=0)
        else:
            live[link.tensor][link.source if output is None else link.source[output[link.target]]] = True
    for tensor in {*reads(node)} - {link.tensor for link in flow.links}:
        if tensor in live:
            live[tensor][:] = True


def _keep(live: Live, node: onnx.NodeProto, flow: Flow) -> None:
    """Add the output channels that are tied to live channels of the inputs."""
    for link in flow.links:
        if isinstance(link, Link) and link.tied and node.output[0] in live:
            live[node.output[0]][link.target] |= live[link.tensor][link.source]
