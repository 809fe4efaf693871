"""Budgets in time, with a timer whose times are computed from the networks' weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from netdecouple import api, runtimes
from netdecouple.convolution import Structure
from netdecouple.errors import BudgetError, ModelError, UnavailableError
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.goal import FORMS
from netdecouple.network import Layer
from netdecouple.planning import latency
from netdecouple.planning.analysis import Analysis, analyze
from netdecouple.planning.cost import Budget, Parameters
from netdecouple.planning.latency import Cache, Latency, plan_for_latency
from netdecouple.planning.planner import make_plan
from netdecouple.planning.settings import Settings
from netdecouple.runtimes import Feeds
from netdecouple.runtimes.onnxruntime import open_session
from netdecouple.runtimes.timing import Stopwatch
from tests.networks import images_for, perceptron, residual
from tests.test_api import MODEL


@dataclass
class WeightTimer:
    """A layer takes 1 µs per weight times a factor per form, a network 1 ms and what its weights cost."""

    network: OnnxNetwork
    forms_of: tuple[str, ...] = FORMS["standard"]
    factors: dict[str, float] = field(default_factory=dict)  # of a form, in single layers
    slow: str = ""  # a layer whose decoupled forms take a second more
    cost: Callable[[str, int], float] = lambda name, size: size / 1000  # of a weight in whole networks
    name: str = "made-up 1, 1 thread"
    batch: int = 1
    lost: float = 0.0
    timed: list[str] = field(default_factory=list)  # layers, once for every structure

    def forms(self, layer: Layer) -> tuple[str, ...]:
        return self.forms_of[:1] if layer.operator in ("Gemm", "MatMul") else self.forms_of

    def layer_times(self, layer: Layer, kinds: Sequence[tuple[Structure, str]]) -> list[float]:
        self.timed += [layer.name] * len(kinds)
        return [
            sum(int(np.prod(stage.weight_shape)) for stage in structure.stages)
            * (1.0 if len(structure.stages) == 1 else self.factors.get(form, 1.0))
            / 1000
            + 1000 * (layer.name == self.slow and len(structure.stages) > 1)
            for structure, form in kinds
        ]

    def network_times(self, models: Sequence[Any]) -> np.ndarray:
        protos = [self.network.build({}), *models]
        weights = [[(t.name, int(np.prod(t.dims))) for t in p.graph.initializer] for p in protos]
        return np.array([1.0 + sum(self.cost(*weight) for weight in own) for own in weights])


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    model = residual()
    images = images_for(model, 40)
    network = OnnxNetwork(read_model(model), images)
    return analyze(network, Inputs.split(images, 0), Settings(data_free=True, families=("nd-dp",)))


def counter(analysis: Analysis, path: Path, **options: Any) -> Latency:
    assert isinstance(analysis.network, OnnxNetwork)
    timer = WeightTimer(analysis.network, **options)
    return Latency(analysis, timer, Cache(path / "times.json"))


def planned(counter: Latency, share: float) -> Any:
    return plan_for_latency(counter, [], share, "ask for less")


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("bias", [1.0, 0.6, 1.5])
def test_a_budget_is_met_even_where_times_do_not_add_up(
    analysis: Analysis, tmp_path: Path, share: float, bias: float
) -> None:
    """Whole networks gain less, or more, from fewer weights than single layers do."""
    times = counter(analysis, tmp_path, factors=dict.fromkeys(FORMS["standard"], bias))
    plan = planned(times, share)
    assert 0.9 * share <= times.share(plan) <= share * (1 + latency.CLOSE)


def test_what_is_out_of_reach_is_said_with_what_is_not(analysis: Analysis, tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"2% of the time is out of reach in made-up 1, 1 thread; .* takes \d+%"
    ):
        planned(counter(analysis, tmp_path), 0.02)


def test_a_layer_that_does_not_get_faster_is_left_alone(analysis: Analysis, tmp_path: Path) -> None:
    slow = next(iter(analysis.candidates))
    plan = planned(counter(analysis, tmp_path, slow=slow), 0.7)
    row = next(row for row in plan.layers if row.name == slow)
    assert (row.family, row.reason) == ("kept", "no candidate has less latency")
    assert any(row.changed for row in plan.layers)


@pytest.mark.parametrize(("dear", "chosen"), [("gather", "parallel"), ("parallel", "gather")])
def test_the_faster_form_is_chosen(analysis: Analysis, tmp_path: Path, dear: str, chosen: str) -> None:
    plan = planned(counter(analysis, tmp_path, factors={dear: 1.2}), 0.7)
    assert {row.form for row in plan.layers if row.changed} == {chosen}


def test_times_are_kept_on_disk_by_runtime_and_version(analysis: Analysis, tmp_path: Path) -> None:
    first, again = counter(analysis, tmp_path), counter(analysis, tmp_path)
    assert isinstance(first.timer, WeightTimer)
    assert isinstance(again.timer, WeightTimer)
    layers = [la for la in analysis.network.layers if la.name in analysis.candidates]
    assert [first.dense(la) for la in layers] == [again.dense(la) for la in layers]
    assert len(set(again.timer.timed)) == len(again.timer.timed)  # as they are, once
    assert set(again.timer.timed) == set(first.timer.timed)
    for options in ({"name": "made-up 2, 1 thread"}, {"batch": 4}):
        newer = counter(analysis, tmp_path, **options).timer
        assert isinstance(newer, WeightTimer)
        assert newer.timed == first.timer.timed != []


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": "b"}', "{", '{"a": null}'])
def test_a_spoilt_cache_is_replaced(tmp_path: Path, text: str) -> None:
    path = tmp_path / "times.json"
    path.write_text(text)
    cache = Cache(path)
    cache.save({"here": 1.5})
    assert json.loads(path.read_text()) == {"here": 1.5}
    assert Cache(path)["here"] == 1.5


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "times.json")
    cache.save({"here": 1.5})
    assert cache["here"] == 1.5


def test_times_are_kept_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(latency.tempfile, "gettempdir", lambda: str(tmp_path))

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    Cache().save({"a": 1.0})
    assert Cache()["a"] == 1.0


def test_the_fused_operator_never_computes_fully_connected_layers(tmp_path: Path) -> None:
    """Neither those that are changed nor, as a neighbour, those that are kept."""
    model = perceptron()
    images = images_for(model, 20)
    network = OnnxNetwork(read_model(model), images)
    analysis = analyze(network, Inputs.split(images, 0), Settings(data_free=True))
    times = counter(analysis, tmp_path, forms_of=FORMS["fused"])
    plan = times.with_fused_neighbours(make_plan(analysis, [Budget(Parameters(), 0.5)], times.form))
    for row in plan.layers:
        assert row.operator == "Conv" or row.changed or not row.form
    sketched: Any = times.sketch(plan)
    assert all(not node.name.startswith(("fc", "logits")) for node in sketched.graph.node if node.domain)
    assert any(node.name == "fc1/product0" for node in sketched.graph.node)


@dataclass
class WeightRuntime:
    """A runtime in which a model takes a millisecond and what ``cost`` says of each of its weights."""

    cost: Callable[[str, int], float]
    name: str = "made-up"
    version: str = "1"

    def open(self, model: object, threads: int) -> WeightSession:
        assert isinstance(model, onnx.ModelProto)
        return WeightSession(
            1.0 + sum(self.cost(t.name, int(np.prod(t.dims))) for t in model.graph.initializer)
        )


@dataclass
class WeightSession:
    milliseconds: float
    inputs = ()

    def run(self, feeds: Feeds) -> list[np.ndarray]:
        return [np.array(self.milliseconds)]


@pytest.fixture
def by_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """Let every runtime be one whose times are computed from weights."""

    def times(self: Stopwatch, calls: Sequence[Callable[[], list]], seconds: float) -> np.ndarray:
        return np.array([float(call()[0]) for call in calls])

    def replace(cost: Callable[[str, int], float]) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(Stopwatch, "times", times)
        monkeypatch.setattr(runtimes, "runtime", lambda name, **_: WeightRuntime(cost, name=name))

    return replace


def test_a_plan_for_latency_from_end_to_end(by_weights: Callable) -> None:
    """The written network is what was timed, and the report shows measured and predicted times."""
    by_weights(lambda name, size: size / 1000)
    for emit in ("standard", "fused"):
        result = api.decouple(
            MODEL,
            settings=Settings(data_free=True, families=("nd-dp",)),
            latency="70%",
            emit=emit,
            macs="95%",
            runtime="onnxruntime",
        )
        assert {row.form for row in result.plan.layers if row.changed} <= set(FORMS[emit])
        assert result.plan.after.macs <= 0.95 * result.plan.before.macs
        speed = result.report.speed
        assert speed is not None
        assert 0.6 <= speed.share <= 0.72
        assert speed.after / speed.before == pytest.approx(speed.share)
        assert any(node.domain == "netdecouple" for node in result.model.graph.node) == (emit == "fused")
        again = api.apply_plan(MODEL, result.plan)
        assert again.model.graph == result.model.graph


def test_kept_layers_are_fused_too_where_that_is_faster(by_weights: Callable) -> None:
    """As they are: only the operator changes, and excluded ones keep theirs."""
    first = next(la.name for la in api.inspect(MODEL).layers if la.geometry)
    by_weights(lambda name, size: size / 1000 * (1 if "fused" in name else 3))
    for exclude in ((), (first,)):
        settings = Settings(exclude=exclude, data_free=True, families=("nd-dp",))
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
        ({"emit": "magic"}, ModelError, "standard or fused"),
        ({"threads": 0}, ModelError, "threads=0"),
        ({"runtime": "torch"}, ModelError, "PyTorch modules"),
        ({"runtime": "abacus"}, UnavailableError, "no runtime 'abacus'"),
        ({"runtime": "openvino", "emit": "fused"}, ModelError, "onnxruntime"),
    ],
)
def test_places_that_make_no_sense_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        api.decouple(MODEL, settings=Settings(data_free=True, families=("nd-dp",)), latency="70%", **options)
