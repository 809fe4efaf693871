"""The operator inside ONNX Runtime: right results, however it is run, and exceptions for what is wrong."""

from __future__ import annotations

import gc
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry
from netdecouple.frontends.onnx.emission import Form, emit
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from tests.kernels.cases import COUNT, TOLERANCE, Case, case, rows_of, separable

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
CONSTANTS = {
    "depthwise": np.ones((4, 1, 3, 3), np.float32),
    "pointwise": np.ones((5, 4, 1, 1), np.float32),
    "bias": np.ones(5, np.float32),
}
ATTRIBUTES: dict[str, Any] = {"in_channels": 4, "channels": [0, 0, 1, 3], "pads": [1, 1, 1, 1]}


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    inputs: dict[str, int] | None = None,
    x_shape: tuple[Any, ...] | None = ("N", 4, "H", "W"),
) -> onnx.ModelProto:
    """A model x → y; ``inputs`` are those beside x, of any shape."""
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in (inputs or {}).items()]
    if "x" not in (inputs or {}):
        values.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape))
    graph = helper.make_graph(
        nodes,
        "layers",
        values,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("netdecouple", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def fused(inputs: list[str], **attributes: Any) -> onnx.NodeProto:
    """One node of the operator; an attribute that is None is left out."""
    given = {name: value for name, value in (ATTRIBUTES | attributes).items() if value is not None}
    return helper.make_node("DecoupledConv", inputs, ["y"], "layer", domain="netdecouple", **given)


def session_of(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    for _ in range(2):  # the second time changes nothing
        kernels.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def model_of_case(one: Case) -> onnx.ModelProto:
    """A layer with all it can have, as one node."""
    nodes, initializers = emit(one.factorization, "layer", "x", "y", "fused")
    (node,) = nodes
    slope = "" if one.slope is None else "slope"
    node.input.extend([slope] if one.residual is None else [slope, "residual"])
    constants = {t.name: numpy_helper.to_array(t) for t in initializers}
    if one.slope is not None:
        constants["slope"] = one.slope
    for name, limit in zip(("minimum", "maximum"), one.limits, strict=True):
        if np.isfinite(limit):
            node.attribute.append(helper.make_attribute(name, limit))
    extra = {} if one.residual is None else {"residual": TensorProto.FLOAT}
    return model_of(nodes, constants, extra, ("N", one.factorization.geometry.n_i, "H", "W"))


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_come_out_as_in_float64(threads: int) -> None:
    """With optional inputs there, absent, and given as empty names; one thread or several."""
    for seed in range(0, COUNT, 15):
        one = case(seed)
        feeds = {"x": one.x} if one.residual is None else {"x": one.x, "residual": one.residual}
        (y,) = session_of(model_of_case(one), threads).run(None, feeds)
        expected, scale = one.expected()
        np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * scale, err_msg=f"case {seed}")


def chain(form: Form, sizes: list[tuple[int, int, int]]) -> onnx.ModelProto:
    """Layers (n_i, n_o, rank) in a row, in a form; the same numbers in every form."""
    rng = np.random.default_rng(3)
    nodes, initializers, x = [], [], "x"
    for index, (n_i, n_o, rank) in enumerate(sizes):
        g = ConvGeometry(n_o, n_i, 3, 3, pads=(1, 1, 1, 1))
        made = separable(g, rows_of([rank] * n_i, 1, rng), rng)
        y = "y" if index == len(sizes) - 1 else f"x{index}"
        more = emit(made, f"layer{index}", x, y, form)
        nodes, initializers, x = nodes + more[0], initializers + more[1], y
    constants = {t.name: numpy_helper.to_array(t) for t in initializers}
    return model_of(nodes, constants, x_shape=("N", sizes[0][0], "H", "W"))


# the last has so many weights, and on small maps so few tiles, that threads share out its output channels
SIZES = [(8, 24, 2), (24, 70, 4), (70, 300, 4)]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_of_any_input_size_agrees_with_standard_operators(threads: int) -> None:
    """One session, many batch and image sizes, as the fused and as the parallel form."""
    ours, theirs = (session_of(chain(form, SIZES), threads) for form in ("fused", "parallel"))
    rng = np.random.default_rng(0)
    for n, h, w in [(1, 5, 4), (3, 1, 1), (2, 17, 30), (1, 2, 300), (1, 5, 4), (5, 9, 9)]:
        x = rng.standard_normal((n, 8, h, w), np.float32)
        (y,), (expected,) = ours.run(None, {"x": x}), theirs.run(None, {"x": x})
        np.testing.assert_allclose(y, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("threads", [1, 2])
def test_one_session_may_be_run_by_several_threads_at_once(threads: int) -> None:
    """Every caller gets the result of its own input, bit by bit what it gets alone."""
    session = session_of(chain("fused", SIZES), threads)
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((1, 8, 8 + i % 5, 9 + i % 3), np.float32) for i in range(16)]
    alone = [session.run(None, {"x": x})[0] for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            for y, expected in zip(
                pool.map(lambda x: session.run(None, {"x": x})[0], xs), alone, strict=True
            ):
                np.testing.assert_array_equal(y, expected)


def test_sessions_may_be_opened_by_several_threads_at_once() -> None:
    """Registering is safe as well, and one registration serves many sessions."""
    model = model_of([fused(["x", *CONSTANTS])], CONSTANTS)
    x = np.ones((1, 4, 3, 3), np.float32)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: session_of(model).run(None, {"x": x})[0], range(40)))
    assert all((y[:, :, 1, 1] == 37).all() for y in results)


def resident() -> int:
    """Bytes of memory in use by this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("what", ["good", "refused at opening", "refused at running"])
def test_hundreds_of_sessions_leave_nothing_behind(what: str) -> None:
    """Layers of 100 kB each, opened and closed; also where the operator refuses them."""
    rng = np.random.default_rng(0)
    constants = {
        "depthwise": rng.standard_normal((64, 1, 3, 3), np.float32),
        "pointwise": rng.standard_normal((384, 64, 1, 1), np.float32),
        "bias": rng.standard_normal(384, np.float32),
    }
    channels = [4 if what == "refused at opening" else 0] * 64
    model = model_of([fused(["x", *constants], channels=channels)], constants, x_shape=None)
    x = np.zeros((1, 3 if what == "refused at running" else 4, 4, 4), np.float32)

    def use(times: int) -> None:
        for _ in range(times):
            with nullcontext() if what == "good" else pytest.raises(Exception, match="DecoupledConv"):
                session_of(model).run(None, {"x": x})

    use(100)
    gc.collect()
    before = resident()
    use(300)
    gc.collect()
    assert resident() - before < 3_000_000  # leaked layers would make it 30 MB


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


# what is wrong: the message, attributes and constants that differ
WRONG: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]] = {
    "no in_channels": ("attribute in_channels is missing", {"in_channels": None}, {}),
    "no channels": ("attribute channels is missing", {"channels": None}, {}),
    "negative in_channels": ("must be positive", {"in_channels": -4}, {}),
    "huge in_channels": ("too large", {"in_channels": 1 << 60}, {}),
    "too few channels": ("channels must have 4 values, not 3", {"channels": [0, 0, 1]}, {}),
    "channel too large": ("a row reads a channel", {"channels": [0, 1, 2, 4]}, {}),
    "negative channel": ("a row reads a channel", {"channels": [0, 1, 2, -1]}, {}),
    "huge channel": ("a row reads a channel", {"channels": [0, 1, 2, 1 << 62]}, {}),
    "one stride": ("strides must have 2 values, not 1", {"strides": [1]}, {}),
    "three dilations": ("dilations must have 2 values, not 3", {"dilations": [1, 1, 1]}, {}),
    "two pads": ("pads must have 4 values, not 2", {"pads": [1, 1]}, {}),
    "no stride": ("strides and dilations must be positive", {"strides": [0, 1]}, {}),
    "negative pad": ("pads must not be negative", {"pads": [0, 0, -1, 0]}, {}),
    "huge pad": ("pads", {"pads": [0, 0, 1 << 60, 0]}, {}),
    "group that does not divide": ("pointwise weight has shape", {"group": 3}, {}),
    "no group": ("group must be positive", {"group": 0}, {}),
    "NaN limit": ("must be numbers", {"maximum": float("nan")}, {}),
    "group of another type": ("group must be an integer", {"group": 1.0}, {}),
    "limit of another type": ("minimum must be a float", {"minimum": 0}, {}),
    "strides of another type": ("strides must", {"strides": [1.0, 1.0]}, {}),
    "depthwise of 3 axes": ("weights must be", {}, {"depthwise": zeros(4, 3, 3)}),
    "depthwise not depthwise": ("weights must be", {}, {"depthwise": zeros(4, 2, 3, 3)}),
    "no rows": (
        "channels must have 0 values, not 4",
        {},
        {"depthwise": zeros(0, 1, 3, 3), "pointwise": zeros(5, 0, 1, 1)},
    ),
    "depthwise of other rows": ("pointwise weight has shape", {}, {"depthwise": zeros(3, 1, 3, 3)}),
    "pointwise of a scalar": ("weights must be", {}, {"pointwise": zeros()}),
    "pointwise of other rows": ("pointwise weight has shape", {}, {"pointwise": zeros(5, 3, 1, 1)}),
    "pointwise not pointwise": ("pointwise weight has shape", {}, {"pointwise": zeros(5, 4, 1, 3)}),
    "bias of other channels": (r"bias has shape \(4\), not \(5\)", {}, {"bias": zeros(4)}),
    "slope of other channels": (r"slope has shape \(1\), not \(5\)", {}, {"slope": zeros(1)}),
    "half-precision weight": ("float16", {}, {"depthwise": zeros(4, 1, 3, 3, dtype=np.float16)}),
    "integer weight": ("int64", {}, {"pointwise": zeros(5, 4, 1, 1, dtype=np.int64)}),
}


@pytest.mark.parametrize(("message", "attributes", "constants"), WRONG.values(), ids=WRONG)
def test_a_layer_that_makes_no_sense_is_refused(
    message: str, attributes: dict[str, Any], constants: dict[str, np.ndarray]
) -> None:
    """When the session is opened, with the operator's name and what is wrong."""
    node = fused(["x", *CONSTANTS, *(["slope"] if "slope" in constants else [])], **attributes)
    with pytest.raises(Exception, match=message) as caught:
        session_of(model_of([node], CONSTANTS | constants))
    assert "DecoupledConv" in str(caught.value)


@pytest.mark.parametrize("name", CONSTANTS)
def test_weights_must_be_initializers(name: str) -> None:
    """They are packed when the session is opened."""
    rest = {other: array for other, array in CONSTANTS.items() if other != name}
    with pytest.raises(Exception, match=f"DecoupledConv: the {name}.* must be an initializer"):
        session_of(model_of([fused(["x", *CONSTANTS])], rest, {name: TensorProto.FLOAT}))


@pytest.mark.parametrize(
    "inputs", [["x", "depthwise", "pointwise"], ["x", "depthwise", "pointwise", ""], ["", *CONSTANTS]]
)
def test_required_inputs_must_be_there(inputs: list[str]) -> None:
    with pytest.raises(Exception, match="DecoupledConv"):
        session_of(model_of([fused(inputs)], CONSTANTS))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (zeros(4, 6, 6), r"X has shape \(4, 6, 6\), not \(N, 4, H, W\)"),
        (zeros(), r"X has shape \(\)"),
        (zeros(1, 4, 6, 6, 1), "X has shape"),
        (zeros(1, 3, 6, 6), r"X has shape \(1, 3, 6, 6\), not \(N, 4, H, W\)"),
        (zeros(1, 4, 0, 6), "is smaller than the kernel"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x: np.ndarray, message: str) -> None:
    """When it is run; the session can be used on."""
    session = session_of(model_of([fused(["x", *CONSTANTS])], CONSTANTS, x_shape=None))
    with pytest.raises(Exception, match=f"DecoupledConv: .*{message}"):
        session.run(None, {"x": x})
    assert session.run(None, {"x": zeros(1, 4, 2, 6)})[0].shape == (1, 5, 2, 6)


def test_an_input_of_another_type_is_refused() -> None:
    with pytest.raises(Exception, match=r"tensor\(double\).*DecoupledConv"):
        session_of(model_of([fused(["x", *CONSTANTS])], CONSTANTS, {"x": TensorProto.DOUBLE}))


def test_a_slope_that_is_computed_is_refused() -> None:
    """It cannot be packed, and must not be ignored."""
    model = model_of([fused(["x", *CONSTANTS, "slope"])], CONSTANTS, {"slope": TensorProto.FLOAT})
    with pytest.raises(Exception, match="DecoupledConv: the slope must be an initializer"):
        session_of(model).run(None, {"x": zeros(1, 4, 6, 6), "slope": zeros(5)})


@pytest.mark.parametrize("shape", [(2, 5, 6, 6), (1, 4, 6, 6), (5, 6, 6), ()])
def test_a_residual_must_have_the_shape_of_the_output(shape: tuple[int, ...]) -> None:
    """It is not broadcast."""
    model = model_of([fused(["x", *CONSTANTS, "", "residual"])], CONSTANTS, {"residual": TensorProto.FLOAT})
    session = session_of(model)
    with pytest.raises(Exception, match=r"DecoupledConv: the residual has shape .*, not \(1, 5, 6, 6\)"):
        session.run(None, {"x": zeros(1, 4, 6, 6), "residual": zeros(*shape)})


@pytest.mark.parametrize("optional", [[], [""], ["", ""]])
def test_optional_inputs_may_be_absent_or_empty(optional: list[str]) -> None:
    session = session_of(model_of([fused(["x", *CONSTANTS, *optional])], CONSTANTS))
    assert (session.run(None, {"x": np.ones((1, 4, 3, 3), np.float32)})[0][:, :, 1, 1] == 37).all()


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)])
def test_inputs_without_pixels_give_what_padding_gives(shape: tuple[int, ...]) -> None:
    """The bias alone, or nothing for no images."""
    (y,) = session_of(model_of([fused(["x", *CONSTANTS], pads=[2] * 4)], CONSTANTS)).run(
        None, {"x": zeros(*shape)}
    )
    assert y.shape == (shape[0], 5, shape[2] + 2, shape[3] + 2)
    assert (y == 1).all()


def test_the_session_explains_itself_without_the_operator() -> None:
    """A session that was not taught the operator names it."""
    model = model_of([fused(["x", *CONSTANTS])], CONSTANTS)
    with pytest.raises(Exception, match="DecoupledConv"):
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_network_of_nothing_but_fused_operators_can_be_read() -> None:
    """As is what `--emit fused` writes where every layer was changed; there is nothing left to decouple."""
    opened = read_model(chain("fused", SIZES[:2]))
    layers = OnnxNetwork(opened, np.zeros((2, 8, 6, 6), np.float32)).layers
    assert [la.reason for la in layers] == ["already decoupled"] * 2
    assert sum(la.macs for la in layers) == 36 * sum(n_i * t * (9 + n_o) for n_i, n_o, t in SIZES[:2])
