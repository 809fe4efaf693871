"""What follows a fused operator becomes part of it, if and only if the network computes the same then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry
from netdecouple.families import Problem, nd
from netdecouple.families.chain import Step, method
from netdecouple.frontends.onnx.emission import emit
from netdecouple.frontends.onnx.fused import absorb
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.proto import up_to
from netdecouple.runtimes.onnxruntime import open_session, run
from tests import networks
from tests.kernels.cases import rows_of, separable

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")


class Graph(networks.Builder):
    """Fused operators from 4 to 4 channels, and what follows them; (N, 4, 8, 8) → y."""

    def fused(self, x: str = "image", out: str = "conv") -> str:
        layer = separable(
            ConvGeometry(4, 4, 3, 3, pads=(1, 1, 1, 1)), rows_of([2] * 4, 1, self.rng), self.rng
        )
        nodes, initializers = emit(layer, out, x, out, "fused")
        self.nodes += nodes
        self.initializers += initializers
        return out

    def finished(self, outputs: tuple[str, ...] = ("y",), opset: int = 17) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        model = self.model(shape=("N", 4, 8, 8), opset=opset)
        del model.graph.output[:]
        model.graph.output.extend(values)
        model.opset_import.append(helper.make_opsetid("netdecouple", 1))
        return model


def absorbed(model: onnx.ModelProto) -> list[str]:
    """Absorb what can be, hold the outputs against those before, and return which operators are left."""
    x = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    tensors = [t for node in model.graph.node for t in node.output]
    values = run(open_session(up_to(model, tensors)), None, {"image": x})
    shapes = {t: v.shape for t, v in zip(tensors, values, strict=True)} | {"image": x.shape}
    shapes |= {t.name: tuple(t.dims) for t in model.graph.initializer}
    before = run(open_session(model), None, {"image": x})
    absorb(model.graph, shapes)
    after = run(open_session(model), None, {"image": x})
    for a, b in zip(after, before, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    return [node.op_type for node in model.graph.node]


ALONE = ["DecoupledConv"]


@pytest.mark.parametrize(
    "follow",
    [
        lambda b, x: b.node("Relu", x, out="y"),
        lambda b, x: b.node("LeakyRelu", x, out="y"),
        lambda b, x: b.node("LeakyRelu", x, out="y", alpha=-0.3),
        lambda b, x: b.node("PRelu", x, b.constant("s", 0.2), out="y"),
        lambda b, x: b.node("PRelu", x, b.constant("s", [0.2]), out="y"),
        lambda b, x: b.node("PRelu", x, b.constant("s", b.rng.standard_normal((4, 1, 1))), out="y"),
        lambda b, x: b.node("PRelu", x, b.constant("s", b.rng.standard_normal((1, 4, 1, 1))), out="y"),
        lambda b, x: b.node("Clip", x, b.constant("low", -1.0), b.constant("high", 2.0), out="y"),
        lambda b, x: b.node("Clip", x, b.constant("low", [-1.0]), b.constant("high", [2.0]), out="y"),
        lambda b, x: b.node("Clip", x, "", b.constant("high", 2.0), out="y"),
        lambda b, x: b.node("Clip", x, b.constant("low", 0.5), out="y"),
        lambda b, x: b.node("Clip", x, b.constant("low", 2.0), b.constant("high", -1.0), out="y"),
        lambda b, x: b.node("Clip", x, out="y"),
        lambda b, x: b.node("Add", x, "image", out="y"),
        lambda b, x: b.node("Add", "image", x, out="y"),
        lambda b, x: b.node("Relu", b.node("Add", x, "image"), out="y"),
        lambda b, x: b.node("Relu", b.node("LeakyRelu", b.node("Add", x, "image")), out="y"),
        lambda b, x: b.node(
            "Clip", b.node("PRelu", x, b.constant("s", 0.2)), b.constant("low", -0.1), out="y"
        ),
    ],
)
def test_what_the_operator_can_do_it_takes_over(follow: Callable[[Graph, str], str]) -> None:
    """A residual, a slope for negative values, limits; in this order."""
    b = Graph()
    follow(b, b.fused())
    assert absorbed(b.finished()) == ALONE


def test_limits_that_are_attributes_are_taken_over() -> None:
    """As Clip had them before opset 11."""
    b = Graph()
    b.node("Clip", b.fused(), out="y", min=0.0, max=6.0)
    assert absorbed(b.finished(opset=10)) == ALONE


@pytest.mark.parametrize(
    ("follow", "left"),
    [
        (lambda b, x: b.node("Add", x, x, out="y"), ["Add"]),
        (
            lambda b, x: b.node("Add", x, b.constant("c", b.rng.standard_normal((2, 4, 8, 8))), out="y"),
            ["Add"],
        ),
        (lambda b, x: b.node("Add", x, b.constant("c", b.rng.standard_normal((4, 1, 1))), out="y"), ["Add"]),
        (
            lambda b, x: b.node("Add", x, b.node("GlobalAveragePool", "image"), out="y"),
            ["GlobalAveragePool", "Add"],
        ),
        (
            lambda b, x: b.node("Add", x, b.node("ReduceMax", "image", axes=[0], keepdims=1), out="y"),
            ["ReduceMax", "Add"],
        ),
        (lambda b, x: b.node("Add", x, b.node("Relu", x), out="y"), ["Relu", "Add"]),
        (lambda b, x: b.node("Sub", x, "image", out="y"), ["Sub"]),
        (lambda b, x: b.node("Add", b.node("Relu", x), "image", out="y"), ["Add"]),
        (lambda b, x: b.node("Add", b.node("LeakyRelu", x), "image", out="y"), ["Add"]),
        (lambda b, x: b.node("Add", b.node("Add", x, "image"), "image", out="y"), ["Add"]),
        (lambda b, x: b.node("LeakyRelu", b.node("Relu", x), out="y"), ["LeakyRelu"]),
        (lambda b, x: b.node("LeakyRelu", b.node("LeakyRelu", x), out="y"), ["LeakyRelu"]),
        (lambda b, x: b.node("Relu", b.node("Clip", x, b.constant("low", -1.0)), out="y"), ["Relu"]),
        (lambda b, x: b.node("PRelu", x, b.constant("s", b.rng.standard_normal(8)), out="y"), ["PRelu"]),
        (
            lambda b, x: b.node("PRelu", x, b.constant("s", b.rng.standard_normal((4, 8, 8))), out="y"),
            ["PRelu"],
        ),
        (lambda b, x: b.node("PRelu", "image", x, out="y"), ["PRelu"]),
        (
            lambda b, x: b.node("PRelu", x, b.node("ReduceMean", "image", keepdims=0), out="y"),
            ["ReduceMean", "PRelu"],
        ),
        (
            lambda b, x: b.node("Clip", x, b.node("ReduceMean", "image", keepdims=0), out="y"),
            ["ReduceMean", "Clip"],
        ),
        (lambda b, x: b.node("Sigmoid", x, out="y"), ["Sigmoid"]),
        (lambda b, x: b.node("Relu", b.node("Sigmoid", x), out="y"), ["Sigmoid", "Relu"]),
    ],
)
def test_what_it_cannot_do_stays(follow: Callable[[Graph, str], str], left: list[str]) -> None:
    """Sums that broadcast, of itself, with a constant, after an activation; odd slopes and limits."""
    b = Graph()
    follow(b, b.fused())
    kept = absorbed(b.finished())
    assert sorted(kept) == sorted(ALONE + left)


def test_a_slope_along_another_axis_stays() -> None:
    """As many values as channels, but they go with the columns."""
    b = Graph()
    x = b.node("MaxPool", b.fused(), kernel_shape=[2, 2], strides=[2, 2])  # 4 × 4
    b.node("PRelu", b.fused(x, "second"), b.constant("s", b.rng.standard_normal(4)), out="y")
    assert absorbed(b.finished()) == ["DecoupledConv", "MaxPool", "DecoupledConv", "PRelu"]


def test_an_output_of_the_network_stays() -> None:
    """It must still be there, whatever follows."""
    b = Graph()
    b.node("Relu", b.fused(), out="y")
    assert absorbed(b.finished(("y", "conv"))) == ["DecoupledConv", "Relu"]


def test_what_is_read_twice_stays() -> None:
    b = Graph()
    b.node("Relu", b.fused(), out="y")
    b.node("Sigmoid", "conv", out="z")
    assert absorbed(b.finished(("y", "z"))) == ["DecoupledConv", "Relu", "Sigmoid"]


def test_what_a_subgraph_reads_stays() -> None:
    """A reader inside of an If counts."""
    b = Graph()
    b.node("Relu", b.fused(), out="y")
    branch = helper.make_graph(
        [helper.make_node("Neg", ["conv"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    bright = b.node("Greater", b.node("ReduceMean", "image", keepdims=0), b.constant("zero", 0.0))
    b.node("If", bright, out="z", then_branch=branch, else_branch=branch)
    assert "Relu" in absorbed(b.finished(("y", "z")))


def test_the_same_name_in_another_domain_is_another_operator() -> None:
    """Nothing is known of what it computes."""
    b = Graph()
    b.node("Relu", b.fused(), out="y", domain="elsewhere")
    model = b.finished()
    absorb(model.graph, {"conv": (2, 4, 8, 8), "image": (2, 4, 8, 8)})
    assert [node.op_type for node in model.graph.node] == ["DecoupledConv", "Relu"]


def test_a_sum_of_two_becomes_part_of_one() -> None:
    """Which then reads the other as its residual, wherever that is computed."""
    for order in (("one", "two"), ("two", "one")):
        b = Graph()
        for name in order:
            b.fused(out=name)
        b.node("Relu", b.node("Add", "one", "two"), out="y")
        assert absorbed(b.finished()) == ["DecoupledConv", "DecoupledConv"]


def test_absorbing_again_changes_nothing() -> None:
    b = Graph()
    b.node("Relu", b.node("Add", b.fused(), "image"), out="y")
    model = b.finished()
    absorbed(model)
    once = model.SerializeToString(deterministic=True)
    absorbed(model)
    assert model.SerializeToString(deterministic=True) == once


def decoupled(make: Callable[[], onnx.ModelProto], form: Any) -> tuple[onnx.ModelProto, np.ndarray]:
    """A network with every k×k layer that can be changed in one form, without any loss; and images for it."""
    images = networks.images_for(make())
    network = OnnxNetwork(read_model(make()), images)
    exact = {}
    for layer in network.layers:
        g = layer.geometry
        if not layer.reason and not g.is_pointwise:
            problem = Problem.data_free(g, layer.weight.astype(np.float64), layer.bias.astype(np.float64))
            ranks = np.full(g.n_i, nd.full_rank(g))
            exact[layer.name] = nd.fit(problem, ranks)
    return network.build(exact, dict.fromkeys(exact, form)), images


def test_whole_networks_compute_the_same(network_maker: Callable[[], onnx.ModelProto]) -> None:
    """Every small network there is, with all its layers fused, against the original."""
    model, images = decoupled(network_maker, "fused")
    for n in (len(images), 1):
        expected, found = (
            run(open_session(m), None, {"image": images[:n]}) for m in (network_maker(), model)
        )
        tolerance = 1e-2 if network_maker is networks.half_precision else 1e-4
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1))


def test_chains_of_fused_operators_absorb_only_at_their_end() -> None:
    """Space, then both stages decoupled: two operators per layer, and the activation is in the second."""
    images = networks.images_for(networks.residual())
    network = OnnxNetwork(read_model(networks.residual()), images)
    chosen = {}
    for layer in network.layers:
        g = layer.geometry
        if g is not None and not layer.reason and min(g.kh, g.kw) > 1:
            problem = Problem.data_free(g, layer.weight, layer.bias)
            chain = method("sd+nd-dp", rounds=0)
            chosen[layer.name], _ = chain.fit(problem, [Step(size) for size in chain.exact(g)])
    model = network.build(chosen, dict.fromkeys(chosen, "fused"))
    assert [n.op_type for n in model.graph.node].count("DecoupledConv") == 2 * len(chosen)
    assert "Relu" not in [n.op_type for n in model.graph.node]
    found, expected = network.run_built(model, images)[0], network.run(images)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_residual_blocks_become_one_operator_each() -> None:
    """The shortcut's sum and the activation after it are gone."""
    model, _ = decoupled(networks.residual, "fused")
    left = [node.op_type for node in model.graph.node]
    assert "Add" not in left
    assert "Relu" not in left
    assert left.count("DecoupledConv") == 7


def test_sums_that_are_no_residual_branches_are_left() -> None:
    """A gate, a map, the layer itself, a constant, one that is read again."""
    model, _ = decoupled(networks.additions, "fused")
    assert [node.op_type for node in model.graph.node].count("Add") == 5


def test_a_network_with_fused_layers_can_be_read_and_written_again() -> None:
    """Nothing is imported twice, and nothing changes."""
    model, images = decoupled(networks.residual, "fused")
    again = OnnxNetwork(read_model(model), images).build({})
    assert [entry.domain for entry in again.opset_import].count("netdecouple") == 1
    expected, found = (run(open_session(m), None, {"image": images}) for m in (model, again))
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6)
