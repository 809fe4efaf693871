"""The whole job on the network that comes with the package."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import netdecouple
from netdecouple import Plan, Result, Settings, kernels
from netdecouple.api import bench, evaluate, files_of, inspect, lower
from netdecouple.errors import (
    BudgetError,
    CalibrationError,
    ModelError,
    OutputError,
    PlanError,
    QualityError,
    SpeedError,
)
from netdecouple.families.chain import methods
from netdecouple.frontends.onnx.source import OnnxSource
from netdecouple.planning.candidates import Rule
from netdecouple.planning.tolerance import Tolerance
from netdecouple.report.model import Report
from netdecouple.runtimes.onnxruntime import open_session, run
from tests.networks import (
    Builder,
    channels_last,
    classifier,
    half_precision,
    halved,
    images_for,
    kinds,
    of_rows,
    perceptron,
    residual,
    restorer,
    side_inputs,
)
from tests.planning.test_boxes import rows

DEMO = Path(netdecouple.__file__).parent / "demo"
MODEL, CALIB, LABELS = (
    DEMO / "digits.onnx",
    f"{DEMO / 'digits.npz'}:calib",
    f"{DEMO / 'digits.npz'}:images,labels",
)
QUICK = Settings(families=("nd-dp",))  # a single family is weighed in a fraction of the time


@pytest.fixture(scope="module")
def result() -> Result:
    return netdecouple.decouple(MODEL, CALIB, macs="3x", samples=100, settings=Settings(effort="low"))


def test_the_budget_holds_and_accuracy_stays(result: Result, tmp_path: Path) -> None:
    """Three times fewer MACs; at most a point is lost on 1,000 images no fit has seen."""
    assert result.report.macs_before / result.report.macs >= 3.0
    result.save(tmp_path / "faster.onnx")
    shown = []
    networks = [MODEL, tmp_path / "faster.onnx"]
    before, after = evaluate(networks, LABELS, progress=lambda *step: shown.append(step))
    assert [step for step in shown if step[1] == step[2]] == [
        (f"Running {name}", before.images, before.images) for name in ("digits.onnx", "faster.onnx")
    ]
    assert before.top1 == 0.986
    assert after.top1 >= before.top1 - 0.01
    assert after.same_class is not None
    assert after.same_class >= 0.98


def test_what_a_result_was_made_from_is_never_replaced(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the network nor by the report, from whatever folder and under whatever name."""
    assert result.inputs == (MODEL, DEMO / "digits.npz")
    assert files_of(np.load(DEMO / "digits.npz"), np.zeros(3), None, "nothing") == ()
    copies = tmp_path / "model.onnx", tmp_path / "digits.npz"
    for copy, original in zip(copies, result.inputs, strict=True):
        copy.write_bytes(original.read_bytes())
    (tmp_path / "link.onnx").symlink_to("digits.npz")
    (tmp_path / "hard.html").hardlink_to(copies[0])
    monkeypatch.chdir(tmp_path)
    made = replace(result, inputs=copies)
    for path in ("model.onnx", "link.onnx"):
        with pytest.raises(OutputError, match=f"{path}: is an input"):
            made.save(path)
    with pytest.raises(OutputError, match="hard"):
        made.save_report("hard.html")
    with pytest.raises(OutputError, match="is an input"):
        lower("model.onnx", "model.onnx")


def test_the_report_lists_every_layer_and_counts_what_the_new_file_has(
    result: Result, tmp_path: Path
) -> None:
    result.save(tmp_path / "faster.onnx")
    new = inspect(tmp_path / "faster.onnx")
    assert sum(layer.macs for layer in new.layers) == result.report.macs
    assert sum(layer.parameters for layer in new.layers) == result.report.parameters
    families = [layer.family for layer in result.report.layers]
    assert [family == "kept" for family in families] == [True, *[False] * 5, True]
    assert set(families) <= {"kept", *methods(["all"])}
    assert all(bool(layer.sizes) == (layer.family != "kept") for layer in result.report.layers)
    assert [layer.reason for layer in result.report.layers if layer.family == "kept"] == [
        "reads a single channel",
        "worth its cost",
    ]


def test_the_file_never_has_more_than_was_planned(result: Result) -> None:
    """Less where filters went whose outputs nobody reads any more."""
    for planned, written in zip(result.plan.layers, result.report.layers, strict=True):
        assert (planned.name, planned.sizes) == (written.name, written.sizes)
        assert written.macs <= planned.macs
        assert written.parameters <= planned.parameters


