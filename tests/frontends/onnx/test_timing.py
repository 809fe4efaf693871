"""The tiny models that layers are timed as."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from netdecouple import runtimes
from netdecouple.convolution import Structure, placeholder
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method
from netdecouple.frontends.onnx.emission import FORMS, Form
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.timing import OnnxTimer, tiny_model
from netdecouple.network import Layer
from netdecouple.runtimes.onnxruntime import open_session
from tests import networks
from tests.planning.layers import linear


@pytest.fixture(scope="module")
def network() -> OnnxNetwork:
    model = networks.classifier()
    return OnnxNetwork(read_model(model), networks.images_for(model))


def separable(layer: Layer) -> Structure:
    """The layer as 24 depthwise separable terms, with the channels that a fit selects."""
    assert layer.geometry is not None
    problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    return method("nd-dp", rounds=0).fit(problem, [Step(24)])[0].structure


@pytest.mark.parametrize("form", FORMS)
def test_tiny_models_are_copies_of_the_layer(network: OnnxNetwork, form: Form) -> None:
    layer: Layer = next(la for la in network.layers if la.name == "conv2")
    assert layer.geometry is not None
    structure = separable(layer)
    model = tiny_model(layer, structure, form, 3)
    onnx.checker.check_model(model)
    x = np.random.default_rng(0).standard_normal((1, layer.geometry.n_i, *layer.size)).astype(np.float32)
    for seed, found in enumerate(open_session(model).run(None, {"x": x})):
        expected = placeholder(structure, seed)(x).mean(axis=(2, 3), keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_tiny_models_of_fully_connected_layers_are_matrix_products(form: Form) -> None:
    layer = linear("fc", 12, 9)
    structure = method("cd").structure(layer.geometry, [Step(3)])
    model = tiny_model(layer, structure, form, 3)
    onnx.checker.check_model(model)
    assert {node.op_type for node in model.graph.node} == {"MatMul", "Gemm"}
    x = np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32)
    for seed, found in enumerate(open_session(model).run(None, {"x": x})):
        expected = placeholder(structure, seed)(x[:, :, None, None])[:, :, 0, 0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("short_timing")
@pytest.mark.parametrize("batch", [1, 4])
def test_layers_are_timed_with_as_many_images_as_the_network(batch: int) -> None:
    """Of a model with a fixed batch."""
    model = networks.classifier(batch=batch)
    network = OnnxNetwork(read_model(model), networks.images_for(model))
    timer = OnnxTimer(network, runtimes.runtime("onnxruntime"), 1, ("parallel",))
    assert timer.batch == batch
    layer = next(la for la in network.layers if la.name == "conv2")
    structure = separable(layer)
    model = tiny_model(layer, structure, "parallel", 3, timer.batch)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    assert all(t > 0 for t in timer.layer_times(layer, [(structure, "parallel")]))
    assert timer.network_times([network.build({})]).shape == (2,)
    assert timer.name.startswith("onnxruntime ")
