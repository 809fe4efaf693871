"""Reading, folding, listing and writing ONNX models."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import netdecouple
from netdecouple import Settings
from netdecouple.convolution import ConvGeometry
from netdecouple.errors import ModelError, OutputError
from netdecouple.frontends.onnx.model import read_model, write_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.proto import nodes_of
from netdecouple.frontends.onnx.source import OnnxSource
from netdecouple.network import Layer
from netdecouple.runtimes.onnxruntime import open_session, options, run
from tests import networks
from tests.networks import Builder, images_for

SETTINGS = Settings(families=("nd",))


def outputs_of(model: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    return run(open_session(model), None, {model.graph.input[0].name: images})


def values_of(field) -> list[bytes]:
    return [value.SerializeToString(deterministic=True) for value in field]


def spoil(model: onnx.ModelProto, name: str, value: float) -> onnx.ModelProto:
    """Put one bad number into a weight."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[-1] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


def layers_of(model: onnx.ModelProto) -> dict[str, Layer]:
    return {la.name: la for la in OnnxNetwork(read_model(model), images_for(model)).layers}


# --- reading


def test_read_describes_the_input():
    """Fixed sizes are known, dynamic ones are None."""
    opened = read_model(networks.classifier())
    assert (opened.input_name, opened.batch, opened.channels, opened.size) == ("image", None, 3, (8, 8))
    opened = read_model(networks.restorer())
    assert (opened.batch, opened.channels, opened.size) == (None, 3, None)
    assert read_model(networks.classifier(batch=2)).batch == 2


@pytest.mark.parametrize(
    ("operators", "shape", "last"),
    [
        ([("Transpose", [0, 3, 1, 2])], ("N", 8, 8, 3), True),
        ([("Sub", "mean"), ("Transpose", [0, 3, 1, 2])], ("N", "H", "W", 3), True),
        ([("Transpose", [0, 3, 1, 2])], ("N", "H", "W", "C"), True),  # only the operator tells
        ([("Reshape", "channels first")], ("N", 8, 8, 3), True),  # only the last axis tells
        ([("Transpose", [0, 2, 3, 1]), ("Transpose", [0, 3, 1, 2])], ("N", 3, 8, 8), False),
        ([("Sub", "mean")], ("N", 3, 8, 3), False),
        ([("Sub", "mean")], ("N", "C", "H", "W"), False),
    ],
)
def test_the_order_of_the_axes_is_recognised(operators, shape, last: bool):
    """By the operators before the first convolution, else by the last axis."""
    b = Builder()
    b.constant("mean", 0.5)
    b.constant("channels first", [-1, 3, 8, 8], np.int64)
    x = "image"
    for operator, how in operators:
        x = b.node(operator, x, perm=how) if operator == "Transpose" else b.node(operator, x, how)
    b.classifier(b.conv(x, 3, 8, 3, "conv"), 8)
    opened = read_model(b.model(shape=shape))
    size = shape[1:3] if last else shape[2:]
    known = size if all(isinstance(n, int) for n in size) else None
    assert (opened.channels_last, opened.channels, opened.size) == (last, 3, known)


def test_read_takes_a_file_or_a_proto(tmp_path: Path):
    """Both give the same fingerprint and folded model; messages name the file."""
    onnx.save(networks.classifier(), tmp_path / "net.onnx")
    from_file, from_proto = read_model(tmp_path / "net.onnx"), read_model(networks.classifier())
    assert from_file.fingerprint == from_proto.fingerprint
    assert from_file.proto == from_proto.proto
    assert from_file.origin == "net.onnx"


def test_read_takes_external_data(tmp_path: Path):
    """Weights beside the file are read, and are the same model."""
    onnx.save(
        networks.classifier(),
        tmp_path / "net.onnx",
        save_as_external_data=True,
        location="net.data",
        size_threshold=0,
    )
    assert (tmp_path / "net.data").exists()
    beside, inside = read_model(tmp_path / "net.onnx"), read_model(networks.classifier())
    assert beside.fingerprint == inside.fingerprint
    assert beside.proto == inside.proto


def test_read_leaves_the_proto_as_it_is(network_maker):
    """Reading, running and decoupling nothing change not a byte of what was given."""
    model = network_maker()
    before = model.SerializeToString(deterministic=True)
    network = OnnxNetwork(read_model(model), images_for(model))
    network.run(images_for(model))
    network.build({})
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("change", ["weight", "attribute", "wiring"])
def test_fingerprint_tells_networks_apart(change: str):
    """Another weight, stride or wiring is another network."""
    model = networks.classifier()
    if change == "weight":
        spoil(model, "conv2.weight", 0.5)
    elif change == "attribute":
        next(a for a in model.graph.node[0].attribute if a.name == "pads").ints[:] = [0, 0, 0, 0]
    else:
        model.graph.node[2].op_type = "Tanh"
    assert read_model(model).fingerprint != read_model(networks.classifier()).fingerprint


# --- errors


def assert_refused(source, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_model(source)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("content", [b"", b"a photograph, really", os.urandom(500), b"\x08\x08"])
def test_read_refuses_other_files(tmp_path: Path, content: bytes):
    """What is no ONNX model is called that."""
    (tmp_path / "net.onnx").write_bytes(content)
    assert_refused(tmp_path / "net.onnx", "net.onnx", "not an ONNX file", "export or copy it again")


def test_read_refuses_truncated_files(tmp_path: Path):
    """Wherever a file was cut, the error says so or says what is missing."""
    whole = networks.classifier().SerializeToString()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "net.onnx").write_bytes(whole[: int(share * len(whole))])
        assert_refused(tmp_path / "net.onnx", "net.onnx", "cut short")


