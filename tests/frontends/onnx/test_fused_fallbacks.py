"""One file runs with the fused operator, and as well, if slower, where nobody knows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, inliner
from onnx.reference import ReferenceEvaluator

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry
from netdecouple.errors import ModelError, UnavailableError
from netdecouple.frontends.onnx.emission import emit
from netdecouple.frontends.onnx.fused import add_fallbacks, lower
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.runtimes import onnxruntime as runtime
from netdecouple.runtimes.onnxruntime import OVERLOADS, open_session, run
from tests import networks
from tests.frontends.onnx.test_fused import Graph, absorbed, decoupled
from tests.kernels.cases import COUNT, TOLERANCE, case, rows_of, separable
from tests.kernels.test_onnxruntime import CONSTANTS, fused, model_of, model_of_case

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
told_apart = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < OVERLOADS,
    reason="this ONNX Runtime does not tell functions of one name apart",
)


def stock(model: onnx.ModelProto) -> Any:
    """Open a model in an ONNX Runtime that was taught nothing."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model, with ranks for its inputs and outputs, which the checker wants; check it."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*copy.graph.input, *copy.graph.output):
        if not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * 4)
    onnx.checker.check_model(copy, full_check=True)
    return copy


@told_apart
def test_any_layer_runs_without_the_operator() -> None:
    """Groups, ranks 0 and uneven, strides, dilations, pads, slopes, limits, residuals."""
    for seed in range(0, COUNT, 15):
        one = case(seed)
        model = model_of_case(one)
        add_fallbacks(model)
        checked(model)
        feeds = {"x": one.x} if one.residual is None else {"x": one.x, "residual": one.residual}
        expected, scale = one.expected()
        for session in (stock(model), open_session(model)):
            found = session.run(None, feeds)[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale, err_msg=f"{seed}")


def layer(g: ConvGeometry, rows: np.ndarray) -> onnx.ModelProto:
    nodes, initializers = emit(separable(g, rows, np.random.default_rng(0)), "layer", "x", "y", "fused")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in initializers}
    model = model_of(nodes, constants, None, ("N", g.n_i, "H", "W"))
    add_fallbacks(model)
    return model


@told_apart
@pytest.mark.parametrize(
    ("g", "ranks"),
    [
        (ConvGeometry(5, 4, 3, 3), [2, 2, 2, 2]),
        (ConvGeometry(5, 4, 3, 3), [3, 0, 1, 2]),
        (ConvGeometry(6, 4, 3, 3, groups=2), [2, 1]),
        (ConvGeometry(6, 6, 3, 3, groups=2), [0, 3, 1]),
        (ConvGeometry(5, 4, 3, 2, (2, 1), (1, 0, 2, 1), (1, 2)), [1, 2, 1, 1]),
    ],
    ids=["plain", "uneven", "groups", "uneven in groups", "strides, pads, dilations"],
)
def test_batches_and_sizes_of_any_number(g: ConvGeometry, ranks: list[int]) -> None:
    """One session each, with and without the operator; rows in no order."""
    rng = np.random.default_rng(1)
    rows = rows_of(ranks, g.groups, rng)[:, rng.permutation(sum(ranks))]
    model = layer(g, rows)
    plain, taught = stock(model), open_session(model)
    for n, h, w in [(1, 7, 8), (3, 12, 6), (2, 7, 8)]:
        x = rng.standard_normal((n, g.n_i, h, w), np.float32)
        (found,), (expected,) = plain.run(None, {"x": x}), taught.run(None, {"x": x})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@told_apart