@pytest.fixture(scope="module")
def alone() -> Result:
    """The same with a single family."""
    return netdecouple.decouple(MODEL, CALIB, macs="3x", samples=100, settings=QUICK)


def test_all_families_together_lose_less_than_one(result: Result, alone: Result) -> None:
    assert [layer.family for layer in alone.report.layers] == ["kept", *["nd-dp"] * 5, "kept"]
    assert result.plan.predicted_loss < alone.plan.predicted_loss
    both, one = (evaluate([MODEL, r.model], LABELS)[1].kl for r in (result, alone))
    assert both < one


def test_the_prediction_is_of_the_right_size(result: Result) -> None:
    agreement = result.report.agreement
    assert agreement is not None
    assert agreement.images == 20
    assert agreement.predicted / 5 < agreement.divergence < agreement.predicted * 5
    assert agreement.same_class is not None
    assert 0.9 <= agreement.same_class <= 1


def test_the_saved_file_computes_the_plans_own_arithmetic(result: Result) -> None:
    assert 0 <= result.report.difference < 1e-5


def test_the_same_call_gives_the_same_bytes() -> None:
    model = classifier()
    once, again = (netdecouple.decouple(model, images_for(model, 40), macs="2x") for _ in range(2))
    assert again.plan == once.plan
    assert again.model.SerializeToString(deterministic=True) == once.model.SerializeToString(
        deterministic=True
    )


def test_a_saved_plan_gives_the_same_network(result: Result) -> None:
    plan = Plan.from_json(result.plan.to_json())
    applied = netdecouple.apply_plan(MODEL, plan, CALIB)
    assert applied.plan == result.plan
    assert applied.model.SerializeToString(deterministic=True) == result.model.SerializeToString(
        deterministic=True
    )


def test_the_plan_travels_in_the_models_metadata(result: Result) -> None:
    metadata = {entry.key: entry.value for entry in result.model.metadata_props}
    assert metadata["netdecouple.version"] == netdecouple.__version__
    assert Plan.from_json(metadata["netdecouple.plan"]) == result.plan


def test_a_plan_is_refused_other_images_than_its_own(result: Result) -> None:
    images = np.random.default_rng(0).random((100, 1, 32, 32), np.float32)
    with pytest.raises(PlanError, match="other calibration inputs"):
        netdecouple.apply_plan(MODEL, result.plan, images)


def test_fitting_to_inputs_beats_the_published_method_by_far(alone: Result) -> None:
    """Even at fewer MACs than the paper's own procedure (data-free, one T)."""
    paper = netdecouple.decouple(
        MODEL, CALIB, macs="2x", samples=100, settings=Settings(data_free=True, uniform_rank=True)
    )
    assert alone.report.macs < paper.report.macs
    assert paper.report.agreement is not None
    assert alone.report.agreement is not None
    assert alone.report.agreement.divergence < 0.1 * paper.report.agreement.divergence


def test_the_published_method_has_one_rank_and_keeps_the_first_layer() -> None:
    paper = netdecouple.decouple(MODEL, macs="2x", settings=Settings(data_free=True, uniform_rank=True))
    ranks = {terms for layer in paper.report.layers for terms in layer.terms_per_channel or ()}
    assert len(ranks) == 1
    assert paper.plan.layers[0].family == "kept"
    assert paper.report.agreement is None  # there was nothing to compare on
    rule = Rule("nd-dp", "size", ranks.pop())
    ruled = netdecouple.decouple(MODEL, settings=Settings(data_free=True, rule=rule))
    assert [(r.family, r.sizes, r.channels, r.macs) for r in ruled.plan.layers] == [
        (r.family, r.sizes, r.channels, r.macs) for r in paper.plan.layers
    ]


def test_a_rule_is_followed_in_every_layer_but_the_first() -> None:
    """Instead of a budget: T = 4, data-free, as published."""
    settings = Settings(data_free=True, rule=Rule.parse("nd-dp:T=4"))
    result = netdecouple.decouple(MODEL, settings=settings)
    families = [layer.family for layer in result.report.layers]
    assert families == ["kept", *["nd-dp"] * 5, "kept"]
    assert {t for layer in result.report.layers for t in layer.terms_per_channel or ()} == {4}
    assert "size 4" in result.plan.budget
    assert result.report.macs == pytest.approx(
        sum(
            4 * np.prod(la.output_size) * la.geometry.n_i * (9 + la.geometry.n_o) if row.changed else la.macs
            for la, row in zip(inspect(MODEL).layers, result.plan.layers, strict=True)
        )
    )