def test_read_refuses_missing_files(tmp_path: Path):
    """A path that is not there, or a folder."""
    assert_refused(tmp_path / "gone.onnx", "gone.onnx", "no such file")
    assert_refused(tmp_path, "no such file")


def test_read_refuses_missing_external_data(tmp_path: Path):
    """Weights that should be beside the file and are not; also of a proto whose weights were not loaded."""
    path = tmp_path / "net.onnx"
    onnx.save(networks.classifier(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    (tmp_path / "net.data").unlink()
    assert_refused(path, "external data", "net.data")
    assert_refused(onnx.load(path, load_external_data=False), "net.data")


def test_nodes_in_any_order_are_read():
    """ONNX wants them in the order they run in; ONNX Runtime does not mind, and some tools write others."""
    model = networks.residual()
    other = onnx.ModelProto()
    other.CopyFrom(model)
    del other.graph.node[:]
    other.graph.node.extend(reversed(model.graph.node))
    images = images_for(model, 40)
    one, two = (netdecouple.decouple(m, images, macs=0.7, settings=SETTINGS) for m in (model, other))
    assert {la.name for la in two.plan.layers if la.changed}
    for a, b in zip(outputs_of(one.model, images), outputs_of(two.model, images), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_read_refuses_models_without_convolutions():
    """A perceptron has nothing to decouple."""
    b = Builder()
    b.node("Gemm", "image", b.weight("w", 3, 10), out="logits")
    assert_refused(b.model(shape=("N", 3)), "no convolutions")


def test_inputs_beside_the_images_are_kept():
    """In their order, one with its default value; they are no constants, and feed every run."""
    model = read_model(networks.side_inputs())
    names = ["scales", "image", "gain"]
    assert [value.name for value in model.proto.graph.input] == names
    assert (model.input_name, [other.name for other in model.others]) == ("image", ["scales", "gain"])
    assert {"gain"} & {t.name for t in model.proto.graph.initializer}
    feeds = model.with_constants({"scales": [1, 1, 2, 2], "gain": 2}).feeds(np.zeros((2, 3, 8, 8)))
    assert {name: (array.dtype, array.shape) for name, array in feeds.items()} == {
        "image": (np.float64, (2, 3, 8, 8)),
        "scales": (np.float32, (4,)),
        "gain": (np.float32, ()),
    }


@pytest.mark.parametrize(
    ("shape", "value", "fitted"),
    [
        ((), [2.0], 2.0),
        ((1,), 2.0, [2.0]),
        ((2,), [[2, 3]] * 5, [2, 3]),
        (("N", 2), [2, 3], [[2, 3]]),
        ((1, 2), [[2, 3]] * 5, [[2, 3]]),
        (("N", "M"), [[2, 3, 4]], [[2, 3, 4]]),
    ],
)
def test_a_value_is_fitted_to_what_is_declared(shape, value, fitted):
    """One per sample as well, if they are the same; what may count the images lets them run one by one."""
    model = networks.classifier()
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, shape))
    read = read_model(model)
    np.testing.assert_array_equal(read.with_constants({"other": value}).given["other"], fitted)
    assert read.batch == (1 if "N" in shape else None)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"gain": [1.0, 2.0]}, ["'gain' is float32", "and its values differ"]),
        ({"scales": [1.0, 2.0]}, ["'scales' is float32 4", "float64 2 does not fit"]),
        ({"scales": ["a"] * 4}, ["does not fit"]),
        ({"size": 2}, ["no input 'size'", "there are scales, gain"]),
        ({"image": 2}, ["no input 'image' besides the images"]),
        ({}, ["'scales' (float32 4) has no value", "constants="]),
    ],
)
def test_a_value_is_refused(values, parts):
    with pytest.raises(ModelError) as error:
        read_model(networks.side_inputs()).with_constants(values).feeds(np.zeros((2, 3, 8, 8)))
    assert [part for part in parts if part not in str(error.value)] == [], error.value


def test_weights_that_are_inputs_are_constants_all_the_same():
    """As some exporters write them, also in new files."""
    model = networks.old_style()
    model.ir_version = 8
    opened = read_model(model)
    assert [value.name for value in opened.proto.graph.input] == ["image"]
    assert opened.others == ()


def test_read_refuses_other_dtypes():
    """An input of uint8 is not supported, and the message says what is."""
    b = Builder()
    x = b.node("Cast", "image", to=TensorProto.FLOAT)
    b.classifier(b.conv(x, 3, 8, 3, "conv"), 8)
    assert_refused(b.model(kind=TensorProto.UINT8), "'image'", "uint8 of 4 dimensions", "float16 images")


@pytest.mark.parametrize("shape", [(), (64,)])
def test_read_refuses_inputs_without_an_axis_of_samples(shape):
    b = Builder()
    x = b.node("Reshape", b.node("Expand", "image", b.constant("size", [3, 64], np.int64)), "maps")
    b.constant("maps", [-1, 3, 8, 8], np.int64)
    b.classifier(b.conv(x, 3, 8, 3, "conv"), 8)
    assert_refused(b.model(shape=shape), f"float32 of {len(shape)} dimensions", "other numbers (N, …)")


