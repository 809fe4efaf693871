"""Add functions to a model that define its fused operators, for runtimes that do not have the operator.

Where the operator is registered, a runtime uses it and ignores the functions; elsewhere it replaces the nodes
by the functions' bodies, which are standard operators. The weights are in the file once: the functions select
what they need from the operators' inputs, and runtimes compute that once, when they open the file.

The functions differ by their ``overload`` only, which ONNX Runtime supports from 1.27 on. Older versions use
the last function for every node without a warning; so the first and the last are functions that they refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count

import numpy as np
import onnx
from onnx import helper, numpy_helper

from netdecouple.convolution import Array, IntArray
from netdecouple.frontends.onnx.emission import Writer
from netdecouple.frontends.onnx.lowering import Fused, is_fused, read_fused, standard_opset
from netdecouple.frontends.onnx.proto import constants_of, graphs_of, replace_items
from netdecouple.kernels import DOMAIN, OPERATOR

IR_VERSION = 10  # the first with overloads of functions
FIRST, LAST = ("first: overloads needed", "last: overloads needed")  # overloads that no node has
_FUSED = (DOMAIN, OPERATOR)
INPUTS = ("x", "depthwise", "pointwise", "bias", "slope", "residual")


def add_fallbacks(proto: onnx.ModelProto) -> None:
    """Give every fused operator of a model its own function, in place of existing ones.

    Raises:
        ModelError: an operator's weights are not constant, or do not fit each other.
    """
    replace_items(proto.functions, [f for f in proto.functions if (f.domain, f.name) != _FUSED])
    graphs = list(graphs_of(proto.graph))
    nodes = [node for graph in graphs for node in graph.node if is_fused(node)]
    if not nodes:
        return
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    opset, constants = standard_opset(proto), constants_of(graphs)
    taken = {FIRST, LAST}
    proto.functions.append(_guard(FIRST, opset))
    for node in nodes:
        fused = read_fused(node, constants)
        name = next(n for n in chain([fused.name], (f"{fused.name}_{i}" for i in count(2))) if n not in taken)
        taken.add(name)
        node.overload = name
        proto.functions.append(_function(fused, name, len(node.input), opset))
    proto.functions.append(_guard(LAST, opset))


@dataclass
class _Body(Writer):
    """Collect a function's nodes; weights are the function's inputs, not constants in it."""

    given: Mapping[str, Array | None] = field(default_factory=dict)

    def constant(self, label: str, array: np.ndarray) -> str:
        return self.node("Constant", label, [], value=numpy_helper.from_array(np.asarray(array, order="C")))

    def weight(self, label: str, array: Array, taken: IntArray | None = None, axis: int = 0) -> str:
        name = next(name for name, given in self.given.items() if given is array)
        if taken is None or np.array_equal(taken, np.arange(array.shape[axis])):
            return name
        return self.node("Gather", label, [name, self.constant(f"{label}.taken", taken)], axis=axis)


def _function(fused: Fused, name: str, inputs: int, opset: int) -> onnx.FunctionProto:
    depthwise, pointwise = (stage.weight for stage in fused.factorization.stages)
    weights = {
        "depthwise": depthwise,
        "pointwise": pointwise,
        "bias": fused.factorization.bias,
        "slope": fused.slope,
    }
    body = _Body(name, given=weights)
    replace(fused, x="x", output="y", residual="residual" if fused.residual else "").write(body, opset)
    return helper.make_function(
        *_FUSED, INPUTS[:inputs], ["y"], body.nodes, [helper.make_opsetid("", opset)], overload=name
    )


def _guard(name: str, opset: int) -> onnx.FunctionProto:
    """Make a function that fails if a runtime uses it: it reads one input more than the operator has."""
    inputs = [*INPUTS, "missing"]
    node = helper.make_node("Add", ["x", "missing"], ["y"], "this_runtime_cannot_tell_overloads_apart")
    return helper.make_function(
        *_FUSED, inputs, ["y"], [node], [helper.make_opsetid("", opset)], overload=name
    )