@pytest.mark.parametrize("data_free", [False, True])
@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        ("nd:T=2", {"conv2": (24,), "conv3": (32,)}),
        ("nd-pd:T=1", {"conv2": (1,), "conv3": (1,)}),
        ("cp:channels=7", {"conv2": (7,), "conv3": (7,)}),
        ("cd:rank=5", {"conv2": (5,), "conv3": (5,)}),
        ("cd+sd+nd:60%", {}),
        ("nd:energy=0.6", {}),
    ],
)
def test_every_kind_of_rule_is_followed(
    rule: str, sizes: dict[str, tuple[int, ...]], data_free: bool
) -> None:
    """And when it is carried out again from the plan."""
    model = classifier()
    images, settings = images_for(model, 20), Settings(data_free=data_free, rule=Rule.parse(rule))
    result = netdecouple.decouple(model, images, settings=settings)
    rows = {row.name: row for row in result.plan.layers if row.changed}
    assert set(rows) == {"conv2", "conv3"}
    for name, row in rows.items():
        assert row.family == settings.rule.method
        assert row.sizes == sizes.get(name, row.sizes)
        if settings.rule.kind == "share":
            assert row.macs <= settings.rule.value * row.macs_before
        elif row.family == "nd-dp":
            assert len(set(np.bincount(row.channels[0]))) == 1
    again = netdecouple.apply_plan(model, result.plan, images)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(
        deterministic=True
    )


def test_a_layer_that_a_rule_makes_no_cheaper_is_kept() -> None:
    """At stride 2, a pointwise stage in front costs four times what it costs behind."""
    settings = Settings(data_free=True, rule=Rule.parse("nd-pd:T=3"))
    rows = netdecouple.decouple(classifier(), settings=settings).plan.layers
    assert [(row.name, row.family) for row in rows[1:3]] == [("conv2", "kept"), ("conv3", "nd-pd")]
    assert rows[1].reason == "nothing costs less than the layer itself"


