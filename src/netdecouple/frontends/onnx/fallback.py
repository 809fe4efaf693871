"""Let a file with fused operators run where nobody knows them: each comes with a function that defines it.

Where the operator is registered, a runtime uses that and ignores the functions; elsewhere it puts their
bodies, standard operators, in the place of the nodes. The weights are in the file once: the functions take
what they need of the operators' own, which runtimes do when they open the file.

The functions differ by their ``overload`` only, which ONNX Runtime heeds from 1.27 on. Before, it takes the
last function there is for every node, without a word; so the first and the last are ones that it refuses.
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
from netdecouple.frontends.onnx.lowering import (
    Fused,
    constants_of,
    graphs_of,
    is_fused,
    read_fused,
    standard_opset,
)
from netdecouple.kernels import DOMAIN, OPERATOR

IR_VERSION = 10  # the first whose functions are told apart by more than their operator
FIRST, LAST = ("first: overloads needed", "last: overloads needed")  # no node's
_OURS = (DOMAIN, OPERATOR)
INPUTS = ("x", "depthwise", "pointwise", "bias", "slope", "residual")


def add_fallbacks(proto: onnx.ModelProto) -> None:
    """Give every fused operator of a model a function of its own, in place of any that are there.

    Raises:
        ModelError: an operator's weights are not constant, or do not fit each other.
    """
    functions = [function for function in proto.functions if (function.domain, function.name) != _OURS]
    kept = [onnx.FunctionProto.FromString(function.SerializeToString()) for function in functions]
    del proto.functions[:]
    proto.functions.extend(kept)
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
    """A function's nodes in the making; it holds no weights, but is given them."""

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
        *_OURS, INPUTS[:inputs], ["y"], body.nodes, [helper.make_opsetid("", opset)], overload=name
    )


def _guard(name: str, opset: int) -> onnx.FunctionProto:
    """Make a function that no node means, and that none can be computed by: it reads more than they give."""
    inputs = [*INPUTS, "missing"]
    node = helper.make_node("Add", ["x", "missing"], ["y"], "this_runtime_cannot_tell_overloads_apart")
    return helper.make_function(
        *_OURS, inputs, ["y"], [node], [helper.make_opsetid("", opset)], overload=name
    )
