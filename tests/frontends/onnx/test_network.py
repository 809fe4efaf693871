"""An ONNX network at work: run, observe, walk, decouple."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import netdecouple
from netdecouple.convolution import ConvStage, Factorization
from netdecouple.errors import ModelError, OutputError
from netdecouple.execution.memory import ArrayStore, Memory
from netdecouple.families import Problem, nd
from netdecouple.families.cd import ChannelDecomposition
from netdecouple.frontends.onnx.emission import FORMS
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import ExternalWeights, OnnxNetwork
from netdecouple.frontends.onnx.proto import up_to
from netdecouple.frontends.onnx.walk import OnnxWalk
from netdecouple.network import ONE_BY_ONE, Layer, Walk
from netdecouple.runtimes.onnxruntime import open_session, run
from tests import networks
from tests.networks import Builder, images_for


def opened(model: onnx.ModelProto) -> OnnxNetwork:
    return OnnxNetwork(read_model(model), images_for(model))


def can_change(network: OnnxNetwork) -> list[Layer]:
    return [la for la in network.layers if la.geometry is not None and not la.reason]


def positions_of(network: OnnxNetwork, count: int, p: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {la.name: rng.integers(0, np.prod(la.output_size), (count, p)) for la in can_change(network)}


def full_rank(layer: Layer) -> Factorization:
    """The lossless expansion of a layer."""
    assert layer.geometry is not None
    g = layer.geometry
    rank = min(g.kh * g.kw, g.n_o // g.groups)
    problem = Problem.data_free(g, layer.weight, layer.bias)
    return nd.fit(problem, np.full(g.n_i, rank), sweeps=0).astype(np.float32)


def low_rank(layer: Layer) -> Factorization:
    """Ranks that differ per channel, 0 included where there is more than one channel in a group."""
    assert layer.geometry is not None
    g = layer.geometry
    ranks = np.tile(np.arange(g.n_i // g.groups) % 3, g.groups)
    ranks[:: g.n_i // g.groups] += g.n_i // g.groups < 2
    ranks = np.minimum(ranks, g.kh * g.kw)
    problem = Problem.data_free(g, layer.weight, layer.bias)
    return nd.fit(problem, ranks, sweeps=0).astype(np.float32)


def tolerance(network: OnnxNetwork) -> float:
    """Float16 rounds wherever a session begins or ends, or stages follow each other."""
    return 1e-2 if any(la.weight.dtype == np.float16 for la in network.layers) else 1e-4


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-4) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))


# --- running


@pytest.mark.parametrize("count", [2, 5, 6])
def test_a_fixed_batch_takes_any_number_of_images(count: int):
    """The last batch is filled up, and what that adds is taken away again."""
    images = images_for(networks.classifier(), count)
    expected = opened(networks.classifier()).run(images)
    network = opened(networks.classifier(batch=4))
    assert_same(network.run(images), expected, 1e-6)
    assert_sees(network.walk(images), "conv2", network, images, 1e-6)
    seen = {
        la: np.concatenate([s.outputs for s in network.observe(images, {la: np.zeros((count, 1), int)})])
        for la in ("conv1", "conv2")
    }
    assert {name: len(outputs) for name, outputs in seen.items()} == {"conv1": count, "conv2": count}


@pytest.mark.parametrize("form", FORMS)
def test_names_that_are_taken_are_not_used(form):
    """Another node, a tensor and a weight are already called as the stages of a layer would be."""
    plain = opened(networks.classifier())
    factorizations = {la.name: low_rank(la) for la in can_change(plain)}
    expected = plain.build(factorizations, dict.fromkeys(factorizations, form))
    used = sorted({name for node in expected.graph.node for name in (node.name, *node.input, *node.output)})
    used = [name for name in used if name.startswith("conv2/")]
    model = networks.classifier()
    for name in used:
        model.graph.node.insert(0, helper.make_node("Abs", ["image"], [name], name=name))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    network = opened(model)
    built = network.build(factorizations, dict.fromkeys(factorizations, form))
    images = images_for(networks.classifier())
    assert_same(network.run_built(built, images)[:1], plain.run_built(expected, images))
    walk = network.walk(images)
    for name, factorization in factorizations.items():
        walk.advance(name)
        walk.replace(name, factorization)


def test_outputs_without_a_batch_axis_are_returned():
    """Boxes of the whole batch in one list, and a scalar."""
    network = opened(networks.detector())
    boxes, best = network.run(images_for(networks.detector(), 3))
    assert boxes.shape == (3 * 64, 4)
    assert best.shape == (1,)


@pytest.mark.parametrize("batch", ["N", 4])
def test_outputs_need_not_begin_with_the_images(batch):
    """A sequence head, (time, N, classes), comes out with images first, whatever the batches."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 8, 3, "conv"))
    rows = b.node("ReduceMean", x, axes=[2], keepdims=0)
    b.node("Transpose", rows, out="sequence", perm=[2, 0, 1])
    b.node("Identity", b.constant("anchors", np.eye(5)), out="boxes")
    model = b.model([("sequence", ("T", batch, 8)), ("boxes", (5, 5))], (batch, 3, 6, 9))
    images = images_for(model, 6)
    network = OnnxNetwork(read_model(model), images, Memory(batch_bytes=170_000 // 16))
    assert network.batches(6) == [slice(0, 4), slice(4, 6)]
    outputs = network.run(images)
    assert outputs[0].shape == (6, 9, 8)
    for i in (0, 3, 4, 5):
        alone = network.run(np.repeat(images[i : i + 1], 4, axis=0))[0][0]
        np.testing.assert_allclose(outputs[0][i], alone, atol=1e-5)


def test_outputs_that_are_no_numbers_are_left_out():
    """Names of classes; a network that says nothing else is refused."""
    for others in ([], [("logits", ("N", 10))]):
        b = Builder()
        b.classifier(b.node("Relu", b.conv("image", 3, 8, 3, "conv")), 8)
        best = b.node("ArgMax", "logits", axis=1, keepdims=0)
        names = [f"class {i}" for i in range(10)]
        b.initializers.append(helper.make_tensor("names", TensorProto.STRING, [10], names))
        b.node("Gather", "names", best, out="name")
        model = b.model([*others, ("name", ("N",))])
        model.graph.output[-1].type.tensor_type.elem_type = TensorProto.STRING
        network = opened(model)
        if others:
            assert [o.shape for o in network.run(images_for(model, 3))] == [(3, 10)]
        else:
            with pytest.raises(ModelError, match="none of its outputs \\(name\\) are numbers"):
                network.run(images_for(model, 3))


def test_sequences_across_a_layer_are_told():
    """They cannot be held where the network is cut."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 8, 3, "conv1"))
    parts = b.node("SplitToSequence", x, b.constant("size", 4, np.int64), axis=1, out="parts")
    x = b.node("Relu", b.conv(x, 8, 8, 3, "conv2"))
    part = b.node("SequenceAt", parts, b.constant("first", 0, np.int64))
    b.classifier(b.node("Concat", x, part, axis=1), 12)
    model = b.model()
    walk = opened(model).walk(images_for(model))
    with pytest.raises(ModelError, match="'parts', needed on both sides of a layer, is a sequence"):
        walk.advance("conv2")


def test_batches_hold_bounded_memory():
    """Large activations mean small batches; every image is in exactly one."""
    network = opened(networks.classifier())
    batches = network.batches(300, bytes_per_image=64 << 20)
    assert {b.stop - b.start for b in batches} == {4}
    assert [i for b in batches for i in range(300)[b]] == list(range(300))


def test_run_takes_other_kernels():
    """A layer with other weights and bias, computed by NumPy; the network itself stays as it is."""
    b = Builder()
    b.conv("image", 3, 8, 3, "conv")
    model = b.model([("conv", ("N", 8, "h", "w"))])
    network, images = opened(model), images_for(model)
    (layer,) = network.layers
    weight, bias = -layer.weight, layer.bias + 1
    before = network.run(images)[0]
    after = network.run(images, {layer.name: (weight, bias)})[0]
    (seen,) = network.observe(images, {layer.name: np.tile(np.arange(before[0, 0].size), (len(images), 1))})
    expected = seen.patches[:, 0] @ weight.reshape(len(weight), -1).T + bias
    np.testing.assert_allclose(np.moveaxis(after, 1, -1).reshape(-1, 8), expected, atol=1e-4)
    np.testing.assert_array_equal(network.run(images)[0], before)


def test_run_says_what_does_not_fit():
    """Images of the wrong shape give a ModelError of one line, not a runtime's traceback."""
    network = opened(networks.classifier())
    with pytest.raises(ModelError, match="the network failed on its input"):
        network.run(np.zeros((2, 3, 9, 8), np.float32))


def shaped(
    shape: list[int], pooled: bool = False, size: int = 8, sides: object = 8, batch: object = "N"
) -> onnx.ModelProto:
    """A classifier that reshapes its features, or its scores, to a fixed shape."""
    b, n = Builder(), 10 if pooled else 12
    x = b.node("Relu", b.conv("image", 3, 16, 3, "first"))
    x = b.conv(x, 16, n, 3, "second")
    x = b.node("GlobalAveragePool", x) if pooled else b.node("Relu", x)
    b.initializers.append(numpy_helper.from_array(np.array(shape, np.int64), "shape"))
    x = b.node("Reshape", x, "shape", out="logits" if pooled else "")
    if not pooled:
        b.node("Gemm", x, b.weight("w", n * size**2, 10), out="logits")
    return b.model([("logits", (1, 10))], (batch, 3, sides, sides))


@pytest.mark.parametrize(
    "model",
    [shaped([1, -1]), shaped([1, 768]), shaped([1, -1], pooled=True), shaped([1, 10], pooled=True)],
    ids=["unknown", "fixed", "scores", "fixed scores"],
)
def test_a_network_that_takes_one_image_at_a_time(model: onnx.ModelProto):
    """Whatever its input says: two fail, or come out as one. It is run so, and that is said."""
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    network = OnnxNetwork(read_model(model), images)
    assert (network.model.batch, network.notes) == (1, (ONE_BY_ONE,))
    session = open_session(model)
    each = [run(session, None, {"image": image[None]})[0] for image in images]
    np.testing.assert_allclose(network.run(images)[0], np.concatenate(each), atol=1e-5)


def test_that_a_network_takes_one_image_at_a_time_is_in_the_report():
    settings = netdecouple.Settings(data_free=True, families=("nd-dp",))
    report = netdecouple.decouple(shaped([1, 10], pooled=True), macs="80%", settings=settings).report
    assert ONE_BY_ONE in report.warnings


def test_other_networks_keep_their_batch():
    for model in (networks.classifier(), networks.classifier(batch=2), shaped([-1, 768])):
        network = opened(model)
        assert (network.model.batch, network.notes) == (read_model(model).batch, ())


def test_the_one_size_of_an_open_one_is_in_the_message():
    """What its fully connected layer was made for."""
    for batch in ("N", 1, 2):
        with pytest.raises(ModelError, match="input_size=32"):
            opened(shaped([1 if batch == "N" else batch, -1], size=32, sides="S", batch=batch))
    model = shaped([1, -1], size=32, sides="S")
    with pytest.raises(
        ModelError, match=r"fails on images of 10x14, .* 32x32; give input_size=32, or arrays"
    ):
        opened(model)
    images = np.zeros((2, 3, 32, 32), np.float32)
    assert OnnxNetwork(read_model(model), images).model.batch == 1
    with pytest.raises(ModelError, match="the network failed on its input"):
        opened(shaped([1, -1], size=11, sides="S"))


# --- observing


@pytest.mark.parametrize(
    "make",
    [networks.kinds, networks.residual, networks.restorer, networks.with_if, networks.perceptron],
)
def test_observed_patches_give_the_outputs(make):
    """weight @ patch + bias is what the layer put out at that position, for every kind of convolution."""
    network = opened(make())
    images = images_for(make())
    layers = {la.name: la for la in network.layers}
    found = set()
    for seen in network.observe(images, positions_of(network, len(images))):
        layer = layers[seen.layer]
        g = layer.geometry
        weight = layer.weight.reshape(g.groups, g.n_o // g.groups, -1)
        outputs = np.einsum("god,ngd->ngo", weight, seen.patches).reshape(len(seen.patches), -1)
        np.testing.assert_allclose(outputs + layer.bias, seen.outputs, atol=1e-4)
        assert np.ptp(seen.outputs) > 0
        found.add(seen.layer)
    assert found == {la.name for la in can_change(network)}


def test_observed_positions_are_those_asked_for():
    """In order, image by image, batch by batch."""
    network = opened(networks.restorer())
    images = images_for(networks.restorer(), 150)  # two batches
    where = positions_of(network, 150, 3)["tail"]
    seen = list(network.observe(images, {"tail": where}))
    assert [s.images for s in seen] == [slice(0, 128), slice(128, 150)]
    restored = network.run(images)[0]
    flat = (restored - images).reshape(150, 3, -1)  # the tail's own output: the skip is the image
    expected = np.stack([flat[i][:, p] for i in range(150) for p in where[i]])
    np.testing.assert_allclose(np.concatenate([s.outputs for s in seen]), expected, atol=1e-5)


def test_observed_shortcuts_are_what_is_added():
    """The sum behind the block is the layer's output plus its shortcut."""
    network = opened(networks.residual())
    images = images_for(networks.residual())
    tensors = ["b2.sum"]
    proto = onnx.ModelProto()
    proto.CopyFrom(network.model.proto)
    proto.graph.output.append(onnx.ValueInfoProto(name=tensors[0]))
    total = run(open_session(proto), tensors, {"image": images})[0].reshape(len(images), 12, -1)
    where = positions_of(network, len(images))["b2.second"]
    (seen,) = network.observe(images, {"b2.second": where})
    expected = np.stack([total[i][:, p] for i in range(len(images)) for p in where[i]])
    np.testing.assert_allclose(seen.outputs + seen.shortcut, expected, atol=1e-5)


@pytest.mark.parametrize("walking", [False, True])
def test_activations_that_are_not_finite_name_the_layer(walking: bool):
    """Inf on the way, clipped before the end: the layer that saw it is named."""
    b = Builder()
    x = b.node("Div", b.conv("image", 3, 8, 3, "first"), b.constant("zero", np.zeros((1, 8, 1, 1))))
    x = b.conv(x, 8, 8, 3, "second")
    b.classifier(b.node("Clip", x, b.constant("low", -1), b.constant("high", 1)), 8)
    network = opened(b.model())
    images = images_for(b.model())
    where = positions_of(network, len(images))
    first = network.walk(images) if walking else None
    observed = first.observe("second", where["second"]) if first else network.observe(images, where)
    with pytest.raises(ModelError, match=r"NaN or Inf in the activations of layer 'second'"):
        list(map(attrgetter("patches"), observed))


# --- shortcuts


def shortcuts(model: onnx.ModelProto) -> dict[str, str]:
    network = opened(model)
    found = {la.name: network.places[la.name].shortcut for la in can_change(network)}
    return {name: tensor for name, tensor in found.items() if tensor}


def test_shortcuts_of_residual_blocks_are_found():
    """Identity and projection, for the last convolution of each block only."""
    assert shortcuts(networks.residual()) == {
        "b1.second": "relu1",
        "b2.second": "b2.short",
        "b3.second": "b2.out",
    }


def test_additions_that_are_no_shortcuts_are_not_taken_for_any():
    """A broadcast gate or map, a doubled output, a constant, an output that others read, a later tensor."""
    assert shortcuts(networks.additions()) == {"late": "early"}


def test_the_image_is_no_shortcut():
    """A global skip adds the input, which decoupling never changes."""
    assert shortcuts(networks.restorer()) == {}


def test_an_output_read_by_a_branch_has_no_shortcut():
    """The subgraph of an If reads it too, so the sum is not all it is for."""
    model = networks.with_if()
    node = next(n for n in model.graph.node if n.op_type == "If")
    chosen = next(n for n in model.graph.node if list(n.input) == ["chosen", "last"])
    assert chosen.op_type == "Add"
    second = next(n for n in model.graph.node if n.output[0] == "recent")
    second.op_type = "Add"
    second.input.append("early")
    assert shortcuts(model) == {"second": "early"}
    branch = next(a.g for a in node.attribute if a.name == "else_branch")
    branch.node[0].input[1] = "second"
    assert shortcuts(model) == {}


def test_an_output_of_the_network_has_no_shortcut():
    """What the last convolution of a block puts out is asked for itself, not only the sum."""
    model = networks.residual()
    model.graph.output.append(helper.make_tensor_value_info("b1.second", TensorProto.FLOAT, ("N", 8, 8, 8)))
    assert sorted(shortcuts(model)) == ["b2.second", "b3.second"]


# --- walking


def assert_sees(walk: Walk, name: str, network: OnnxNetwork, images: np.ndarray, atol: float = 1e-4) -> None:
    """At a layer, the walk has computed what the network has, shortcuts included."""
    where = positions_of(network, len(images))[name]
    expected = list(network.observe(images, {name: where}))
    for one, other in zip(walk.observe(name, where), expected, strict=True):
        np.testing.assert_allclose(one.patches, other.patches, atol=atol)
        assert (one.shortcut is None) == (other.shortcut is None)
        if one.shortcut is not None:
            np.testing.assert_allclose(one.shortcut, other.shortcut, atol=atol)


def test_a_walk_sees_what_the_network_sees(model: onnx.ModelProto, images: np.ndarray):
    """Cut at every layer, the network computes what it computes in one piece."""
    network = opened(model)
    walk = network.walk(images)
    for layer in can_change(network):
        assert_sees(walk, layer.name, network, images, tolerance(network))


def test_a_walk_with_full_rank_factorizations_is_lossless(model: onnx.ModelProto, images: np.ndarray):
    """Every layer replaced by its exact expansion: what the layers behind it see stays."""
    network = opened(model)
    walk = network.walk(images)
    for layer in can_change(network):
        assert_sees(walk, layer.name, network, images, tolerance(network))
        walk.replace(layer.name, full_rank(layer))


def test_a_walk_computes_the_decoupled_network(model: onnx.ModelProto, images: np.ndarray):
    """With lossy stages in place, the last layer sees what it sees in the written model."""
    network = opened(model)
    walk = network.walk(images)
    *layers, last = can_change(network)
    chosen = {la.name: low_rank(la) for la in layers}
    for name, factorization in chosen.items():
        walk.advance(name)
        walk.replace(name, factorization)
    written = OnnxNetwork(read_model(network.build(chosen)), images)
    assert_sees(walk, last.name, written, images, 10 * tolerance(network))


def test_a_walk_may_skip_layers_and_dead_nodes():
    """Observing only the last layer runs everything before it; nodes nobody reads do no harm."""
    model = networks.half_precision()  # is not folded, so dead nodes stay
    model.graph.node.insert(0, onnx.helper.make_node("Relu", ["image"], ["dead"], name="dead"))
    network = opened(model)
    images = images_for(model)
    walk = network.walk(images)
    list(walk.observe("before", np.zeros((len(images), 1), int)))
    assert_sees(walk, "after", network, images, 1e-3)


def test_a_walk_takes_local_functions():
    """Where the network is not folded, calls of its own functions stay calls."""
    model = networks.half_precision()
    body = helper.make_function(
        "local", "Activate", ["x"], ["y"], [helper.make_node("Tanh", ["x"], ["y"])], list(model.opset_import)
    )
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type, node.domain = "Activate", "local"
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("local", 1))
    network = opened(model)
    assert {la.name for la in can_change(network)} == {"before", "half", "after", "logits"}
    images = images_for(model)
    assert_sees(network.walk(images), "after", network, images, 1e-3)


def walk_with(store: ArrayStore, network: OnnxNetwork, images: np.ndarray) -> OnnxWalk:
    return OnnxWalk(network.model, network.places, [(slice(0, len(images)), images)], store)


def test_a_walk_spills_to_disk(tmp_path: Path):
    """What memory should not hold is held in files, and what layers see stays."""
    network = opened(networks.residual())
    images = images_for(networks.residual(), 40)
    walk = walk_with(ArrayStore(10_000, tmp_path), network, images)
    assert len(list(tmp_path.rglob("*.npy"))) == 1  # the images
    for layer in can_change(network):
        assert_sees(walk, layer.name, network, images, 1e-5)


def test_a_walk_holds_live_tensors_only():
    """After every step the store holds what the rest of the network reads, and nothing else."""
    network = opened(networks.residual())
    store = ArrayStore(10**9)
    walk = walk_with(store, network, images_for(networks.residual()))
    walk.advance("b1.second")
    assert all((0, tensor) in store for tensor in ("relu1", "relu3"))
    assert len(store) == 2


# --- decoupling


def decoupled(model: onnx.ModelProto, metadata: Mapping[str, str] = {}, **options):
    network = opened(model)
    chosen = {la.name: low_rank(la) for la in can_change(network)}
    return network, network.build(chosen, metadata=metadata, **options)


def test_decoupled_keeps_the_interface(model: onnx.ModelProto):
    """Inputs, outputs, dynamic axes, opset and metadata; new metadata is added."""
    _, new = decoupled(model, {"netdecouple.version": "1", "classes": "eleven"})
    onnx.checker.check_model(new, full_check=True)
    for field in ("input", "output"):
        given, found = getattr(model.graph, field), getattr(new.graph, field)
        assert list(found) == list(given)[: len(found)]
    assert [v.name for v in new.graph.input] == ["image"]
    assert list(new.opset_import) == list(model.opset_import)
    metadata = {entry.key: entry.value for entry in new.metadata_props}
    assert metadata == {"classes": "eleven", "licence": "none", "netdecouple.version": "1"}


@pytest.mark.parametrize("form", FORMS)
def test_decoupled_computes_the_factorizations(model: onnx.ModelProto, images: np.ndarray, form):
    """The written network is the network with each layer's composed kernel, in every form."""
    network = opened(model)
    new = network.build(
        {la.name: low_rank(la) for la in can_change(network)}, {la.name: form for la in network.layers}
    )
    kernels = {}
    for layer in can_change(network):
        factorization = low_rank(layer)
        kernels[layer.name] = (factorization.dense(), factorization.bias)
    assert_same(network.run_built(new, images), network.run(images, kernels), tolerance(network))


def products_of(network: OnnxNetwork) -> list[Layer]:
    return [la for la in can_change(network) if la.operator != "Conv"]


def test_fully_connected_layers_become_pairs_of_matrix_products():
    """Exactly what they were at full rank; whatever was read and added around them stays."""
    network = opened(networks.perceptron())
    images = images_for(networks.perceptron())
    family = ChannelDecomposition()
    chosen = {}
    for layer in products_of(network):
        problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
        chosen[layer.name] = family.fit(problem, family.exact(layer.geometry)).astype(np.float32)
    assert list(chosen) == ["fc1", "fc2", "fc3", "logits"]
    new = network.build(chosen)
    operators = [n.op_type for n in new.graph.node]
    assert (operators.count("MatMul"), operators.count("Gemm")) == (5, 3)
    assert set(operators) == {"Conv", "Relu", "Flatten", "MatMul", "Gemm", "Add"}
    assert_same(network.run_built(new, images), network.run(images))


@pytest.mark.parametrize("batch", ["N", 3])
@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_fully_connected_layers_read_all_rows_of_an_image(operator: str, in_turns: bool, batch: str | int):
    """Rows belong to the right image, however they lie, and stay with it in every batch."""
    model = networks.columns(operator, in_turns, batch)
    images = images_for(model, 6)
    network = OnnxNetwork(read_model(model), images)
    layer = next(la for la in network.layers if la.name == "read")
    assert (layer.reason, layer.size, layer.is_linear) == ("", (8, 1), True)
    assert layer.macs == layer.geometry.macs(8, 1) == 8 * 16 * 24
    columns = open_session(up_to(model, ["columns"]))
    per_batch = [run(columns, None, {"image": batch})[0] for batch in np.split(images, 2)]
    positions = np.random.default_rng(0).integers(0, 8, (6, 5))
    expected = np.concatenate(per_batch)[np.arange(6)[:, None], :, positions].reshape(30, 16)
    observed = list(network.observe(images, {"read": positions}))
    patches = np.concatenate([o.patches for o in observed])[:, 0]
    np.testing.assert_allclose(patches, expected, atol=1e-5)
    outputs = np.concatenate([o.outputs for o in observed])
    np.testing.assert_allclose(outputs, patches @ layer.weight[:, :, 0, 0].T + layer.bias, atol=1e-4)
    walked = np.concatenate([o.patches for o in network.walk(images).observe("read", positions)])[:, 0]
    np.testing.assert_allclose(walked, patches, atol=1e-5)


@pytest.mark.parametrize("in_turns", [False, True])
@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_fully_connected_layers_on_many_rows_are_decomposed(operator: str, in_turns: bool):
    """A product of rank 3 becomes two products with a third of its MACs, which compute the same."""
    model = networks.columns(operator, in_turns)
    images = images_for(model, 12)
    settings = netdecouple.Settings(exclude=("conv", "letters"))
    result = netdecouple.decouple(model, images, macs="94%", settings=settings)
    row = next(row for row in result.plan.layers if row.name == "read")
    assert (row.family, row.macs) == ("cd", 8 * 3 * (16 + 24))
    session, whole = (open_session(m) for m in (result.model, model))
    assert_same(run(session, None, {"image": images}), run(whole, None, {"image": images}))


def test_fully_connected_layers_take_other_kernels():
    """With a bias where they had none, or one for all outputs."""
    network = opened(networks.perceptron())
    images = images_for(networks.perceptron())
    same = {la.name: (la.weight, la.bias) for la in products_of(network)}
    assert_same(network.run(images, same), network.run(images), 1e-6)
    for layer in products_of(network):
        weight, bias = 2 * layer.weight, layer.bias + 1
        written = network.build(
            {layer.name: Factorization(layer.geometry, (ConvStage(layer.geometry, weight),), bias)}
        )
        assert_same(network.run(images, {layer.name: (weight, bias)}), network.run_built(written, images))


def test_the_shortcut_of_a_fully_connected_layer_is_found():
    """Rows are added to rows as maps are to maps."""
    network = opened(networks.perceptron())
    assert [la.name for la in network.layers if network.places[la.name].shortcut] == ["fc3"]


def test_decoupled_changes_only_the_layers_named():
    """Every other node is as it was, and weights nobody reads any more are dropped."""
    network = opened(networks.classifier())
    before = network.model.proto.SerializeToString(deterministic=True)
    layer = network.layers[1]
    new = network.build({layer.name: low_rank(layer)})
    assert network.model.proto.SerializeToString(deterministic=True) == before
    kept = [n for n in new.graph.node if not n.name.startswith(f"{layer.name}/")]
    assert kept == [n for n in network.model.proto.graph.node if n.output[0] != "bn2"]
    read = {t for n in new.graph.node for t in n.input}
    assert {t.name for t in new.graph.initializer} <= read


def test_a_shared_weight_stays_for_the_layer_that_keeps_it():
    """Two layers read one initializer; decoupling one leaves it in place for the other."""
    network = opened(networks.shared_weight())
    images = images_for(networks.shared_weight())
    layers = {la.name: la for la in network.layers}
    for name in ("one", "two"):
        new = network.build({name: full_rank(layers[name])})
        assert "shared.weight" in {t.name for t in new.graph.initializer}
        assert_same(network.run_built(new, images), network.run(images))
    both = network.build({name: full_rank(layers[name]) for name in ("one", "two")})
    assert "shared.weight" not in {t.name for t in both.graph.initializer}


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_decoupled_models_keep_their_opset(opset: int):
    """And run at it, losslessly at full rank."""
    network = opened(networks.classifier(opset))
    images = images_for(networks.classifier())
    new = network.build({la.name: full_rank(la) for la in can_change(network)})
    assert [(o.domain, o.version) for o in new.opset_import] == [("", opset)]
    onnx.checker.check_model(new, full_check=True)
    assert_same(network.run_built(new, images), network.run(images))


def test_decoupled_networks_take_any_batch_and_size():
    """Dynamic axes stay dynamic in what they compute, not only in what they declare."""
    _, new = decoupled(networks.restorer())
    session = open_session(new)
    for shape in [(1, 3, 6, 6), (3, 3, 9, 17)]:
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        restored, mask = run(session, None, {"image": images})
        assert restored.shape == shape
        assert mask.shape == (shape[0], 1, 2 * shape[2], 2 * shape[3])


def test_a_decoupled_network_can_be_read_again():
    """Its layers are depthwise and pointwise now, and none is offered for network decoupling twice."""
    network, new = decoupled(networks.classifier())
    again = OnnxNetwork(read_model(new), images_for(networks.classifier()))
    assert can_change(again)
    assert all(la.geometry.is_pointwise for la in can_change(again))
    assert again.fingerprint != network.fingerprint


# --- pretrained networks


@pytest.mark.shared
@pytest.mark.parametrize("name", ["resnet20", "vgg16_cifar10"])
def test_pretrained_networks_are_walked_and_rebuilt_without_loss(shared: Path, name: str):
    """Folding, walking and full-rank stages keep what real networks put out."""
    model = onnx.load(shared / "models" / f"{name}.onnx")
    images = images_for(model, 4)
    network = opened(model)
    original = run(open_session(model), None, {model.graph.input[0].name: images})
    assert_same(network.run(images), original)
    assert_sees(network.walk(images), can_change(network)[-1].name, network, images)
    small = [la for la in can_change(network) if la.weight.size < 100_000]
    chosen = {la.name: full_rank(la) for la in small[::3]}
    assert_same(network.run_built(network.build(chosen), images), original, 1e-3)


@pytest.mark.shared
def test_the_shortcuts_of_resnet20_are_found(shared: Path):
    """One for the last convolution of each of its nine blocks."""
    assert len(shortcuts(onnx.load(shared / "models" / "resnet20.onnx"))) == 9


def test_large_weights_are_written_to_a_file(tmp_path: Path):
    """And no others; a model that was made of it is opened with them."""
    model = networks.classifier()
    images = images_for(model)
    external = ExternalWeights(model, tmp_path)
    outside = {t.name for t in external.proto.graph.initializer if t.external_data}
    assert outside == {t.name for t in model.graph.initializer if len(t.raw_data) >= 4096}
    assert sum(path.stat().st_size for path in tmp_path.rglob("weights")) >= 4096
    found, expected = (
        run(s, None, {"image": images}) for s in (external.opened(external.proto), open_session(model))
    )
    assert_same(found, expected, 1e-6)


def test_with_little_memory_weights_are_read_from_a_file(model: onnx.ModelProto):
    """Outputs, what layers see, and replaced kernels are the same as without."""
    images = images_for(model)
    plain, lean = (OnnxNetwork(read_model(model), images, r) for r in (Memory(), Memory(limit=10**9)))
    assert_same(lean.run(images), plain.run(images), 1e-6)
    layer = can_change(plain)[0]
    kernels = {layer.name: (layer.weight / 2, layer.bias)}
    assert_same(lean.run(images, kernels), plain.run(images, kernels), 1e-6)
    assert_same(lean.run_built(plain.build({}), images), plain.run(images), 1e-6)
    positions = positions_of(plain, len(images))
    for one, other in zip(plain.observe(images, positions), lean.observe(images, positions), strict=True):
        np.testing.assert_allclose(one.patches, other.patches, rtol=1e-6, atol=1e-6)


def test_no_room_for_weights_is_told(monkeypatch: pytest.MonkeyPatch):
    model = networks.classifier()
    network = OnnxNetwork(read_model(model), images_for(model), Memory(limit=10**9))

    def full(tensor: onnx.TensorProto) -> np.ndarray:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("netdecouple.frontends.onnx.network.numpy_helper.to_array", full)
    with pytest.raises(OutputError, match="no room for the model's weights"):
        network.run(images_for(model))


def test_models_beyond_protobuf_s_limit_are_decoupled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every place that asks for the limit takes the way of large models, from file to file."""
    model = networks.classifier()
    images = images_for(model, 20)
    settings = netdecouple.Settings(families=("nd",))
    expected = netdecouple.decouple(model, images, macs=0.6, settings=settings)
    monkeypatch.setattr("netdecouple.runtimes.onnxfile.PROTOBUF_LIMIT", 5000)
    onnx.save_model(
        model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=64
    )
    result = netdecouple.decouple(str(tmp_path / "net.onnx"), images, macs=0.6, settings=settings)
    assert [(row.family, row.sizes) for row in result.plan.layers] == [
        (row.family, row.sizes) for row in expected.plan.layers
    ]
    result.save(tmp_path / "faster.onnx")
    assert (tmp_path / "faster.onnx.data").exists()
    found = OnnxNetwork(read_model(tmp_path / "faster.onnx"), images).run(images)
    assert_same(found, OnnxNetwork(read_model(expected.model), images).run(images), 1e-4)