def test_a_network_none_of_whose_layers_takes_one_rank_is_refused_as_published() -> None:
    """One rank for all of 64 channels costs more than the layer, if it has a single output."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 64, 3, "first"))
    x = b.node("Relu", b.conv(x, 64, 32, 3, "middle"))
    b.conv(x, 32, 1, 3, "last")
    model = b.model([("last", ("N", 1, 8, 8))])
    paper = Settings(data_free=True, uniform_rank=True)
    result = netdecouple.decouple(model, macs="99%", settings=paper)
    assert [row.family for row in result.plan.layers] == ["kept", "nd-dp", "kept"]
    assert "nothing costs less" in result.plan.layers[-1].reason
    left = 100 * result.report.macs / result.report.macs_before
    assert f"{left:.3g}% MACs are left, where 99% MACs was asked for" in "".join(result.report.warnings)
    for exclude in (("middle",), ("first", "middle")):
        with pytest.raises(BudgetError, match="not even T = 1"):
            netdecouple.decouple(model, macs="60%", settings=replace(paper, exclude=exclude))


def test_the_order_of_the_axes_changes_nothing() -> None:
    """A network for images (N, H, W, C) becomes what the one for (N, C, H, W) becomes."""
    model, images = classifier(), images_for(classifier(), 40)
    first = netdecouple.decouple(model, images, macs="2x", settings=QUICK)
    turned = images.transpose(0, 2, 3, 1)
    last = netdecouple.decouple(channels_last(classifier()), turned, macs="2x", settings=QUICK)
    assert last.plan.layers == first.plan.layers
    assert last.report.pictures == first.report.pictures != ()
    outputs = [
        run(open_session(r.model), None, {"image": x})[0] for r, x in ((first, images), (last, turned))
    ]
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_inputs_need_not_be_images(tmp_path: Path) -> None:
    """A network for rows of numbers becomes what the one for images becomes, and shows no pictures."""
    images = images_for(classifier(), 40)
    first = netdecouple.decouple(classifier(), images, macs="2x", settings=QUICK)
    rows = images.reshape(40, 192)
    flat = netdecouple.decouple(of_rows(classifier(), "L"), rows, macs="2x", settings=QUICK)
    assert flat.plan.layers == first.plan.layers
    assert flat.report.pictures == ()
    for seen in (inspect(of_rows(classifier(), "L"), calib=rows), inspect(of_rows(classifier(), 192))):
        assert seen.macs == flat.report.macs_before
    flat.save(tmp_path / "flat.onnx")
    assert bench([tmp_path / "flat.onnx"], seconds=0.05).models[0].shapes == ((1, 192),)


def test_inputs_of_another_shape_are_refused_with_their_file(tmp_path: Path) -> None:
    """Before the network is run; labelled ones, too."""
    model = of_rows(classifier(), 192)
    model.graph.name = "rows"
    rows, labels = np.zeros((40, 190), np.float32), np.zeros(40, np.int64)
    np.savez(tmp_path / "rows.npz", x=rows, y=labels)
    message = r"samples of 190; rows takes 192"
    with pytest.raises(CalibrationError, match=message):
        netdecouple.decouple(model, rows, macs="2x", settings=QUICK)
    for data in (f"{tmp_path / 'rows.npz'}:x,y", (rows, labels)):
        with pytest.raises(CalibrationError, match=message):
            netdecouple.evaluate([model], data)


def test_inputs_beside_the_images_stay_inputs(tmp_path: Path) -> None:
    """The network becomes what it becomes with their values inside, and takes the same inputs as before."""
    images, scales = images_for(classifier(), 40), np.float32([1, 1, 0.75, 0.75])
    inside = side_inputs()
    inside.graph.initializer.append(numpy_helper.from_array(scales, "scales"))
    del inside.graph.input[2], inside.graph.input[0]
    expected = netdecouple.decouple(inside, images, macs="2x", settings=QUICK)
    arrays = {"image": images, "scales": np.tile(scales, (40, 1)), "gain": 1.5, "labels": np.arange(40) % 10}
    np.savez(tmp_path / "data.npz", **arrays)
    labelled = f"{tmp_path}/data.npz:image,labels"
    assert evaluate([side_inputs()], labelled)[0].top1 == evaluate([inside], labelled)[0].top1
    for calib in ({"image": images, "scales": scales}, tmp_path / "data.npz", f"{tmp_path}/data.npz:image"):
        result = netdecouple.decouple(side_inputs(), calib, macs="2x", settings=QUICK).timed(seconds=0)
        assert result.plan.layers == expected.plan.layers
        assert list(result.model.graph.input) == list(side_inputs().graph.input)
        assert result.report.benchmark is not None
        assert result.report.not_timed == ()
    session = open_session(result.model)
    feeds = {"image": images[:2], "scales": scales}
    before, after = run(open_session(expected.model), None, {"image": images[:2]}), run(session, None, feeds)
    np.testing.assert_allclose(after[0], before[0], atol=1e-4)
    other = run(session, None, {**feeds, "gain": np.zeros((), np.float32)})
    assert np.abs(other[0] - after[0]).max() > 0.01


def test_a_budget_in_parameters_holds_too() -> None:
    model = residual()
    images = images_for(model, 60)
    result = netdecouple.decouple(model, images, macs="60%", parameters="50%", settings=QUICK)
    assert result.report.parameters <= 0.5 * result.report.parameters_before
    assert result.report.macs <= 0.6 * result.report.macs_before


def test_a_perceptrons_head_is_decoupled_to_a_budget_in_parameters() -> None:
    """Most parameters are in fully connected layers; the plan gives the same network again."""
    model = perceptron()
    images = images_for(model, 200)
    result = netdecouple.decouple(model, images, parameters=0.5)
    assert result.report.parameters <= 0.5 * result.report.parameters_before
    families = {row.operator: row.family for row in result.plan.layers if row.name == "fc1"}
    assert families == {"Gemm": "cd"}
    operators = [node.op_type for node in result.model.graph.node]
    assert set(operators) <= {"Conv", "Relu", "Flatten", "MatMul", "Gemm", "Add", "Concat", "Gather"}
    again = netdecouple.apply_plan(model, result.plan, images)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(
        deterministic=True
    )


@pytest.mark.slow
def test_the_smallest_network_within_a_drop_is_found() -> None:
    result = netdecouple.decouple(
        MODEL, CALIB, max_drop=1.0, labels=LABELS, samples=100, settings=replace(QUICK, effort="low")
    )
    assert result.report.accuracy is not None
    before, after = result.report.accuracy
    assert after >= before - 0.01 - 1e-9
    assert result.report.macs_before / result.report.macs > 3


@pytest.mark.slow
def test_the_smallest_network_within_a_limit_is_found() -> None:
    """It keeps the limit on inputs that took no part."""
    result = netdecouple.decouple(MODEL, CALIB, macs="least", within="90%", samples=150, settings=QUICK)
    promise, report = result.report.promise, result.report
    assert promise is not None
    assert promise.kept
    assert 0.9 <= promise.expected <= promise.measured == report.agreement.same_class
    assert report.macs_before / report.macs > 2
    assert netdecouple.evaluate([MODEL, result.model], LABELS)[1].same_class >= 0.9


def test_a_network_that_is_not_within_the_limit_is_returned_if_forced() -> None:
    images = images_for(classifier(), 60)
    arguments = {"macs": 0.3, "within": "kl=0.0001", "settings": QUICK}
    with pytest.raises(QualityError, match=r"not within kl=0.0001: a KL divergence of .*; ask for less"):
        netdecouple.decouple(classifier(), images, **arguments)
    report = netdecouple.decouple(classifier(), images, **arguments, force=True).report
    assert report.promise is not None
    assert not report.promise.kept
    assert report.promise.measured == pytest.approx(report.agreement.divergence)
    assert report == Report.from_json(report.to_json())


def test_no_network_within_a_limit_is_an_error() -> None:
    with pytest.raises(QualityError, match="no smaller network was found within kl=1e-12"):
        netdecouple.decouple(
            classifier(), images_for(classifier(), 40), macs="least", within="kl=1e-12", settings=QUICK
        )


class WeightTimer:
    """Everything takes 1 µs per weight; decoupled networks, or layers, so many times as much."""

    name, batch, lost, networks, layers, written = "made-up 1, 1 thread", 1, 0.0, 1.0, 1.0, 1.0
    disturbed = 0  # so many measurements of what would be written take twice as long

    def __init__(self, source: Any, network: Any, runtime: str, threads: int, forms: Any) -> None:
        self.network = network

    def forms(self, layer: Any) -> tuple[str, ...]:
        return ("parallel",)

    def layer_times(self, layer: Any, kinds: Any) -> list[float]:
        return [
            sum(int(np.prod(g.weight_shape)) for g in s.stages)
            / 1000
            * (self.layers if len(s.stages) > 1 else 1)
            for s, _ in kinds
        ]

    def network_times(self, models: Any) -> np.ndarray:
        models = (self.network.build({}), *models)
        sizes = [sum(int(np.prod(t.dims)) for t in model.graph.initializer) / 1000 for model in models]
        if "netdecouple.plan" in str(models[-1].metadata_props):
            sizes[-1] *= self.written * (2 if type(self).disturbed > 0 else 1)
            type(self).disturbed -= 1
        return np.array([sizes[0], *(self.networks * size for size in sizes[1:])])


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[WeightTimer]:
    """Times that every machine has."""
    timer = type("Timer", (WeightTimer,), {})
    monkeypatch.setattr(OnnxSource, "timer", lambda *arguments: timer(*arguments))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return timer


def test_without_a_goal_the_fastest_network_is_found(made_up: type[WeightTimer]) -> None:
    """Within what is usual for such outputs, unless the user says otherwise."""
    images = images_for(classifier(), 60)
    report = netdecouple.decouple(classifier(), images, within="kl=0.05", settings=QUICK).report
    assert report.promise.kept
    assert report.speed.share < 0.9
    stricter = netdecouple.decouple(classifier(), images, within="kl=0.005", settings=QUICK).report
    assert report.speed.share < stricter.speed.share < 1
    asked = netdecouple.decouple(classifier(), images_for(classifier(), 600), settings=QUICK).report
    assert asked.promise.asked == "99%"
    assert asked.promise.kept


def test_what_is_not_faster_is_not_returned(made_up: type[WeightTimer]) -> None:
    """Neither where its layers are slower, nor where they were faster alone; not even if it is forced."""
    images = images_for(classifier(), 60)
    message = r"no network that is faster than the original in made-up .*within kl=0.05"
    for layers, networks, force, more in (
        (100, 100, False, ";"),
        (1, 100, False, "; the best takes .*%"),
        (1, 100, True, ";"),
    ):
        made_up.layers, made_up.networks = layers, networks
        made_up.name = f"made-up {layers}, 1 thread"  # measured times are kept by it
        with pytest.raises(SpeedError, match=message + more):
            netdecouple.decouple(classifier(), images, within="kl=0.05", settings=QUICK, force=force)


def test_the_last_measurement_decides_on_a_share_of_time(made_up: type[WeightTimer]) -> None:
    """A network that is slower than its plan was is not returned, unless it is forced."""
    images = images_for(classifier(), 60)
    made_up.lost = 0.4
    report = netdecouple.decouple(classifier(), images, latency=0.7, settings=QUICK).report
    assert report.speed.share <= 0.7 * 1.02
    assert "other work took 40% of the processor" in report.warnings[0]
    made_up.disturbed = 1  # it is timed again
    report = netdecouple.decouple(classifier(), images, latency=0.7, settings=QUICK).report
    assert report.speed.share <= 0.7 * 1.02
    made_up.written, made_up.lost = 1.5, 0.0
    with pytest.raises(SpeedError, match=r"\d+% of the time in made-up .*, where 70% was asked for"):
        netdecouple.decouple(classifier(), images, latency=0.7, settings=QUICK)
    report = netdecouple.decouple(classifier(), images, latency=0.7, settings=QUICK, force=True).report
    assert report.speed.share > 0.75
    made_up.written = 0.5
    report = netdecouple.decouple(classifier(), images, latency=0.7, settings=QUICK).report
    assert re.match(r"3\d% of the time in made-up .*, where 70% was asked for", report.warnings[0])


def test_the_usual_limit_depends_on_the_outputs() -> None:
    assert str(Tolerance.usual([np.zeros((99, 10), np.float32)], 99)) == "99%"
    assert str(Tolerance.usual([np.zeros((98, 10), np.float32)], 98)) == "kl=0.005"
    assert str(Tolerance.usual([np.zeros((4, 1, 8, 8), np.float32)], 4)) == "42dB"
    apart = np.random.default_rng(0).random((4, 9, 50), np.float32) * np.repeat([640, 1], [4, 5])[:, None]
    assert str(Tolerance.usual([apart], 4)) == "error=0.01"
    assert str(Tolerance.usual(rows(), 6)) == "error=0.01"


def test_a_limit_on_a_detectors_error_is_on_boxes_and_scores() -> None:
    """Boxes of background may be anything."""
    original = rows()
    new = [original[0].copy()]
    new[0][:, 20:, :4] *= 1.5
    promise = Tolerance.parse("error=0.01").promise(original, new, lambda: original)
    assert promise.kept
    new[0][:, :3, :4] *= 1.5
    assert not Tolerance.parse("error=0.01").promise(original, new, lambda: original).kept


def test_outputs_that_changed_a_lot_are_warned_of() -> None:
    """By the PSNR of pictures, the relative error of other outputs, and where more changed than predicted."""
    images = images_for(restorer(), 40)
    report = netdecouple.decouple(restorer(), images, macs=0.3, settings=QUICK).report
    assert "dB between the outputs" in report.warnings[0]
    images = images_for(classifier(), 60)
    loss = replace(QUICK, loss="relative")
    for macs, warning in ((0.2, "a relative error of 0"), (0.95, "")):
        report = netdecouple.decouple(classifier(), images, macs=macs, settings=loss).report
        assert (warning in "".join(report.warnings)) if warning else report.warnings == ()


@pytest.mark.parametrize("make", [classifier, residual, kinds, perceptron])
@pytest.mark.parametrize("data_free", [False, True])
def test_a_float16_model_keeps_its_type(make: Callable[[], onnx.ModelProto], data_free: bool, tmp_path: Path):
    """Every weight, input and output; it loses what the same network loses in float32, but for rounding."""
    settings = Settings(families=("nd-dp", "cd"), data_free=data_free)
    images = images_for(make(), 60)
    results = [
        netdecouple.decouple(model, images, parameters=0.8, settings=settings)
        for model in (make(), halved(make()))
    ]
    model = results[1].model
    results[1].save(tmp_path / "half.onnx")
    assert onnx.load(tmp_path / "half.onnx") == model
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    types = [t.data_type for t in model.graph.initializer if t.data_type in floats]
    types += [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
    assert set(types) == {TensorProto.FLOAT16}
    assert "Cast" not in {n.op_type for n in model.graph.node}
    single, half = (r.report.agreement for r in results)
    assert single is not None
    assert half is not None
    assert half.divergence <= 1.5 * single.divergence + 0.01


def edited(name: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """The classifier with some of its constants changed."""
    model = classifier()
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    array = change(numpy_helper.to_array(tensor)).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


TROUBLE: dict[str, Callable[[np.ndarray], tuple[onnx.ModelProto, np.ndarray]]] = {
    "huge": lambda x: (residual(), 1e30 * x),
    "denormal": lambda x: (classifier(), 1e-42 * x),
    "constant": lambda x: (classifier(), 0 * x + 3),
    "zero": lambda x: (residual(), 0 * x),
    "dead channels": lambda x: (classifier(), x * np.array([1, 0, 0])[:, None, None]),
    "channels of all sizes": lambda x: (classifier(), x * np.array([1e-9, 1, 1e9])[:, None, None]),
    "far from zero": lambda x: (classifier(), x + 1e5),
    "zero weights": lambda x: (edited("conv2.weight", lambda w: 0 * w), x),
    "dead activations": lambda x: (edited("bn1.shift", lambda w: w - 100), x),
    "huge weights": lambda x: (edited("conv2.weight", lambda w: 1e30 * w), x),
    "hardly anything, in float16": lambda x: (halved(classifier()), 1e-7 * x),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("families", [("nd-dp",), ("sd", "cd", "cp")])
@pytest.mark.parametrize("name", TROUBLE)
def test_numerical_trouble_is_solved(name: str, families: tuple[str, ...]) -> None:
    """What comes out is finite, also on other inputs, and was held against the plan's own arithmetic."""
    model, images = TROUBLE[name](images_for(classifier(), 40))
    settings = Settings(families=families)
    result = netdecouple.decouple(model, images.astype(np.float32), macs=0.6, settings=settings)
    changed = [layer for layer in result.report.layers if layer.family != "kept"]
    assert changed
    assert all(np.isfinite([la.measured_error, la.predicted_error]).all() for la in changed)
    assert np.isfinite(result.report.agreement.divergence)
    kind = np.float16 if "float16" in name else np.float32
    new = images_for(classifier(), 6, seed=1).astype(kind)
    (expected,), (found,) = (run(open_session(m), None, {"image": new}) for m in (model, result.model))
    assert np.isfinite(expected).all()
    assert np.isfinite(found).all()