@pytest.mark.parametrize(
    ("follow", "opset"),
    [
        (lambda b, x: b.node("Relu", b.node("Add", x, "image"), out="y"), 17),
        (lambda b, x: b.node("Add", "image", x, out="y"), 17),
        (lambda b, x: b.node("LeakyRelu", x, out="y", alpha=0.3), 17),
        (lambda b, x: b.node("PRelu", x, b.constant("s", b.rng.standard_normal((4, 1, 1))), out="y"), 17),
        (lambda b, x: b.node("Clip", x, b.constant("low", -1.0), b.constant("high", 0.5), out="y"), 17),
        (lambda b, x: b.node("Clip", x, "", b.constant("high", 0.5), out="y"), 17),
        (lambda b, x: b.node("Clip", x, b.constant("low", -0.5), out="y"), 17),
        (lambda b, x: b.node("Clip", x, out="y", min=-1.0, max=0.5), 10),
    ],
)
def test_what_was_absorbed_is_in_the_function(follow: Callable[[Graph, str], str], opset: int) -> None:
    """Residual, slope, limits; also as operators were before opset 11."""
    b = Graph()
    follow(b, b.fused())
    model = b.finished(opset=opset)
    assert absorbed(model) == ["DecoupledConv"]
    add_fallbacks(model)
    x = networks.images_for(model)
    (expected,) = open_session(model).run(None, {"image": x})
    for found in (
        stock(model).run(None, {"image": x})[0],
        ReferenceEvaluator(inliner.inline_local_functions(checked(model))).run(None, {"image": x})[0],
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@told_apart
def test_whole_networks_run_without_the_operator(network_maker: Callable[[], onnx.ModelProto]) -> None:
    """The file that is written is the same for both."""
    model, images = decoupled(network_maker, "fused")
    feeds = {"image": images[:1]}
    onnx.checker.check_model(model, full_check=True)
    expected, found = run(open_session(model), None, feeds), stock(model).run(None, feeds)
    lowered = stock(lower(model)).run(None, feeds)
    for a, b, c in zip(found, expected, lowered, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1))
        np.testing.assert_allclose(a, c, rtol=0, atol=1e-6 * max(np.abs(c).max(), 1))


def test_a_network_runs_in_the_reference_evaluator() -> None:
    """Once its functions are inlined: by itself it does not tell them apart, and refuses the file."""
    model, images = decoupled(networks.residual, "fused")
    (expected,) = open_session(model).run(None, {"image": images})
    inlined = inliner.inline_local_functions(model)
    (found,) = ReferenceEvaluator(inlined).run(None, {"image": images})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(RuntimeError, match="number of inputs"):
        ReferenceEvaluator(model).run(None, {"image": images})


@pytest.mark.parametrize("last", [False, True])
def test_runtimes_that_take_one_function_for_all_refuse_the_file(last: bool) -> None:
    """ONNX Runtime before 1.27 takes the last; no result is better than a wrong one."""
    model, _ = decoupled(networks.residual, "fused")
    taken = onnx.FunctionProto.FromString(model.functions[-1 if last else 0].SerializeToString())
    taken.overload = ""
    for node in model.graph.node:
        node.overload = ""
    del model.functions[:]
    model.functions.append(taken)
    with pytest.raises(Exception, match="this_runtime_cannot_tell_overloads_apart"):
        stock(model)


def wrong() -> tuple[onnx.ModelProto, np.ndarray]:
    """A network whose functions say twice of what the operator computes, and images for it."""
    b = Graph()
    b.node("Sigmoid", b.fused(), out="y")
    model = b.finished(("y", "conv"))
    add_fallbacks(model)
    for function in model.functions:
        function.node[-1].output[0] = "half"
        function.node.append(helper.make_node("Add", ["half", "half"], ["y"]))
    return model, networks.images_for(model)


@told_apart
def test_where_the_operator_is_known_it_is_used() -> None:
    """And not what the function says; without it, that."""
    model, x = wrong()
    taught, plain = (s.run(None, {"image": x})[1] for s in (open_session(model), stock(model)))
    np.testing.assert_allclose(plain, 2 * taught, rtol=1e-4, atol=1e-4)


def test_the_same_network_is_the_same_file() -> None:
    first, second = (decoupled(networks.residual, "fused")[0] for _ in range(2))
    assert first.SerializeToString() == second.SerializeToString()
    assert first.ir_version == 10


def test_adding_again_changes_nothing() -> None:
    """Functions that are there are replaced."""
    model, _ = decoupled(networks.residual, "fused")
    before = model.SerializeToString()
    add_fallbacks(model)
    assert model.SerializeToString() == before


