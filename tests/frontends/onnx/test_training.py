"""PyTorch runs a graph as ONNX Runtime does, with gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from netdecouple.convolution import ConvStage, Factorization
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.divergence import rounding
from tests import networks
from tests.networks import Builder, images_for

torch = pytest.importorskip("torch")

from netdecouple.frontends.onnx.training import OPERATORS, OnnxTrainable  # noqa: E402


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


# operator: attributes, constant inputs, opset; its first input is a map (2, 8, 6, 6) of both signs
CASES: dict[str, list[tuple[dict[str, Any], list[Any], int]]] = {
    "Abs": [({}, [], 17)],
    "Add": [({}, [np.float32([[[1]], [[2]]] * 4)], 17)],
    "AveragePool": [
        ({"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, [], 17),
        ({"kernel_shape": [3, 2], "pads": [1, 0, 0, 1], "count_include_pad": 1}, [], 17),
        ({"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, [], 17),
    ],
    "BatchNormalization": [({"epsilon": 0.01}, [np.float32(np.linspace(0.5, 2, 8))] * 4, 17)],
    "Cast": [({"to": TensorProto.FLOAT}, [], 17)],
    "Clip": [({"min": -0.5, "max": 0.7}, [], 10), ({}, [np.float32(-0.5), None], 17)],
    "Concat": [({"axis": 1}, [np.ones((2, 3, 6, 6), np.float32)], 17)],
    "Conv": [
        ({"pads": [0, 1, 2, 1], "strides": [2, 1], "group": 2}, [numbers(6, 4, 3, 3)], 17),
        (
            {"auto_pad": "SAME_LOWER", "strides": [2, 1]},
            [numbers(4, 8, 2, 2)],
            17,
        ),
    ],
    "ConvTranspose": [
        (
            {"strides": [2, 2], "pads": [1, 0, 1, 1], "output_padding": [1, 1], "group": 2},
            [numbers(8, 3, 3, 3), numbers(6)],
            17,
        )
    ],
    "DepthToSpace": [({"blocksize": 2}, [], 17), ({"blocksize": 2, "mode": "CRD"}, [], 17)],
    "Div": [({}, [np.float32(3)], 17)],
    "Dropout": [({}, [], 17)],
    "Elu": [({"alpha": 0.7}, [], 17)],
    "Erf": [({}, [], 17)],
    "Exp": [({}, [], 17)],
    "Expand": [],
    "Flatten": [({"axis": 2}, [], 17)],
    "Gather": [({"axis": -3}, [np.int64([[1, -1], [0, 5]])], 17)],
    "Gelu": [({"approximate": "tanh"}, [], 20)],
    "Gemm": [],
    "GlobalAveragePool": [({}, [], 17)],
    "GlobalMaxPool": [({}, [], 17)],
    "HardSigmoid": [({"alpha": 0.3}, [], 17)],
    "HardSwish": [({}, [], 17)],
    "Identity": [({}, [], 17)],
    "InstanceNormalization": [({}, [np.float32(np.linspace(0.5, 2, 8))] * 2, 17)],
    "LRN": [({"size": 3, "alpha": 0.2}, [], 17)],
    "LayerNormalization": [({"axis": -2}, [numbers(6, 6)] * 2, 17)],
    "LeakyRelu": [({"alpha": 0.2}, [], 17)],
    "Log": [],
    "LogSoftmax": [({"axis": 1}, [], 17)],
    "MatMul": [({}, [numbers(6, 5)], 17)],
    "Max": [({}, [np.float32(0.3), np.float32([[0.1], [0.5]] * 3)], 17)],
    "MaxPool": [
        ({"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0]}, [], 17),
        ({"kernel_shape": [2, 2], "strides": [2, 2], "dilations": [2, 2], "ceil_mode": 1}, [], 17),
    ],
    "Min": [({}, [np.float32(0.3)], 17)],
    "Mish": [({}, [], 18)],
    "Mul": [({}, [np.float32([[2]])], 17)],
    "Neg": [({}, [], 17)],
    "PRelu": [({}, [np.float32(np.linspace(0, 1, 8)).reshape(8, 1, 1)], 17)],
    "Pad": [
        ({}, [np.int64([0, 0, 1, 0, 0, 0, 0, 2]), np.float32(0.3)], 17),
        ({"mode": "reflect"}, [np.int64([0, 0, 1, 2, 0, 0, 2, 1])], 17),
        ({}, [np.int64([1, 2]), None, np.int64([-1])], 18),
        ({"pads": [0, 1, 0, 0, 0, 0, 0, 0], "value": 0.2}, [], 10),
        ({"mode": "edge"}, [np.int64([0] * 8)], 17),
    ],
    "Pow": [({}, [np.float32(2)], 17)],
    "Reciprocal": [],
    "ReduceL2": [({"axes": [1]}, [], 17)],
    "ReduceMax": [({"axes": [2, 3], "keepdims": 0}, [], 17)],
    "ReduceMean": [({}, [np.int64([-1])], 18), ({}, [], 17), ({"noop_with_empty_axes": 1}, [], 18)],
    "ReduceSum": [({}, [np.int64([1, 2])], 17)],
    "Relu": [({}, [], 17)],
    "Reshape": [({}, [np.int64([0, -1, 4])], 17)],
    "Resize": [
        ({"mode": "nearest"}, [None, np.float32([1, 1, 2, 3])], 17),
        ({"mode": "linear"}, [None, None, np.int64([2, 8, 11, 9])], 17),
        (
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            [None, np.float32([1, 1, 2, 2])],
            17,
        ),
        ({"mode": "cubic"}, [None, np.float32([1, 1, 2, 2])], 17),
    ],
    "Selu": [({}, [], 17)],
    "Shape": [],
    "Sigmoid": [({}, [], 17)],
    "Slice": [
        ({}, [np.int64([1, -4]), np.int64([9, -1]), np.int64([1, 3]), np.int64([2, 1])], 17),
        ({"starts": [1], "ends": [3], "axes": [2]}, [], 9),
    ],
    "Softmax": [({"axis": 1}, [], 17)],
    "Softplus": [({}, [], 17)],
    "SpaceToDepth": [({"blocksize": 2}, [], 17)],
    "Split": [
        ({"axis": 1}, [np.int64([3, 5])], 17),
        ({"axis": 1}, [], 11),
        ({"axis": 2, "split": [2, 4]}, [], 11),
    ],
    "Sqrt": [],
    "Squeeze": [],
    "Sub": [({}, [np.float32(1)], 17)],
    "Sum": [({}, [np.float32(1), np.float32([2])], 17)],
    "Tanh": [({}, [], 17)],
    "Transpose": [({"perm": [0, 2, 3, 1]}, [], 17), ({}, [], 17)],
    "Unsqueeze": [({}, [np.int64([1, -1])], 17), ({"axes": [2]}, [], 11)],
    "Upsample": [({"mode": "nearest"}, [np.float32([1, 1, 2, 2])], 9)],
    "Where": [],
}


def chains(b: Builder, x: str) -> dict[str, list[str]]:
    """Operators that need another input than a map: by the operator, its outputs."""
    squares = b.node("Mul", x, x)
    positive = b.node("Add", squares, b.constant("half", 0.5))
    rows = b.node("Flatten", x)
    scalar = b.node("ReduceMean", x, keepdims=1, axes=[1])
    shape = b.node("Shape", x, out="shape")
    left, right = b.weight("left", 288, 5), b.bias("right", 5)
    return {
        "Expand": [b.node("Expand", scalar, b.constant("shape of three", [3, 1, 1], np.int64))],
        "Gemm": [
            b.node("Gemm", rows, left, right, alpha=0.5, beta=2.0),
            b.node("Gemm", rows, b.weight("turned", 3, 2), transA=1, transB=1),
        ],
        "Log": [b.node("Log", positive)],
        "Reciprocal": [b.node("Reciprocal", positive)],
        "Sqrt": [b.node("Sqrt", positive)],
        "Squeeze": [b.node("Squeeze", scalar, b.constant("one", [1], np.int64))],
        "Shape": [b.node("Reshape", x, shape)],
        "Where": [b.node("Where", b.node("Greater", x, b.constant("zero", 0.0)), squares, x)],
    }


def network_of(b: Builder, outputs: list[str], opset: int) -> OnnxNetwork:
    """A convolution of the image, and what was built behind it."""
    model = b.model([(name, ()) for name in outputs], ("N", 3, 6, 6), opset)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return OnnxNetwork(read_model(model), images(2))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 6, 6)).astype(np.float32)


def trainable(network: OnnxNetwork) -> OnnxTrainable:
    """With the network's first convolution as one stage."""
    layer = next(la for la in network.layers if la.name == "conv")
    assert layer.geometry
    stage = ConvStage(layer.geometry, layer.weight.copy())
    return network.trainable({"conv": Factorization(layer.geometry, (stage,), layer.bias)})  # type: ignore[return-value]