@pytest.mark.parametrize(("shape", "is_fixed"), [(("N", 3, 64), True), (("N", "C", "L"), False)])
def test_images_are_preferred_to_other_inputs(shape, is_fixed: bool):
    """Whatever their order; without any, the first input of numbers is that of the samples."""
    b = Builder()
    b.node("Conv", "image", b.weight("w", 8, 3, 5), out="logits")
    model = b.model([("logits", ("N", 8, "L"))], shape)
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["N", 4]))
    read = read_model(model)
    assert (read.input_name, read.channels, read.size) == ("image", 0, None)
    assert read.has_fixed_size == is_fixed
    model.graph.input.append(helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["N", 3, 8, 8]))
    assert read_model(model).input_name == "maps"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "layer"), [("conv2.weight", "conv2"), ("bn3.var", "bn3"), ("fc.bias", "logits")]
)
def test_read_refuses_weights_that_are_not_finite(value: float, name: str, layer: str):
    """The message names the weight and the layer."""
    assert_refused(spoil(networks.classifier(), name, value), "NaN or Inf", repr(name), repr(layer))


def test_read_allows_infinite_constants():
    """A scalar of minus infinity, as in padding or clipping, is no broken weight."""
    b = Builder()
    x = b.node("Clip", b.conv("image", 3, 8, 3, "conv"), b.constant("low", -np.inf), out="clipped")
    b.classifier(x, 8)
    assert read_model(b.model()).channels == 3


def test_read_allows_masks():
    """Minus infinity in a constant that is added is no broken weight; NaN is, wherever it stands."""
    for value in (-np.inf, np.nan):
        b = Builder()
        mask = b.constant("mask", np.where(np.eye(8), 0, value))
        b.classifier(b.node("Relu", b.node("Add", b.conv("image", 3, 8, 3, "conv"), mask, out="masked")), 8)
        if np.isnan(value):
            assert_refused(b.model(), "NaN or Inf", "'mask'", "'masked'")
        else:
            assert read_model(b.model()).channels == 3