def test_networks_of_standard_operators_get_none() -> None:
    """Nor another IR version."""
    model, _ = decoupled(networks.residual, "parallel")
    assert not model.functions
    assert model.ir_version == 8


def test_nodes_of_one_name_or_none_have_functions_of_their_own() -> None:
    nodes = [fused(["x", *CONSTANTS]) for _ in range(3)]
    for node, (name, output) in zip(nodes, [("n", "a"), ("n", "b"), ("", "y")], strict=True):
        node.name, node.output[0] = name, output
    model = model_of(nodes, CONSTANTS)
    add_fallbacks(model)
    assert [node.overload for node in model.graph.node] == ["n", "n_2", "y"]
    assert [function.overload for function in model.functions][1:-1] == ["n", "n_2", "y"]
    checked(model)


def test_other_functions_stay() -> None:
    model, _ = decoupled(networks.residual, "fused")
    theirs = helper.make_function("theirs", "F", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], [])
    model.functions.insert(0, theirs)
    add_fallbacks(model)
    assert model.functions[0] == theirs
    assert lower(model).functions == [theirs]


def test_weights_that_are_computed_are_refused() -> None:
    """With the layer's name."""
    rest = {name: array for name, array in CONSTANTS.items() if name != "bias"}
    with pytest.raises(ModelError, match=r"'layer'.*'bias' is computed"):
        add_fallbacks(model_of([fused(["x", *CONSTANTS])], rest, {"bias": onnx.TensorProto.FLOAT}))


# --- where the library was not built


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library_path", lambda: None)


@told_apart
def test_a_network_opens_without_the_library(not_built: None, tmp_path: Path) -> None:
    """As a file and from memory; with the functions' results, and a warning that they are slower."""
    model, x = wrong()
    onnx.save(model, tmp_path / "wrong.onnx")
    (_, expected) = stock(model).run(None, {"image": x})
    for source in (model, tmp_path / "wrong.onnx"):
        with pytest.warns(kernels.MissingOperatorWarning, match=r"not built.*slower"):
            session = open_session(source)
        np.testing.assert_array_equal(session.run(None, {"image": x})[1], expected)


def test_a_network_without_functions_says_what_is_missing(not_built: None) -> None:
    """One function missing is enough."""
    model, _ = decoupled(networks.residual, "fused")
    del model.functions[1]
    with pytest.raises(UnavailableError, match="was not built"):
        open_session(model)


def test_so_does_a_runtime_that_cannot_tell_functions_apart(
    not_built: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = decoupled(networks.residual, "fused")
    monkeypatch.setattr(runtime.ort, "__version__", "1.26.3")
    with pytest.raises(UnavailableError, match="was not built"):
        open_session(model)


@told_apart
def test_a_network_is_the_same_to_read_and_write_without_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers, MACs, outputs, and the file once written: nothing depends on what is installed."""
    model, images = decoupled(networks.residual, "fused")
    layers, results, written = [], [], []
    for path in (kernels.library_path(), None):
        monkeypatch.setattr(kernels, "library_path", lambda path=path: path)
        network = OnnxNetwork(read_model(model), images)
        layers.append([(la.name, la.operator, la.macs, la.reason) for la in network.layers])
        results.append(network.run(images)[0])
        written.append(network.build({}))
        last = next(la for la in reversed(network.layers) if la.geometry is not None and not la.reason)
        where = np.zeros((len(images), 1), int)
        (found,) = network.walk(images).observe(last.name, where)
        (expected,) = network.observe(images, {last.name: where})
        np.testing.assert_allclose(found.patches, expected.patches, rtol=0, atol=1e-5)
    assert layers[0] == layers[1]
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5)
    for again in written:
        assert list(again.functions) == list(model.functions)
        assert [n.overload for n in again.graph.node if n.domain] == [
            n.overload for n in model.graph.node if n.domain
        ]
        outputs = stock(again).run(None, {"image": images})[0]
        np.testing.assert_allclose(outputs, results[0], rtol=0, atol=1e-5)