def check(network: OnnxNetwork) -> None:
    """Outputs are ONNX Runtime's, and the convolution before the operator has gradients."""
    trained, x = trainable(network), images(2)
    outputs = trained(x)
    assert rounding(network.run(x), [output.numpy(force=True) for output in outputs]) < 1e-5
    sum(output.square().sum() for output in outputs).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.parameters)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_an_operator_computes_what_onnx_runtime_does(operator: str) -> None:
    for attributes, inputs, opset in CASES[operator]:
        b = Builder()
        x = b.conv("image", 3, 8, 3, "conv")
        names = [
            ""
            if value is None
            else b.constant(f"input{i}", value, np.int64 if _is_int(value) else np.float32)
            for i, value in enumerate(inputs)
        ]
        outputs = [f"out{i}" for i in range(2 if operator == "Split" else 1)]
        b.nodes.append(helper.make_node(operator, [x, *names], outputs, **attributes))
        check(network_of(b, outputs, opset))
    if not CASES[operator]:
        b = Builder()
        check(network_of(b, chains(b, b.conv("image", 3, 8, 3, "conv"))[operator], 17))


def _is_int(value: Any) -> bool:
    return np.asarray(value).dtype == np.int64


@pytest.mark.parametrize("build", [networks.residual, networks.perceptron, networks.kinds, networks.restorer])
def test_networks_compute_what_they_did_and_give_back_their_weights(build: Any) -> None:
    model = build()
    x = images_for(model)
    network = OnnxNetwork(read_model(model), x)
    exact = {
        la.name: Factorization(la.geometry, (ConvStage(la.geometry, la.weight.copy()),), la.bias)
        for la in network.layers
        if la.geometry and not la.reason
    }
    trained = network.trainable(exact)
    outputs = [output.numpy(force=True) for output in trained(x)]
    assert rounding(network.run(x), outputs) < 1e-5
    for name, factorization in trained.factorizations().items():
        np.testing.assert_array_equal(factorization.dense(), exact[name].dense())
        np.testing.assert_array_equal(factorization.bias, exact[name].bias)


def test_pictures_with_the_channels_last_are_changed_as_others() -> None:
    """The change sees (n, c, h, w), and the network gets its own order back."""
    model = networks.channels_last(networks.classifier())
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 3)).astype(np.float32)
    network = OnnxNetwork(read_model(model), images)
    changed = OnnxTrainable(network, {}).augmented(images, lambda pictures: pictures[:, ::-1] + 1)
    np.testing.assert_array_equal(changed, images[..., ::-1] + 1)


def test_an_operator_without_gradients_is_named() -> None:
    b = Builder()
    b.node("Celu", b.conv("image", 3, 8, 3, "conv"), out="y", name="odd")
    with pytest.raises(ModelError, match=r"PyTorch cannot run its Celu 'odd' .*no gradients"):
        trainable(network_of(b, ["y"], 17))(images(2))


def test_only_float32_is_trained() -> None:
    model = networks.half_precision()
    network = OnnxNetwork(read_model(model), images_for(model))
    layer = next(la for la in network.layers if la.geometry and not la.reason)
    stage = ConvStage(layer.geometry, layer.weight.astype(np.float32))
    with pytest.raises(ModelError, match="only float32"):
        network.trainable({layer.name: Factorization(layer.geometry, (stage,), None)})