def test_read_refuses_sparse_weights():
    """They would be lost on the way."""
    model = networks.classifier()
    values = helper.make_tensor("sparse.weight", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("sparse.indices", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    assert_refused(model, "'sparse.weight'", "sparse")


@pytest.mark.parametrize("of_nodes", [True, False])
def test_both_names_of_the_standard_domain_are_read(of_nodes: bool):
    """ "ai.onnx" and "" are one."""
    model, images = networks.with_if(), images_for(networks.with_if())
    expected = outputs_of(model, images)
    model.opset_import[0].domain = "ai.onnx"
    for node in nodes_of(model.graph):
        node.domain = "ai.onnx" if of_nodes else ""
    for found, wanted in zip(outputs_of(read_model(model).proto, images), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("half", [True, False])
def test_weights_of_two_names_are_weights(half: bool):
    """Behind Identity, as shared ones are exported, with a Cast that the optimizer would rename."""
    b = Builder()
    weight = b.node("Identity", b.node("Identity", b.weight("w", 8, 3, 3, 3), out="once"), out="twice")
    x = b.node("Relu", b.node("Conv", "image", weight, out="conv", pads=[1, 1, 1, 1]))
    b.classifier(b.node("Relu", b.conv(x, 8, 8, 3, "next")), 8)
    b.node("Cast", b.node("Greater", "logits", b.constant("zero", 0)), to=TensorProto.FLOAT, out="cast")
    b.node("Identity", "cast", out="positive")
    model = b.model([("logits", ("N", 10)), ("positive", ("N", 10))])
    if half:
        halved = networks.halved(model)
        halved.graph.output[1].type.tensor_type.elem_type = TensorProto.FLOAT
        model = halved
    layers = OnnxNetwork(read_model(model), images_for(model)).layers
    assert {layer.name: layer.reason for layer in layers} == dict.fromkeys(("conv", "next", "logits"), "")


def test_fingerprints_of_text_are_those_of_its_letters():
    """Not of where it lies in memory."""

    def named(first: str) -> onnx.ModelProto:
        model = networks.classifier()
        model.graph.initializer.append(helper.make_tensor("names", TensorProto.STRING, [2], [first, "b"]))
        return model

    assert read_model(named("a")).fingerprint == read_model(named("a")).fingerprint
    assert read_model(named("a")).fingerprint != read_model(named("c")).fingerprint


def test_read_refuses_what_the_runtime_refuses():
    """An operator that ONNX Runtime does not know."""
    model = networks.classifier()
    model.graph.node[2].op_type = "Frobnicate"
    assert_refused(model, "ONNX Runtime cannot open the model")


def test_read_refuses_broken_weights():
    """A tensor whose bytes do not fill its shape."""
    model = networks.classifier()
    model.graph.initializer[0].raw_data = b"1234"
    assert_refused(model, "broken weights")


# --- folding


def test_folding_keeps_the_outputs(model: onnx.ModelProto, images: np.ndarray):
    """The folded network computes what the original does, to 1e-5."""
    folded = read_model(model).proto
    for expected, found in zip(outputs_of(model, images), outputs_of(folded, images), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_folding_removes_batch_norm(opset: int):
    """No BatchNorm is left behind a convolution, and the opset stays."""
    model = networks.classifier(opset)
    opened = read_model(model)
    assert [n.op_type for n in opened.proto.graph.node].count("BatchNormalization") == 0
    assert [(o.domain, o.version) for o in opened.proto.opset_import] == [("", opset)]
    images = images_for(model)
    np.testing.assert_allclose(
        outputs_of(opened.proto, images)[0], outputs_of(model, images)[0], atol=1e-5, rtol=1e-4
    )


def test_folding_keeps_the_interface(model: onnx.ModelProto):
    """Outputs, image input, dynamic axes and metadata are those of the original."""
    folded = read_model(model).proto
    assert values_of(folded.graph.input) == values_of(model.graph.input[:1])
    assert values_of(folded.graph.output) == values_of(model.graph.output)
    assert values_of(folded.metadata_props) == values_of(model.metadata_props)
    onnx.checker.check_model(folded)


def test_folding_is_skipped_where_it_would_change_types():
    """float16 weights stay float16; it is only on the CPU that they are computed in float32."""
    folded = read_model(networks.half_precision()).proto
    kinds = {t.name: t.data_type for t in folded.graph.initializer}
    assert kinds["half.weight"] == TensorProto.FLOAT16


def test_float16_models_are_read_and_their_norms_folded():
    """What folding rounds, float16 rounds anyway."""
    model = networks.halved(networks.classifier())
    opened = read_model(model)
    assert opened.dtype == np.float16
    assert "BatchNormalization" not in {n.op_type for n in opened.proto.graph.node}
    assert {t.data_type for t in opened.proto.graph.initializer} == {TensorProto.FLOAT16}
    images = images_for(model).astype(np.float16)
    expected, found = (run(open_session(m), None, {"image": images})[0] for m in (model, opened.proto))
    assert found.dtype == np.float16
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.02)
    kinds = {la.name: (la.reason, la.weight.dtype.name) for la in layers_of(model).values()}
    assert set(kinds.values()) == {("", "float16")}


def test_weights_that_overflow_when_they_are_folded_are_refused():
    """With the layer's name; each of the numbers by itself is finite."""
    model = networks.classifier()
    for tensor in model.graph.initializer:
        if tensor.name in ("conv2.weight", "bn2.scale"):
            array = numpy_helper.to_array(tensor) * np.float32(1e25)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(ModelError, match="the weights of layer 'conv2' overflow once they are folded"):
        layers_of(model)


def test_norms_stay_that_cannot_be_folded_in_float16():
    """Too large a result, another reader of the convolution, statistics that are computed."""
    large = networks.halved(networks.classifier())
    for tensor in large.graph.initializer:
        if tensor.name in ("conv2.weight", "bn2.scale"):
            array = numpy_helper.to_array(tensor) * np.float16(1000)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    read = networks.halved(networks.classifier())
    read.graph.output.append(helper.make_tensor_value_info("conv2", TensorProto.FLOAT16, None))
    computed = networks.halved(networks.classifier())
    computed.graph.node.insert(0, helper.make_node("ReduceMean", ["image"], ["m"], keepdims=0))
    computed.graph.node.insert(1, helper.make_node("Add", ["m", "bn2.mean"], ["moved"]))
    next(n for n in computed.graph.node if n.output[0] == "bn2").input[3] = "moved"
    for model in (large, read, computed):
        left = [n.output[0] for n in read_model(model).proto.graph.node if n.op_type == "BatchNormalization"]
        assert left == ["bn2"]


def test_constant_nodes_are_weights():
    """Also where folding is skipped, a Constant node's value is a weight like any other."""
    model = networks.half_precision()
    tensor = next(t for t in model.graph.initializer if t.name == "after.weight")
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    assert layers_of(model)["after"].reason == ""


def test_old_models_are_raised_to_separate_weights():
    """From IR 4 on an initializer need not be an input; only the image is one."""
    opened = read_model(networks.old_style())
    assert [value.name for value in opened.proto.graph.input] == ["image"]
    assert opened.proto.ir_version >= 4
    assert "BatchNormalization" not in {n.op_type for n in opened.proto.graph.node}


def test_opsets_of_subgraphs_are_kept():
    """A domain that only a branch uses stays imported."""
    model = networks.with_if()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    branch = next(a.g for n in model.graph.node for a in n.attribute if a.name == "then_branch")
    branch.node[0].output[0] = "sum"
    branch.node.append(helper.make_node("FastGelu", ["sum"], ["then_out"], domain="com.microsoft"))
    folded = read_model(model).proto
    assert "FastGelu" in {node.op_type for node in nodes_of(folded.graph)}
    assert {entry.domain for entry in folded.opset_import} == {"", "com.microsoft"}


def with_function() -> onnx.ModelProto:
    """A convolution inside a local function, as some exporters write modules."""
    model = networks.classifier()
    conv = model.graph.node[0]
    body = helper.make_function(
        "local",
        "Block",
        ["x", "w", "b"],
        ["y"],
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])],
        [helper.make_opsetid("", 17)],
    )
    call = helper.make_node("Block", list(conv.input), list(conv.output), domain="local", name="block")
    conv.CopyFrom(call)
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


def test_local_functions_are_looked_into():
    """The convolution in them is found."""
    assert [la.operator for la in layers_of(with_function()).values()] == ["Conv", "Conv", "Conv", "Gemm"]


# --- layers


def geometry(n_o: int, n_i: int, kh: int, kw: int, **options) -> ConvGeometry:
    return ConvGeometry(n_o, n_i, kh, kw, **options)


