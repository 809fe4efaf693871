"""Budgets in time, with a clock that is made up: what a model takes is counted from its nodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest

from netdecouple import api
from netdecouple.errors import BudgetError, ModelError, UnavailableError
from netdecouple.families.chain import Step, method
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.emission import FORMS, Form
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.network import Layer
from netdecouple.planning import latency
from netdecouple.planning.analysis import Analysis, Settings, analyze
from netdecouple.planning.cost import Budget, Parameters
from netdecouple.planning.latency import (
    FUSED,
    STANDARD,
    Cache,
    Latency,
    Place,
    placeholder,
    plan_for_latency,
    tiny_model,
)
from netdecouple.planning.solve import make_plan
from netdecouple.runtimes import Feeds
from netdecouple.runtimes.onnxruntime import open_session
from tests.networks import images_for, perceptron, residual
from tests.planning.layers import linear
from tests.test_api import MODEL


@dataclass
class Clock:
    """A runtime in which a model takes a millisecond, and what ``cost`` says of each of its weights."""

    cost: Callable[[str, int], float]  # the weight's name, its size
    name: str = "made-up"
    version: str = "1"
    opened: list[onnx.ModelProto] = field(default_factory=list)

    def open(self, model: object, threads: int) -> Session:
        assert isinstance(model, onnx.ModelProto)
        self.opened.append(model)
        return Session(1.0 + sum(self.cost(t.name, int(np.prod(t.dims))) for t in model.graph.initializer))


@dataclass
class Session:
    milliseconds: float
    inputs = ()

    def run(self, feeds: Feeds) -> list[np.ndarray]:
        return [np.array(self.milliseconds)]


@pytest.fixture(autouse=True)
def read_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(calls: Sequence[Callable[[], list]], seconds: float) -> np.ndarray:
        return np.array([[float(call()[0]) for call in calls]])

    monkeypatch.setattr(latency, "measure", measure)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    model = residual()
    images = images_for(model, 40)
    network = OnnxNetwork(read_model(model), images)
    return analyze(network, Inputs.split(images, 0), Settings(data_free=True, families=("nd-dp",)))


def by_weights(name: str, size: int) -> float:
    return size / 1000


def counter(analysis: Analysis, clock: Clock, path: Path, forms: tuple[Form, ...] = STANDARD) -> Latency:
    assert isinstance(analysis.network, OnnxNetwork)
    image = analysis.inputs.images[:1]
    return Latency(
        analysis.network, analysis.candidates, Place(clock, 1, forms), image, Cache(path / "times.json")
    )


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("bias", [1.0, 0.6, 1.5])
def test_a_budget_is_met_even_where_times_do_not_add_up(
    analysis: Analysis, tmp_path: Path, share: float, bias: float
) -> None:
    """Whole networks gain less, or more, from fewer weights than tiny models say."""

    def cost(name: str, size: int) -> float:
        alone = name.startswith("layer") and name[5].isdigit()
        return size / 1000 * (bias if alone and ("depthwise" in name or "pointwise" in name) else 1.0)

    clock = counter(analysis, Clock(cost), tmp_path)
    plan = plan_for_latency(analysis, [], clock, share)
    found = clock.speed(clock.sketch(plan), plan).share
    assert 0.9 * share <= found <= share * (1 + latency.CLOSE)


def test_what_is_out_of_reach_is_said_with_what_is_not(analysis: Analysis, tmp_path: Path) -> None:
    clock = counter(analysis, Clock(by_weights), tmp_path)
    with pytest.raises(
        BudgetError, match=r"2% of the time is out of reach in made-up 1, 1 thread; .* takes \d+%"
    ):
        plan_for_latency(analysis, [], clock, 0.02)


def test_a_layer_that_does_not_get_faster_is_left_alone(analysis: Analysis, tmp_path: Path) -> None:
    clock = counter(analysis, Clock(by_weights), tmp_path)
    slow = next(iter(analysis.candidates))
    for key, (macs, times) in clock._times.items():
        if key[0] == slow:
            clock._times[key] = (macs, [t + 1000 for t in times])
    plan = plan_for_latency(analysis, [], clock, 0.7)
    row = next(row for row in plan.layers if row.name == slow)
    assert (row.family, row.reason) == ("kept", "no candidate has less latency")
    assert any(row.changed for row in plan.layers)


@pytest.mark.parametrize(("dear", "chosen"), [("depthwise0.weight", "parallel"), ("depthwise0.0.", "gather")])
def test_the_faster_form_is_chosen(analysis: Analysis, tmp_path: Path, dear: str, chosen: str) -> None:
    clock = counter(analysis, Clock(lambda name, size: 50.0 if dear in name else size / 1000), tmp_path)
    plan = plan_for_latency(analysis, [], clock, 0.7)
    assert {row.form for row in plan.layers if row.changed} == {chosen}


def test_times_are_kept_on_disk_by_runtime_and_version(analysis: Analysis, tmp_path: Path) -> None:
    first = Clock(by_weights)
    times = [counter(analysis, first, tmp_path)._dense]
    again = Clock(by_weights)
    times.append(counter(analysis, again, tmp_path)._dense)
    assert times[0] == times[1]
    assert len(again.opened) == 1  # the whole network, no layer
    newer = Clock(by_weights, version="2")
    counter(analysis, newer, tmp_path)
    assert len(newer.opened) == len(first.opened) > 1


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": "b"}', "{", '{"a": null}'])
def test_a_spoilt_cache_is_made_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    cache = Cache(path)
    cache.update({"here": 1.5})
    assert json.loads(path.read_text()) == {"here": 1.5}
    assert Cache(path)["here"] == 1.5


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "times.json")
    cache.update({"here": 1.5})
    assert cache["here"] == 1.5


@pytest.mark.parametrize("form", FORMS)
def test_tiny_models_are_copies_of_the_layer(analysis: Analysis, form: Form) -> None:
    layer: Layer = next(la for la in analysis.network.layers if la.name in analysis.candidates)
    assert layer.geometry is not None
    structure = analysis.candidates[layer.name].candidates[0].structure
    model = tiny_model(layer, structure, form, 3)
    onnx.checker.check_model(model)
    x = np.random.default_rng(0).standard_normal((1, layer.geometry.n_i, *layer.size)).astype(np.float32)
    for seed, found in enumerate(open_session(model).run(None, {"x": x})):
        expected = placeholder(structure, seed)(x).mean(axis=(2, 3), keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_are_timed_with_as_many_images_as_the_network(analysis: Analysis, tmp_path: Path) -> None:
    """Of a model with a fixed batch; their times are kept apart from those of other batches."""
    assert isinstance(analysis.network, OnnxNetwork)
    path, opened = tmp_path / "times.json", []
    for batch in (1, 4):
        clock = Clock(by_weights)
        image = analysis.inputs.images[:batch]
        Latency(analysis.network, analysis.candidates, Place(clock), image, Cache(path))
        opened.append([m.graph.input[0].type.tensor_type.shape.dim[0].dim_value for m in clock.opened[:-1]])
    assert {*opened[0]} == {1}
    assert {*opened[1]} == {4}
    assert len(opened[0]) == len(opened[1]) > 3


def test_times_are_kept_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(latency.tempfile, "gettempdir", lambda: str(tmp_path))

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    Cache().update({"a": 1.0})
    assert Cache()["a"] == 1.0


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


def test_the_fused_operator_never_runs_fully_connected_layers(tmp_path: Path) -> None:
    """Neither those that are changed nor, as a neighbour, those that are kept."""
    model = perceptron()
    images = images_for(model, 20)
    network = OnnxNetwork(read_model(model), images)
    seen = analyze(network, Inputs.split(images, 0), Settings(data_free=True))
    clock = counter(seen, Clock(by_weights), tmp_path, FUSED)
    plan = clock.with_neighbours(make_plan(seen, [Budget(Parameters(), 0.5)], clock.form))
    for row in plan.layers:
        assert row.operator == "Conv" or row.changed or not row.form
    sketched = clock.sketch(plan)
    assert all(not node.name.startswith(("fc", "logits")) for node in sketched.graph.node if node.domain)
    assert any(node.name == "fc1/product0" for node in sketched.graph.node)


def test_a_plan_for_latency_goes_through_the_front_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written network is what was timed, and the report tells measured and foreseen times."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(api.runtimes, "runtime", lambda name: Clock(by_weights, name=name))
    for emit, forms in (("standard", set(STANDARD)), ("fused", set(FUSED))):
        result = api.decouple(
            MODEL,
            settings=Settings(data_free=True, families=("nd-dp",)),
            latency="70%",
            emit=emit,
            macs="95%",
            runtime="onnxruntime",
        )
        assert {row.form for row in result.plan.layers if row.changed} <= forms
        assert result.plan.macs <= 0.95 * result.plan.macs_before
        speed = result.report.speed
        assert speed is not None
        assert 0.6 <= speed.share <= 0.72
        assert speed.after.median / speed.before.median == pytest.approx(speed.share)
        assert any(node.domain == "netdecouple" for node in result.model.graph.node) == (emit == "fused")
        again = api.apply_plan(MODEL, result.plan)
        assert again.model.graph == result.model.graph


def test_kept_layers_are_fused_too_where_that_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are: only the operator changes, and excluded ones keep theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = next(la.name for la in api.inspect(MODEL).layers if la.geometry)

    def dear(name: str, size: int) -> float:  # what is no fused operator
        return size / 1000 * (1 if "fused" in name else 3)

    monkeypatch.setattr(api.runtimes, "runtime", lambda name: Clock(dear, name=name))
    for exclude in ((), (first,)):
        settings = Settings(exclude, data_free=True, families=("nd-dp",))
        result = api.decouple(MODEL, settings=settings, macs="80%", emit="fused", runtime="onnxruntime")
        kept = [row for row in result.plan.layers if not row.changed and row.operator == "Conv"]
        assert kept
        assert all((row.form == "fused") == (row.name not in exclude) for row in kept)
        convs = [node.name for node in result.model.graph.node if node.op_type == "Conv"]
        assert convs == [row.name for row in kept if row.name in exclude]
        same = api.decouple(MODEL, settings=settings, macs="80%")
        image = np.random.default_rng(0).random((2, 1, 32, 32), np.float32)
        outputs = [
            open_session(r.model).run(None, {r.model.graph.input[0].name: image})[0] for r in (result, same)
        ]
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"emit": "magic"}, ModelError, "standard and fused"),
        ({"threads": 0}, ModelError, "--threads 0"),
        ({"runtime": "torch"}, ModelError, "PyTorch modules"),
        ({"runtime": "abacus"}, UnavailableError, "no runtime 'abacus'"),
        ({"runtime": "openvino", "emit": "fused"}, ModelError, "onnxruntime"),
    ],
)
def test_places_that_make_no_sense_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        api.decouple(MODEL, settings=Settings(data_free=True, families=("nd-dp",)), latency="70%", **options)