def test_what_overflows_is_refused_with_the_layers_name() -> None:
    """In float32, and sooner in float16."""
    images = images_for(classifier(), 40)
    for model, scale in ((classifier(), 5e37), (halved(classifier()), 1e4)):
        with pytest.raises(ModelError, match="NaN or Inf in the activations of layer 'conv1'"):
            netdecouple.decouple(model, scale * images, macs=0.6, settings=QUICK)


def test_float16_is_not_for_the_fused_operator() -> None:
    """It computes in float32."""
    with pytest.raises(ModelError, match="emit='fused' is for float32 models, this one is float16"):
        netdecouple.decouple(halved(classifier()), images_for(classifier(), 20), macs=0.5, emit="fused")


@pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
def test_a_layer_in_float16_is_never_written_fused() -> None:
    """In a network that computes in float32 but for that layer, its own type stays."""
    images = images_for(half_precision(), 60)
    made = netdecouple.decouple(half_precision(), images, macs=0.6, settings=QUICK, emit="fused").model
    floats = [t for t in made.graph.initializer if t.data_type != TensorProto.INT64]
    types = {t.name.split("/")[0].removesuffix(".weight"): t.data_type for t in floats}
    assert types["half"] == TensorProto.FLOAT16
    assert types["after"] == TensorProto.FLOAT