KINDS = {
    # name: geometry, size of its input, MACs by hand, reason
    "grouped": (geometry(8, 3, 3, 3, pads=(1, 1, 1, 1)), (12, 12), 8 * 3 * 9 * 144, ""),
    "halves": (geometry(12, 8, 3, 3, pads=(1, 1, 1, 1), groups=2), (12, 12), 12 * 4 * 9 * 144, ""),
    "depthwise": (
        geometry(12, 12, 3, 3, pads=(1, 1, 1, 1), groups=12),
        (12, 12),
        12 * 9 * 144,
        "depthwise convolution",
    ),
    "pointwise": (geometry(8, 12, 1, 1), (12, 12), 8 * 12 * 144, ""),
    "dilated": (
        geometry(8, 8, 3, 3, pads=(2, 1, 2, 1), dilations=(2, 1)),
        (12, 12),
        8 * 8 * 9 * 144,
        "",
    ),
    "lopsided": (geometry(10, 8, 3, 3, pads=(0, 1, 2, 1)), (12, 12), 10 * 8 * 9 * 144, ""),
    "five": (geometry(8, 10, 5, 5, pads=(2, 2, 2, 2)), (12, 12), 8 * 10 * 25 * 144, ""),
    "flat": (geometry(8, 8, 1, 3, pads=(0, 1, 0, 1)), (12, 12), 8 * 8 * 3 * 144, ""),
    "tall": (geometry(8, 8, 3, 1, pads=(1, 0, 1, 0)), (12, 12), 8 * 8 * 3 * 144, ""),
    # 12 → 6 at stride 2 needs one pixel, and UPPER puts it last
    "upper": (geometry(8, 8, 3, 3, pads=(0, 0, 1, 1), strides=(2, 2)), (12, 12), 8 * 8 * 9 * 36, ""),
    # a 2 × 4 kernel needs 1 and 3 pixels, and LOWER puts the odd one first
    "lower": (geometry(8, 8, 2, 4, pads=(1, 2, 0, 1)), (6, 6), 8 * 8 * 8 * 36, ""),
    "strided": (geometry(12, 8, 3, 3, pads=(1, 1, 1, 1), strides=(1, 2)), (6, 6), 12 * 8 * 9 * 18, ""),
    "valid": (geometry(8, 12, 3, 3), (6, 3), 8 * 12 * 9 * 4, ""),
}


@pytest.fixture(scope="module")
def kinds() -> dict[str, Layer]:
    return layers_of(networks.kinds())


@pytest.mark.parametrize("name", KINDS)
def test_layers_have_their_geometry(kinds: dict[str, Layer], name: str):
    """Geometry, MACs, parameters and reason of every kind of convolution, as computed by hand."""
    expected, size, macs, reason = KINDS[name]
    layer = kinds[name]
    assert layer.geometry == expected
    assert layer.size == size
    assert layer.macs == macs == expected.macs(*size)
    assert layer.parameters == np.prod(expected.weight_shape) + expected.n_o
    assert layer.reason == reason


def test_layers_are_listed_in_order(kinds: dict[str, Layer]):
    """All of them, in the order they run, fully connected ones included."""
    assert list(kinds) == [*KINDS, "logits"]
    fc = kinds["logits"]
    assert (fc.operator, fc.macs, fc.parameters, fc.reason) == ("Gemm", 80, 90, "")


@pytest.mark.parametrize("operator", ["Gemm", "Gemm transposed", "MatMul"])
@pytest.mark.parametrize("bias", [None, (), (1,), (1, 1), (10,), (1, 10)])
def test_fully_connected_layers_are_pointwise_convolutions_of_one_pixel(
    operator: str, bias: tuple[int, ...] | None
):
    """(n_o, n_i, 1, 1) whichever way the weight lies; one bias per output, whichever way it was written."""
    b = Builder()
    x = b.node("Flatten", b.conv("image", 3, 2, 3, "one"))
    weight = b.rng.standard_normal((10, 128)).astype(np.float32)
    turned = operator == "Gemm transposed"
    inputs = [x, b.constant("w", weight if turned else weight.T)]
    added = np.zeros(()) if bias is None else b.rng.standard_normal(bias)
    if operator == "MatMul":
        b.node("MatMul", *inputs, out="logits")
    else:
        inputs += [] if bias is None else [b.constant("bias", added)]
        b.node("Gemm", *inputs, out="logits", transB=int(turned))
    layer = layers_of(b.model())["logits"]
    assert (layer.geometry, layer.size) == (geometry(10, 128, 1, 1), (1, 1))
    assert (layer.is_linear, layer.reason) == (True, "")
    assert layer.macs == layer.geometry.macs(1, 1) == 1280
    np.testing.assert_array_equal(layer.weight[:, :, 0, 0], weight)
    expected = np.zeros(10) if operator == "MatMul" else np.broadcast_to(added, (1, 10))[0]
    np.testing.assert_array_equal(layer.bias, expected.astype(np.float32))


