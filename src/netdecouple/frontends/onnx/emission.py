"""Write a factorization as ONNX nodes.

A depthwise stage with a channel multiplier is written as T parallel depthwise convolutions and a
Concat ("parallel"), which CPU runtimes run faster than the literal form ("gather"): one Gather that
repeats channels and one grouped convolution. "fused" is one node of our own operator
(`netdecouple.kernels`) for every depthwise stage with a pointwise one behind it. Stages of a fully
connected layer are matrix products, whatever the form.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, Literal, get_args

import numpy as np
from onnx import helper, numpy_helper

from netdecouple.convolution import Array, ConvGeometry, ConvStage, Factorization, IntArray
from netdecouple.errors import ModelError, PlanError
from netdecouple.frontends.onnx.proto import Nodes, Tensors, attributes_for
from netdecouple.kernels import DOMAIN, OPERATOR

Form = Literal["parallel", "gather", "fused"]
FORMS: tuple[Form, ...] = get_args(Form)
SINGLE = np.dtype(np.float32)
PRODUCTS = ("Gemm", "MatMul")  # operators of fully connected layers


def form_of(name: str) -> Form:
    """Return the form with this name, or raise PlanError."""
    for form in FORMS:
        if name == form:
            return form
    raise PlanError(f"there is no form {name!r} to write a layer in; make the plan again")


@dataclass
class Writer:
    """Collects nodes and initializers; their names begin with one name, and are none that is taken."""

    name: str
    dtype: np.dtype[Any] = SINGLE  # of the layer's weights, and of its stages'
    taken: Collection[str] = ()  # names in the graph
    nodes: Nodes = field(default_factory=list)
    initializers: Tensors = field(default_factory=list)

    def free(self, label: str) -> str:
        """Return a name for a label."""
        name = f"{self.name}/{label}"
        return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in self.taken)

    def constant(self, label: str, array: np.ndarray) -> str:
        name = self.free(label)
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def weight(self, label: str, array: Array, taken: IntArray | None = None, axis: int = 0) -> str:
        """Add an array of a layer as a constant, or the part of it that is ``taken`` along an axis."""
        part = array if taken is None else array.take(taken, axis)
        with np.errstate(over="ignore"):
            stored = part.astype(self.dtype)
        if not np.isfinite(stored).all():
            raise ModelError(
                f"layer {self.name!r}: its {label} is too large for {self.dtype}; name it with exclude="
            )
        return self.constant(label, stored)

    def node(
        self, operator: str, label: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        output, name = output or self.free(f"{label}_output"), self.free(label)
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name, **attributes))
        return output

    def gather(self, label: str, x: str, channels: IntArray | None) -> str:
        if channels is None:
            return x
        indices = self.constant(f"{label}.channels", channels)
        return self.node("Gather", f"{label}.gather", [x, indices], axis=1)

    def conv(
        self, label: str, inputs: Sequence[str], g: ConvGeometry, bias: Array | None, output: str | None
    ) -> str:
        biases = [] if bias is None else [self.weight(f"{label}.bias", bias)]
        attributes = {"kernel_shape": [g.kh, g.kw], "group": g.groups, **attributes_for(g)}
        return self.node("Conv", label, [*inputs, *biases], output, **attributes)

    def fused(
        self, label: str, x: str, pair: Sequence[ConvStage], n_i: int, bias: Array | None, output: str | None
    ) -> str:
        depthwise, pointwise = pair
        bias = np.zeros(pointwise.geometry.n_o) if bias is None else bias
        weights = {"depthwise": depthwise.weight, "pointwise": pointwise.weight, "bias": bias}
        return self.node(
            OPERATOR,
            label,
            [x, *(self.constant(f"{label}.{part}", w.astype(np.float32)) for part, w in weights.items())],
            output,
            domain=DOMAIN,
            in_channels=n_i,
            channels=depthwise.reads.tolist(),
            group=pointwise.geometry.groups,
            **attributes_for(depthwise.geometry),
        )


def emit(
    factorization: Factorization,
    name: str,
    x: str,
    output: str,
    form: Form = "parallel",
    operator: str = "Conv",
    dtype: np.dtype[Any] = SINGLE,
    taken: Collection[str] = (),
) -> tuple[Nodes, Tensors]:
    """Return the nodes and initializers that compute ``output`` from ``x``, all named after ``name``.

    They get no names that are ``taken``.

    ``operator`` is that of the layer: maps go through a "Conv", rows through one of `PRODUCTS`. Weights are
    written as ``dtype``, ModelError if one is too large for it; the fused operator is for float32.
    """
    writer = Writer(name, dtype, taken)
    if operator in PRODUCTS:
        _write_products(writer, factorization, x, output, operator)
    else:
        write(writer, factorization, x, output, "parallel" if form == "fused" and dtype != SINGLE else form)
    return writer.nodes, writer.initializers


def write(writer: Writer, factorization: Factorization, x: str, output: str, form: Form = "parallel") -> None:
    """Add the nodes that compute ``output`` from ``x``."""
    stages, channels, index = factorization.stages, factorization.geometry.n_i, 0
    order: IntArray | None = None  # of the previous stage's output channels
    while index < len(stages):
        stage, *rest = stages[index:]
        g = stage.geometry
        label = f"{'pointwise' if g.is_pointwise else 'depthwise' if g.is_depthwise else 'conv'}{index}"
        is_pair = form == "fused" and order is None and bool(rest) and stage.is_separable_with(rest[0])
        bias, out = (factorization.bias, output) if len(rest) == is_pair else (None, None)
        is_depthwise = stage.channels is not None and g.n_o == g.n_i == g.groups
        if is_pair:
            x = writer.fused(f"fused{index or ''}", x, (stage, rest[0]), channels, bias, out)
        elif form != "gather" and is_depthwise and rest and rest[0].geometry.groups == 1:
            x, order = _write_parallel(writer, label, x, stage, channels)  # the next stage takes any order
        else:
            picked = writer.gather(label, x, stage.channels)
            weight = writer.weight(f"{label}.weight", stage.weight, order, axis=1)
            x, order = writer.conv(label, [picked, weight], g, bias, out), None
        index += 1 + is_pair
        channels = stages[index - 1].geometry.n_o


def _write_products(writer: Writer, factorization: Factorization, x: str, output: str, operator: str) -> None:
    """Write 1×1 stages on rows (…, c); the last is a Gemm if the layer is one, which has two axes."""
    *before, last = factorization.stages
    width = factorization.geometry.n_i
    for index, stage in enumerate(before):
        weight = writer.weight(f"product{index}.weight", stage.dense(width)[:, :, 0, 0].T)
        x = writer.node("MatMul", f"product{index}", [x, weight])
        width = stage.geometry.n_o
    label = f"product{len(before)}"
    matrix = last.dense(width)[:, :, 0, 0]
    bias = np.zeros(last.geometry.n_o) if factorization.bias is None else factorization.bias
    if operator == "Gemm":  # it needs a bias before opset 11
        inputs = [x, writer.weight(f"{label}.weight", matrix), writer.weight(f"{label}.bias", bias)]
        writer.node("Gemm", label, inputs, output, transB=1)
        return
    weight = writer.weight(f"{label}.weight", matrix.T)
    if not bias.any():
        writer.node("MatMul", label, [x, weight], output)
        return
    product = writer.node("MatMul", label, [x, weight])
    writer.node("Add", f"{label}.add", [product, writer.weight(f"{label}.bias", bias)], output)


def _write_parallel(
    writer: Writer, label: str, x: str, stage: ConvStage, channels: int
) -> tuple[str, IntArray]:
    """Write a depthwise stage level by level: the first filter of every channel, then the second, …

    Returns the concatenated output, and the order of the stage's output channels in it.
    """
    assert stage.channels is not None
    level = np.array([np.count_nonzero(stage.channels[:i] == c) for i, c in enumerate(stage.channels)])
    parts, order = [], []
    for t in range(int(level.max()) + 1):
        rows = np.flatnonzero(level == t)
        rows = rows[np.argsort(stage.channels[rows], kind="stable")]
        read = stage.channels[rows]
        whole = len(read) == channels  # a level never repeats a channel, so this is all of them in order
        part = writer.gather(f"{label}.{t}", x, None if whole else read)
        weight = writer.weight(f"{label}.{t}.weight", stage.weight, rows)
        geometry = replace(stage.geometry, n_o=len(rows), n_i=len(rows), groups=len(rows))
        parts.append(writer.conv(f"{label}.{t}", [part, weight], geometry, None, None))
        order.append(rows)
    if len(parts) == 1:
        return parts[0], order[0]
    return writer.node("Concat", f"{label}.concat", parts, axis=1), np.concatenate(order)