@pytest.mark.parametrize("batch", [1, "N"])
def test_a_network_that_says_one_number_is_decoupled(batch: int | str) -> None:
    """Age, quality, a count: one image has one number, which has no variance."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 16, 3, "conv1"))
    x = b.node("Relu", b.conv(x, 16, 16, 3, "conv2"))
    flat = b.node("Flatten", b.node("GlobalAveragePool", x))
    b.node("Gemm", flat, b.weight("fc.weight", 1, 16), b.bias("fc.bias", 1), out="age", transB=1)
    model = b.model([("age", (batch, 1))], (batch, 3, 12, 12))
    result = netdecouple.decouple(model, images_for(model, 40), macs=0.6, settings=QUICK)
    assert result.report.difference < 1e-4


@pytest.mark.parametrize("refine", [None, 0.001])
def test_scores_of_one_pixel_are_a_classifiers(refine: float | None) -> None:
    """Fully convolutional classifiers end in (N, classes, 1, 1): classes are compared, and counted."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 16, 3, "conv1"))
    x = b.conv(b.node("Relu", b.conv(x, 16, 16, 3, "conv2")), 16, 7, 1, "classes")
    b.node("GlobalAveragePool", x, out="logits")
    model = b.model([("logits", ("N", 7, 1, 1))], ("N", 3, 12, 12))
    images = images_for(model, 40)
    if refine:
        pytest.importorskip("torch")
    result = netdecouple.decouple(model, images, macs=0.6, settings=QUICK, refine=refine)
    assert result.plan.loss == "kl"
    assert result.report.agreement is not None
    assert result.report.agreement.same_class is not None
    best = run(open_session(model), None, {"image": images})[0].reshape(40, 7).argmax(axis=1)
    (score,) = netdecouple.evaluate([model], (images, best))
    assert (score.top1, score.images) == (1.0, 40)