def product(b: Builder, kind: str) -> str:
    """A matrix product of a kind that stays as it is, on maps (N, 3, 8, 8); its output."""
    flat = b.node("Flatten", "image")
    if kind == "pixels of all images":
        rows = b.node("ReduceMax", "image", axes=[0, 1], keepdims=0)
        return b.node("MatMul", rows, b.weight("w", 8, 10))
    if kind == "stacked weights":
        return b.node("MatMul", flat, b.weight("w", 2, 192, 10))
    if kind == "transposed input":
        rows = b.node("Reshape", "image", b.constant("turn", [192, -1], np.int64))
        return b.node("Gemm", rows, b.weight("w", 192, 10), transA=1)
    if kind == "double":
        x = b.node("Cast", flat, to=TensorProto.DOUBLE)
        return b.node("Cast", b.node("MatMul", x, b.weight("w", 192, 10, dtype=np.float64)), to=1)
    if kind == "scaled":
        return b.node("Gemm", flat, b.weight("w", 192, 10), b.bias("bias", 10), alpha=0.5, beta=2.0)
    if kind == "computed bias":
        mean = b.node("ReduceMean", "image", axes=[1, 2, 3], keepdims=0)
        return b.node(
            "Gemm", flat, b.weight("w", 192, 10), b.node("Unsqueeze", mean, b.constant("at", [1], int))
        )
    assert kind == "bias per image"
    return b.node("Gemm", flat, b.weight("w", 192, 10), b.constant("bias", b.rng.standard_normal((2, 1))))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pixels of all images", "its rows do not belong to one image each"),
        ("stacked weights", "its weights have 3 axes, not 2"),
        ("transposed input", "its input is transposed"),
        ("double", "its weights are float64, not float32 or float16"),
        ("scaled", "its alpha and beta are not 1"),
        ("computed bias", "its bias is computed, not constant"),
        ("bias per image", "its bias (2, 1) is not one number per output"),
    ],
)
def test_other_matrix_products_say_why_they_are_kept(kind: str, reason: str):
    """And what they cost is counted."""
    b = Builder()
    b.conv("image", 3, 2, 3, "one")
    made = product(b, kind)
    model = b.model([("one", ("N", 2, 8, 8)), (made, None)])
    network = OnnxNetwork(read_model(model), images_for(model, 2))
    (layer,) = (la for la in network.layers if la.name != "one")
    assert layer.reason == reason
    assert layer.geometry is None
    assert layer.macs > 0


def body_of(name: str, inputs: list[onnx.ValueInfoProto], results: list[str], *nodes: onnx.NodeProto):
    """A subgraph of tensors whose shapes nobody wrote down."""
    outputs = [helper.make_tensor_value_info(t, TensorProto.BOOL if t == "go" else 1, None) for t in results]
    return helper.make_graph(nodes, name, inputs, outputs)


def other_layer(b: Builder, kind: str, x: str) -> str:
    """A layer that is kept, of maps (N, 8, 8, 8); its output, of the same shape."""
    b.weight("w", 8, 8, 3, 3)
    conv = partial(helper.make_node, "Conv", [x, "w"], name="conv", pads=[1] * 4)
    if kind == "FusedConv":
        return b.node(kind, x, "w", domain="com.microsoft", activation="Relu", pads=[1] * 4, out="kept")
    if kind == "DeformConv":
        offsets = b.node("Gather", x, b.constant("channels", np.arange(18) % 8, np.int64), axis=1)
        return b.node(kind, x, "w", offsets, pads=[1] * 4, kernel_shape=[3, 3], out="kept")
    if kind in ("QLinearConv", "ConvInteger"):
        step, zero = b.constant("step", 0.1), b.constant("zero", 0, np.uint8)
        weight = b.constant("int8", b.rng.integers(-9, 9, (8, 8, 3, 3)), np.int8)
        rows = b.node("QuantizeLinear", x, step, zero)
        if kind == "ConvInteger":
            made = b.node(kind, rows, weight, zero, pads=[1] * 4, out="kept")
            return b.node("Cast", made, to=TensorProto.FLOAT)
        scales = (rows, step, zero, weight, step, b.constant("none", 0, np.int8), step, zero)
        return b.node("DequantizeLinear", b.node(kind, *scales, pads=[1] * 4, out="kept"), step, zero)
    if kind == "If":
        bright = b.node("Greater", b.node("ReduceMean", "image", keepdims=0), b.constant("dark", -1e9))
        then = body_of("then", [], ["y"], conv(outputs=["y"]))
        return b.node(
            "If",
            bright,
            then_branch=then,
            else_branch=body_of("else", [], ["z"], conv(outputs=["z"])),
            out="kept",
        )
    if kind == "Loop":
        inputs = [
            ("i", TensorProto.INT64, []),
            ("go_on", TensorProto.BOOL, []),
            ("v", TensorProto.FLOAT, None),
        ]
        body = body_of(
            "body",
            [helper.make_tensor_value_info(*value) for value in inputs],
            ["go", "y"],
            helper.make_node("Conv", ["v", "w"], ["y"], pads=[1] * 4),
            helper.make_node("Identity", ["go_on"], ["go"]),
        )
        return b.node(
            "Loop", b.constant("three", 3, np.int64), b.constant("true", True, bool), x, body=body, out="kept"
        )
    rows = b.node("Reshape", x, b.constant("rows", [-1, 8, 64], np.int64))
    if kind == "LSTM":
        sequence = b.node("Transpose", rows, perm=[2, 0, 1])  # (64, N, 8)
        b.nodes.append(
            helper.make_node(
                kind,
                [sequence, b.weight("W", 1, 32, 8), b.weight("R", 1, 32, 8)],
                ["states"],
                "kept",
                hidden_size=8,
            )
        )
        states = b.node("Squeeze", "states", b.constant("one", [1], np.int64))
        rows = b.node("Transpose", states, perm=[1, 2, 0])
    elif kind == "left":
        rows = b.node("MatMul", b.weight("left", 8, 8), rows, out="kept")
    elif kind == "Einsum":
        rows = b.node(kind, rows, b.weight("turn", 64, 64), equation="...ct,td->...cd", out="kept")
    else:
        assert kind == "computed"
        rows = b.node(
            "MatMul",
            b.node("MatMul", rows, b.node("Transpose", rows, perm=[0, 2, 1]), out="kept"),
            rows,
            out="second",
        )
    return b.node("Reshape", rows, b.constant("maps", [-1, 8, 8, 8], np.int64))


