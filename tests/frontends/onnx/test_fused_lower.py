"""A lowered network holds standard operators only, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from netdecouple import kernels
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.fused import lower
from netdecouple.frontends.onnx.proto import nodes_of
from netdecouple.runtimes.onnxruntime import open_session, run
from tests import networks
from tests.frontends.onnx.test_fused import Graph, absorbed, decoupled
from tests.kernels.cases import COUNT, TOLERANCE, case
from tests.kernels.test_onnxruntime import CONSTANTS, fused, model_of, model_of_case

built = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")


def standard(model: onnx.ModelProto) -> Any:
    """Lower, check that nothing of ours is left and all names differ, and open it without our library."""
    before = model.SerializeToString(deterministic=True)
    lowered = lower(model)
    assert model.SerializeToString(deterministic=True) == before
    assert {node.domain for node in nodes_of(lowered.graph)} <= {""}
    assert {entry.domain for entry in lowered.opset_import} == {""}
    for value in (*lowered.graph.input, *lowered.graph.output):  # the checker wants ranks
        if not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * 4)
    onnx.checker.check_model(lowered, full_check=True)
    made = [t for node in lowered.graph.node for t in node.output if t]
    made += [tensor.name for tensor in lowered.graph.initializer]
    assert len(set(made)) == len(made)
    labels = [node.name for node in lowered.graph.node if node.name]
    assert len(set(labels)) == len(labels)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(lowered.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_any_layer_is_lowered() -> None:
    """Groups, ranks that differ, strides, slopes, limits, residuals."""
    for seed in range(0, COUNT, 15):
        one = case(seed)
        session = standard(model_of_case(one))
        feeds = {"x": one.x} if one.residual is None else {"x": one.x, "residual": one.residual}
        expected, scale = one.expected()
        found = session.run(None, feeds)[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale, err_msg=f"case {seed}")


@built
def test_whole_networks_are_lowered(network_maker: Callable[[], onnx.ModelProto]) -> None:
    """To what they compute with the fused operator."""
    model, images = decoupled(network_maker, "fused")
    feeds = {"image": images[:1]}
    expected, found = run(open_session(model), None, feeds), standard(model).run(None, feeds)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1))


@built
def test_a_lowered_network_is_the_one_written_in_parallel_form() -> None:
    """Where nothing was absorbed: the same nodes, names and weights."""
    fused_model, _ = decoupled(networks.constant_node, "fused")
    parallel, _ = decoupled(networks.constant_node, "parallel")
    lowered = lower(fused_model)
    ours, theirs = ([n for n in m.graph.node if n.op_type != "Relu"] for m in (lowered, parallel))
    assert [n.name for n in ours] == [n.name for n in theirs]
    assert [n.op_type for n in ours] == [n.op_type for n in theirs]
    assert {t.name for t in lowered.graph.initializer} == {t.name for t in parallel.graph.initializer}


def test_what_has_nothing_of_ours_stays_as_it_is(model: onnx.ModelProto) -> None:
    assert lower(model) == model


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 17])
def test_limits_are_written_as_the_opset_has_them(opset: int) -> None:
    """Attributes of Clip before opset 11, inputs from then on."""
    b = Graph()
    b.fused()
    b.nodes[-1].attribute.extend(
        [helper.make_attribute("minimum", -1.0), helper.make_attribute("maximum", 0.5)]
    )
    y = standard(b.finished(("conv",), opset)).run(
        None, {"image": networks.images_for(b.finished(("conv",)))}
    )[0]
    assert y.min() == -1
    assert y.max() == 0.5


@built
def test_activations_become_the_plainest_operator() -> None:
    """Relu, LeakyRelu where all slopes are alike, else PRelu."""
    follows: list[tuple[Callable[[Graph, str], str], list[str]]] = [
        (lambda b, x: b.node("Relu", b.node("Add", x, "image"), out="y"), ["Add", "Relu"]),
        (lambda b, x: b.node("LeakyRelu", x, out="y"), ["LeakyRelu"]),
        (lambda b, x: b.node("PRelu", x, b.constant("s", [[[1]], [[2]], [[3]], [[4]]]), out="y"), ["PRelu"]),
        (lambda b, x: b.node("Clip", x, "", b.constant("high", 1.0), out="y"), ["Clip"]),
    ]
    for follow, wanted in follows:
        b = Graph()
        follow(b, b.fused())
        model = b.finished()
        assert absorbed(model) == ["DecoupledConv"]
        standard(model)
        written = [node.op_type for node in lower(model).graph.node]
        assert written == ["Conv", "Conv", "Concat", "Conv", *wanted]


def test_names_that_are_taken_are_not_taken_again() -> None:
    """Two nodes of one name, none at all, and tensors that are called like ours."""
    first, second, third = (fused(["x", *CONSTANTS]), fused(["a", *CONSTANTS]), fused(["b", *CONSTANTS]))
    first.output[0], second.output[0], third.name = "a", "b", ""
    for node in (second, third):
        node.attribute[0].i = 5
        next(a for a in node.attribute if a.name == "channels").ints[:] = [4, 4, 2, 0]
    clash = helper.make_node("Neg", ["x"], ["layer/depthwise0.0_output"], "layer/pointwise1")
    model = model_of([clash, first, second, third], CONSTANTS)
    assert standard(model).run(None, {"x": np.ones((1, 4, 8, 8), np.float32)})[0].shape == (1, 5, 8, 8)


def test_an_operator_in_a_subgraph_is_lowered() -> None:
    """With weights of the graph around it, which go if nobody else reads them."""
    inner = fused(["x", *CONSTANTS])
    inner.output[0] = "inner"
    branch = helper.make_graph(
        [inner], "branch", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    )
    nodes = [
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Cast", ["size"], ["flag"], to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch),
    ]
    model = model_of(nodes, CONSTANTS)
    session = standard(model)
    assert not lower(model).graph.initializer
    assert session.run(None, {"x": np.ones((1, 4, 3, 3), np.float32)})[0][0, 0, 1, 1] == 37


def test_weights_that_are_listed_among_the_inputs_are_no_inputs_any_more() -> None:
    """Models of IR version 3 do that; what somebody else reads as well stays."""
    model = model_of([fused(["x", *CONSTANTS]), helper.make_node("Neg", ["bias"], ["z"])], CONSTANTS)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    lowered = lower(model)
    assert [value.name for value in lowered.graph.input] == ["x", "bias"]
    assert "bias" in {tensor.name for tensor in lowered.graph.initializer}
    standard(model)


def test_weights_in_constant_nodes_are_read() -> None:
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
        for name, array in CONSTANTS.items()
    ]
    session = standard(model_of([*nodes, fused(["x", *CONSTANTS])], {}))
    assert session.run(None, {"x": np.ones((1, 4, 3, 3), np.float32)})[0][0, 0, 1, 1] == 37


def test_a_function_of_the_same_name_goes_too() -> None:
    """One that says how the operator is computed where our library is not there."""
    model = model_of([fused(["x", *CONSTANTS])], CONSTANTS)
    body = helper.make_node("Conv", ["x", "depthwise", "bias"], ["y"])
    function = helper.make_function(
        "netdecouple", "DecoupledConv", ["x", *CONSTANTS], ["y"], [body], [helper.make_opsetid("", 13)]
    )
    model.functions.append(function)
    assert not lower(model).functions
    standard(model)


@pytest.mark.parametrize(
    ("constants", "attributes", "message"),
    [
        ({"bias": None}, {}, "'bias' is computed, not constant"),
        ({"bias": np.ones(4, np.float32)}, {}, r"bias \(4,\) instead of \(5,\)"),
        ({"depthwise": np.ones((4, 2, 3, 3), np.float32)}, {}, "weight"),
        ({}, {"channels": None}, "channels"),
        ({}, {"channels": [0, 1]}, r"channels \(2,\) instead of \(4,\)"),
        ({}, {"in_channels": None}, "in_channels"),
        ({}, {"group": 3}, "groups"),
    ],
)
def test_what_cannot_be_read_is_said(constants: dict, attributes: dict, message: str) -> None:
    """With the layer's name."""
    given = {name: array for name, array in (CONSTANTS | constants).items() if array is not None}
    with pytest.raises(ModelError, match=f"'layer'.*{message}"):
        lower(model_of([fused(["x", *CONSTANTS], **attributes)], given))