@pytest.mark.parametrize("alone", [True, False])
def test_boxes_of_all_images_in_one_list_are_no_classes(alone: bool) -> None:
    """As NonMaxSuppression gives them: as many as there are, and not as many from the new network."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 16, 3, "conv1"))
    x = b.conv(b.node("Relu", b.conv(x, 16, 16, 3, "conv2")), 16, 5, 3, "head", strides=[2, 2])
    rows = b.node("Reshape", x, b.constant("rows", [0, 5, -1], np.int64))
    four, one = b.constant("four", [4], np.int64), b.constant("one", [5], np.int64)
    corners = b.node(
        "Slice", rows, b.constant("zero", [0], np.int64), four, b.constant("axis", [1], np.int64)
    )
    b.node("Transpose", corners, out="boxes", perm=[0, 2, 1])
    b.node("Slice", rows, four, one, "axis", out="scores")
    limits = (b.constant("most", [9], np.int64), b.constant("overlap", [0.5]), b.constant("least", [0.0]))
    b.node("NonMaxSuppression", "boxes", "scores", *limits, out="chosen")
    outputs = [("chosen", ("M", 3)), ("scores", ("N", 1, "A"))]
    model = b.model(outputs[:1] if alone else outputs, ("N", 3, 12, 12))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    result = netdecouple.decouple(model, images_for(model, 40), macs=0.6, settings=QUICK)
    assert result.plan.loss == "relative"
    assert result.report.difference < 1e-4


def test_the_original_is_never_changed() -> None:
    model = classifier()
    before = model.SerializeToString(deterministic=True)
    netdecouple.decouple(model, images_for(model, 40), macs="2x", settings=QUICK)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"macs": "30x", "settings": replace(QUICK, data_free=True)},
            BudgetError,
            r"the least this network can have is \d",
        ),
        ({"calib": None, "settings": Settings(data_free=True)}, BudgetError, "give calib=, or a budget"),
        ({"macs": "least"}, BudgetError, "give within="),
        ({"macs": "least", "within": "99%", "parameters": 0.5}, BudgetError, "give one goal"),
        ({"max_drop": 1.0}, BudgetError, "labels="),
        ({"within": "42"}, BudgetError, "within='42': write 99%"),
        ({"within": "99%", "calib": None, "settings": Settings(data_free=True)}, BudgetError, "give calib="),
        ({"macs": "2x", "max_drop": 1.0, "labels": "x"}, BudgetError, "give one goal"),
        ({"macs": "2x", "settings": Settings(rule=Rule("sd", "share", 0.5))}, BudgetError, "give one goal"),
        ({"macs": "2x", "calib": None}, CalibrationError, "give calib="),
        (
            {"macs": "2x", "calib": np.zeros((20, 3, 32, 32), np.float32)},
            CalibrationError,
            r"expected .*1, 32, 32",
        ),
        ({"macs": "2x", "calib": np.zeros((5, 1, 32, 32), np.float32)}, CalibrationError, "too few"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        netdecouple.decouple(MODEL, **({"calib": CALIB, "samples": 40} | arguments))


@pytest.mark.parametrize("families", [(), ("nope",), ("nd+cd",)])
def test_families_that_make_no_sense_are_refused(families: tuple[str, ...]) -> None:
    with pytest.raises(BudgetError, match="families="):
        netdecouple.decouple(MODEL, macs=0.5, settings=Settings(data_free=True, families=families))


def test_a_loss_that_is_none_is_refused() -> None:
    with pytest.raises(BudgetError, match="loss='l2': give kl or relative"):
        Settings(loss="l2")  # type: ignore[arg-type]


@pytest.mark.usefixtures("short_timing")
def test_networks_of_open_sizes_are_timed_with_inputs_as_they_were_decoupled_with(tmp_path: Path) -> None:
    """Beside the original, which does not know of it; without such a network the size has to be given."""
    model = restorer()
    images = images_for(model, 40)
    netdecouple.decouple(model, images, macs=0.5, settings=QUICK).save(tmp_path / "out.onnx")
    onnx.save(model, tmp_path / "in.onnx")
    times = netdecouple.bench([tmp_path / "in.onnx", tmp_path / "out.onnx"], seconds=0)
    assert {row.shapes for row in times.models} == {((1, *images.shape[1:]),)}
    with pytest.raises(ModelError, match="give its size with shape="):
        netdecouple.bench([tmp_path / "in.onnx"], seconds=0)
