"""The report as data, and the text made of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from netdecouple.fitting.apply import Applied
from netdecouple.network import Layer
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.report.build import describe, layer_reports, warnings_of
from netdecouple.report.formatting import count, times
from netdecouple.report.html import report_html
from netdecouple.report.model import Agreement, Report, Speed
from netdecouple.report.text import report_table, short_name
from tests.planning.layers import conv, linear


def plan_of(*rows: LayerPlan) -> Plan:
    return Plan(
        model="",
        images="",
        samples=50,
        seed=0,
        loss="kl",
        data_free=False,
        uniform_rank=False,
        budget="50% MACs",
        layers=rows,
    )


def changed(
    layer: Layer, family: str, sizes: tuple[int, ...], channels: tuple[tuple[int, ...], ...]
) -> LayerPlan:
    return LayerPlan(
        name=layer.name,
        operator="Conv",
        family=family,
        sizes=sizes,
        channels=channels,
        ridge=0.01,
        macs_before=layer.macs,
        macs=50_000,
        parameters_before=layer.parameters,
        parameters=516,
        predicted_error=0.05,
        predicted_loss=0.1,
    )


@pytest.fixture
def report() -> Report:
    layers = {la.name: la for la in (conv("/net/conv1/Conv", 8, 16, 10), linear("fc", 16, 10))}
    first = layers["/net/conv1/Conv"]
    channels = np.arange(8).repeat([2] * 4 + [3] * 4)
    plan = plan_of(
        changed(first, "nd-dp", (20,), (tuple(channels.tolist()),)),
        LayerPlan.kept(layers["fc"], "worth its cost"),
    )
    applied = Applied(plan=plan, factorizations={}, errors={first.name: 0.06}, samples={first.name: 400})
    agreement = Agreement(images=10, loss="kl", divergence=0.012, predicted=0.1, same_class=0.9)
    written = [  # the last filters of the convolution are read by nobody
        replace(conv(f"{first.name}/depthwise0", 20, 20, 10, groups=20), macs=18_000, parameters=180),
        replace(conv(f"{first.name}/pointwise1", 20, 15, 10, k=1), macs=30_000, parameters=315),
        replace(linear("fc", 15, 10), macs=150, parameters=160),
    ]
    rows_told = layer_reports(layers, applied, written, {})
    return Report(
        model="net.onnx",
        netdecouple="0.1.0",
        budget=plan.budget,
        layers=rows_told,
        agreement=agreement,
        difference=1e-7,
    )


def text(report: Report) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(report_table(report))
    return console.file.getvalue()


def test_json_has_the_totals_and_every_layer(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["macs_before"] == 8 * 16 * 9 * 100 + 160
    assert data["macs"] == 48_000 + 150
    assert [layer["name"] for layer in data["layers"]] == ["/net/conv1/Conv", "fc"]
    assert data["layers"][0]["sizes"] == [20]
    assert data["layers"][0]["terms_per_channel"] == [2, 3]
    assert data["layers"][0]["measured_error"] == 0.06
    assert data["layers"][1]["reason"] == "worth its cost"


def test_text_says_gain_loss_and_why(report: Report) -> None:
    shown = text(report)
    assert "net/conv1/Conv" in shown
    assert "20 (2–3 each)" in shown
    assert "kept: worth its cost" in shown
    assert "2.40× fewer" in shown
    assert "same class on 90.0%" in shown
    assert "on 10 held-out inputs" in shown


def test_a_latency_budget_is_shown_as_it_was_measured(report: Report) -> None:
    """The plan has the share that its search ended with; where time is no budget, the budget stays."""
    speed = Speed(place="onnxruntime, 1 thread", before=1.0, after=0.603, share=0.603, foreseen=0.54)
    timed = replace(report, speed=speed, budget="54.31% latency and 50% MACs")
    assert text(timed).startswith("net.onnx, decoupled to 60% latency and 50% MACs")
    assert "1.66× faster, 60% (predicted 54%) in onnxruntime, 1 thread" in text(timed)
    slower = replace(timed, speed=replace(speed, after=1.2, share=1.2))
    assert "1.20× slower, 120%" in text(slower)
    assert "slower" in report_html(slower)
    assert "decoupled to 60% latency and 50% MACs" in report_html(timed)
    assert "decoupled to 54.31% latency" in text(replace(timed, speed=None))
    assert "decoupled to 50% MACs" in text(replace(timed, budget="50% MACs"))


def test_costs_are_those_of_what_was_written(report: Report) -> None:
    """The plan has counted filters that nobody reads any more; stages are named after their layer."""
    first, fc = report.layers
    assert (first.macs, first.parameters) == (18_000 + 30_000, 180 + 315)
    assert (fc.macs_before, fc.macs, fc.parameters_before, fc.parameters) == (160, 150, 170, 160)


def test_a_stage_belongs_to_the_layer_whose_name_is_longest() -> None:
    """A layer may be named like the folder of another one's stages, and like another one's beginning."""
    layers = {name: conv(name, 8, 16, 10) for name in ("block", "block/conv", "block/conv1")}
    plan = plan_of(*(LayerPlan.kept(layer, "") for layer in layers.values()))
    written = [
        replace(conv(name, 8, 8, 10), macs=macs)
        for name, macs in {
            "block": 1,
            "block/conv/conv0": 10,
            "block/conv/conv1": 100,
            "block/conv1": 1000,
        }.items()
    ]
    found = layer_reports(layers, Applied(plan=plan, factorizations={}), written, {})
    assert [layer.macs for layer in found] == [1, 110, 1000]


@pytest.mark.parametrize(
    ("family", "sizes", "channels", "shown"),
    [
        ("cd+nd-dp", (5, 12), ((), (0,) * 12), "5 12"),
        ("cp", (6,), ((0, 1, 2, 5, 6, 7),), "6"),
        ("nd-dp", (16,), (tuple(range(8)) * 2,), "16 (2 each)"),
        ("nd-dp", (16,), (), "16"),
    ],
)
def test_sizes_of_every_family_in_turn_are_shown(
    report: Report, family: str, sizes: tuple[int, ...], channels: tuple[tuple[int, ...], ...], shown: str
) -> None:
    layer = conv("c", 8, 16, 10)
    plan = plan_of(changed(layer, family, sizes, channels))
    rows = layer_reports(
        {"c": layer}, Applied(plan=plan, factorizations={}), [replace(layer, name="c/conv0")], {}
    )
    assert rows[0].sizes == sizes
    lines = [line.strip() for line in text(replace(report, layers=rows)).splitlines()]
    (line,) = [line for line in lines if line.startswith("c ")]
    assert f"  {family} " in line
    assert f" {shown}  " in line
    (legend,) = [line for line in lines if line.startswith("sizes of every family")]
    assert all(f" {name}: " in legend for name in family.split("+"))


def test_a_layer_with_few_samples_is_pointed_out(report: Report) -> None:
    """Ten samples per unknown are wanted: 72 unknowns, 400 samples."""
    assert "400 of 720 samples wanted" in text(report)
    assert "1 layer had fewer samples than wanted" in text(report)


def test_a_layer_with_dependent_inputs_is_pointed_out(report: Report) -> None:
    """Where there were samples enough; the fewer samples, the more depend on each other anyway."""
    rows = [replace(la, samples_wanted=0, dependent=8) for la in report.layers]
    assert f"8 of {rows[0].inputs} inputs constant or dependent" in text(replace(report, layers=tuple(rows)))


def test_skipped_images_and_accuracy_are_told(report: Report) -> None:
    shown = text(replace(report, skipped=("bad.png",), accuracy=(0.915, 0.905)))
    assert "1 unreadable image: bad.png" in shown
    assert "91.5% → 90.5% top-1" in shown


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (40_551_040, "40.6 M"), (15.47e9, "15.5 G"), (999_900, "1000 k")],
)
def test_counts_are_short(number: float, text: str) -> None:
    assert count(number) == text


def test_ratios_and_names_are_short() -> None:
    assert times(10, 4) == "2.50×"
    assert short_name("/layer1/conv") == "layer1/conv"
    assert short_name("/" + "a" * 20 + "/" + "b" * 20, 21) == "aaaaaaaaaa…bbbbbbbbbb"
    assert describe(conv("c", 8, 16, 10, groups=2)) == "8→16 3×3 2 groups @10"


def test_a_fully_connected_layers_shape_is_its_inputs_and_outputs() -> None:
    assert describe(linear("fc", 512, 10)) == "512→10"


@pytest.mark.parametrize(
    ("agreement", "warnings"),
    [
        ({"same_class": 0.94, "divergence": 0.1, "predicted": 0.1}, ["another class for 12 of 200 held-out"]),
        ({"same_class": 0.95, "divergence": 0.1, "predicted": 0.1}, []),
        (
            {"same_class": 0.99, "divergence": 0.1, "predicted": 0.02},
            ["5.0 times the change"],
        ),
        ({"same_class": 1.0, "divergence": 0.0009, "predicted": 0.0001}, []),
        ({"same_text": 0.94, "divergence": 0.1, "predicted": 0.1}, ["another text for 12 of 200 held-out"]),
        ({"same_text": 0.96, "divergence": 0.1, "predicted": 0.1}, []),
        ({"psnr": 34.9, "divergence": 0.01, "predicted": 0.01}, ["a PSNR of 34.9 dB"]),
        ({"psnr": 35.1, "divergence": 0.2, "predicted": 0.2}, []),
        ({"divergence": 0.06, "predicted": 0.06}, ["a relative error of 0.06"]),
        ({"divergence": 0.04, "predicted": 0.0}, ["times the change that was predicted"]),
    ],
)
def test_warnings_name_what_changed(agreement: dict, warnings: list[str]):
    """Classes, pictures, other outputs, and surprises; changes that are negligible surprise no one."""
    given = {"images": 200, "loss": "kl", "same_class": None, **agreement}
    found = warnings_of(Agreement(**given))
    assert len(found) == len(warnings)
    for text, warning in zip(found, warnings, strict=True):
        assert warning in text