CONV = 8 * 8 * 9 * 64
OTHERS = {
    "FusedConv": ({"kept": CONV}, "made by ONNX Runtime's optimizer"),
    "DeformConv": ({"kept": CONV}, "deformable convolution"),
    "QLinearConv": ({"kept": CONV}, "quantized; decouple the float model"),
    "ConvInteger": ({"kept": CONV}, "quantized; decouple the float model"),
    "If": (
        {"kept/then_branch/conv": CONV, "kept/else_branch/conv": 0},
        "in the body of If 'kept'; export the model without If",
    ),
    "Loop": ({"kept/body/Conv:y": 3 * CONV}, "in the body of Loop 'kept'"),
    "LSTM": ({"kept": 64 * 2 * 32 * 8}, "recurrent layer"),
    "left": ({"kept": 8 * 8 * 64}, "its weights are on the left"),
    "Einsum": ({"kept": 8 * 64 * 64}, "einsum"),
    "computed": ({"kept": 8 * 8 * 64, "second": 8 * 8 * 64}, "a product of two computed tensors"),
}


def with_other(kind: str) -> onnx.ModelProto:
    """A layer of some kind between two convolutions."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 8, 3, "first"), out="x")
    b.classifier(b.conv(other_layer(b, kind, x), 8, 8, 3, "last"), 8)
    model = b.model(opset=19)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize("kind", OTHERS)
def test_everything_that_costs_macs_is_listed(kind: str):
    """Whatever its domain, and whatever graph it is in, before and after; nothing is gained by what stays."""
    macs, reason = OTHERS[kind]
    model = with_other(kind)
    network = OnnxNetwork(read_model(model), images_for(model))
    kept = {la.name: la for la in network.layers if la.reason}
    assert {name: la.macs for name, la in kept.items()} == macs
    assert all(la.reason.startswith(reason) and la.geometry is None for la in kept.values())
    assert all(la.parameters for la in kept.values()) or kind == "computed"
    report = netdecouple.decouple(model, images_for(model, 40), macs=0.9, settings=SETTINGS).report
    assert report.macs_before - sum(macs.values()) == 64 * 27 * 8 + CONV + 80
    assert {la.name: la.macs for la in report.layers if la.name in macs} == macs


def test_layers_may_all_be_in_bodies():
    """Then there is nothing to run for their shapes."""
    b = Builder()
    b.weight("w", 8, 3, 3, 3)
    bright = b.node("Greater", b.node("ReduceMean", "image", keepdims=0), b.constant("dark", -1e9))
    branches = {
        f"{name}_branch": body_of(name, [], [name], helper.make_node("Conv", ["image", "w"], [name], "conv"))
        for name in ("then", "else")
    }
    b.node("If", bright, out="logits", **branches)
    model = b.model([("logits", ("N", 8, 6, 6))])
    layers = OnnxNetwork(read_model(model), images_for(model)).layers
    assert sorted(la.macs for la in layers) == [0, 36 * 27 * 8]


@pytest.mark.parametrize("level", ["ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_what_onnx_runtime_has_optimized_is_listed_and_not_decoupled(tmp_path: Path, level: str):
    """The message says what to give instead."""
    chosen = options()
    chosen.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    chosen.optimized_model_filepath = str(tmp_path / "net.onnx")
    open_session(networks.classifier(), chosen)
    macs = netdecouple.inspect(tmp_path / "net.onnx").macs
    assert macs >= sum(la.macs for la in layers_of(networks.classifier()).values())
    with pytest.raises(ModelError, match="give the model as it was before"):
        netdecouple.decouple(
            tmp_path / "net.onnx", images_for(networks.classifier(), 20), macs=0.5, settings=SETTINGS
        )


def test_convolutions_in_functions_are_listed_that_the_optimizer_leaves():
    """As it does where it would change types."""
    model = networks.halved(with_function())
    operators = [la.operator for la in OnnxNetwork(read_model(model), images_for(model)).layers]
    assert operators == ["Conv", "Conv", "Conv", "Gemm"]


def with_dead_branch() -> onnx.ModelProto:
    """The classifier, and a wide convolution whose output nothing reads."""
    b = Builder()
    b.node("Relu", b.conv("relu1", 12, 64, 5, "dead"), out="dead.out")
    model = networks.classifier()
    model.graph.node.extend(b.nodes)
    model.graph.initializer.extend(b.initializers)
    return model


def test_what_no_output_needs_is_left_out():
    """It costs nothing before, so that nothing is gained without it: neither MACs nor time."""
    model = with_dead_branch()
    opened = read_model(model)
    assert opened.unread == ("dead", "dead.out")
    assert layers_of(model).keys() == layers_of(networks.classifier()).keys()
    assert opened.proto.graph == read_model(networks.classifier()).proto.graph
    original = OnnxSource(model).executable(None, images_for(model), "onnxruntime").model
    assert "dead" not in {node.name for node in original.graph.node}
    report = netdecouple.decouple(model, images_for(model, 40), macs=0.7, settings=SETTINGS).report
    assert report.macs_before == sum(la.macs for la in layers_of(model).values())
    assert report.left_out == "dead, dead.out: no output needs this"


def test_unknown_operators_are_listed_if_they_have_weights():
    """Without MACs, which are not known."""
    b = Builder()
    x = b.node("Flatten", b.conv("image", 3, 2, 3, "conv"))
    b.node("CDist", x, b.weight("w", 10, 128), domain="com.microsoft", out="logits")
    model = b.model()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    layer = layers_of(model)["logits"]
    assert (layer.macs, layer.parameters) == (0, 1280)
    assert layer.reason == "an operator of com.microsoft, whose MACs are not known"


def test_macs_are_for_one_image():
    """Whatever the batch."""
    one = OnnxNetwork(read_model(networks.classifier()), np.zeros((7, 3, 8, 8), np.float32))
    two = OnnxNetwork(read_model(networks.classifier(batch=2)), np.zeros((7, 3, 8, 8), np.float32))
    assert [la.macs for la in one.layers] == [la.macs for la in two.layers]
    assert one.layers[0].macs == 12 * 3 * 9 * 64


def test_layers_say_why_they_are_kept():
    """Transposed, computed, reading one channel: each has its reason."""
    assert layers_of(networks.restorer())["mask"].reason == "transposed convolution"
    assert (
        layers_of(networks.computed_weight())["computed"].reason == "its weights are computed, not constant"
    )
    b = Builder()
    b.classifier(b.conv(b.node("ReduceMean", "image", axes=[1]), 1, 8, 3, "grey"), 8)
    assert layers_of(b.model())["grey"].reason == "reads a single channel"


def test_a_layer_that_sees_more_maps_than_images_is_kept():
    """Images cut into patches that are convolved on their own: its costs are counted, it is left alone."""
    b = Builder()
    x = b.node("Reshape", "image", b.constant("cut", [-1, 3, 4, 8], np.int64))
    x = b.conv(x, 3, 8, 3, "patchwise")
    x = b.node("Reshape", x, b.constant("join", [-1, 16, 4, 8], np.int64))
    b.classifier(b.conv(x, 16, 8, 3, "whole"), 8)
    layers = layers_of(b.model())
    assert layers["patchwise"].reason == "it does not see one map per image"
    assert layers["patchwise"].macs == 8 * 3 * 9 * 64
    assert layers["whole"].reason == ""


def test_a_transposed_convolution_counts_its_input_pixels():
    """One multiply-add per weight and input pixel."""
    mask = layers_of(networks.restorer())["mask"]
    assert (mask.macs, mask.parameters) == (8 * 4 * 10 * 14, 8 * 4)


def test_dynamic_size_with_strided_same_padding_is_kept():
    """Its pads depend on the image size; at stride 1 they do not."""
    b = Builder()
    x = b.conv("image", 3, 8, 3, "one", auto_pad="SAME_UPPER")
    b.conv(x, 8, 8, 3, "two", auto_pad="SAME_LOWER", strides=[2, 2])
    layers = layers_of(b.model([("two", ("N", 8, "H", "W"))], ("N", 3, "H", "W")))
    assert layers["one"].reason == ""
    assert "SAME_LOWER" in layers["two"].reason


def test_nodes_without_names_are_named_after_their_outputs():
    """The operator and what it puts out, which no two nodes share."""
    assert list(layers_of(networks.without_names())) == ["Conv:bn1", "Conv:bn2", "Conv:bn3", "Gemm:logits"]


# --- writing


def test_write_replaces_in_one_step(tmp_path: Path):
    """A file is there afterwards, readable by all, and nothing else; what was there is gone."""
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    write_model(networks.classifier(), target)
    assert onnx.load(target) == networks.classifier()
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


def test_write_refuses_another_ending(tmp_path: Path):
    """No runtime would take it for an ONNX file."""
    for name in ("out.tflite", "out.pt", "out"):
        with pytest.raises(OutputError, match=r"write .*out\.onnx"):
            write_model(networks.classifier(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_write_keeps_what_was_there_if_the_file_is_not_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What cannot be read back as it was never gets the name."""
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")
    save = onnx.save_model

    def spoil(model: onnx.ModelProto, path: Path, **options: object) -> None:
        other = onnx.ModelProto()
        other.CopyFrom(model)
        other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
        save(other, path, **options)

    monkeypatch.setattr(onnx, "save_model", spoil)
    with pytest.raises(ModelError, match="another network once written"):
        write_model(networks.classifier(), target)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_write_large_models_with_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beyond what protobuf can hold the weights go beside the file, under a name that stays valid."""
    monkeypatch.setattr("netdecouple.runtimes.onnxfile.PROTOBUF_LIMIT", 1000)
    model = networks.classifier()
    write_model(model, tmp_path / "out.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    images = images_for(model)
    np.testing.assert_array_equal(
        outputs_of(onnx.load(tmp_path / "out.onnx"), images)[0], outputs_of(networks.classifier(), images)[0]
    )
    assert read_model(tmp_path / "out.onnx").fingerprint == read_model(networks.classifier()).fingerprint


def test_write_leaves_the_proto_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also when its weights go to another file."""
    monkeypatch.setattr("netdecouple.runtimes.onnxfile.PROTOBUF_LIMIT", 1000)
    model = networks.classifier()
    write_model(model, tmp_path / "out.onnx")
    assert model == networks.classifier()
