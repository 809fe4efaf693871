"""The report as data, and the text made of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from netdecouple.application import Applied
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.report.report import Agreement, Report, describe, layer_reports
from netdecouple.report.text import count, report_table, short_name, times
from tests.planning.layers import conv, linear


@pytest.fixture
def report() -> Report:
    layers = {la.name: la for la in (conv("/net/conv1/Conv", 8, 16, 10), linear("fc", 16, 10))}
    first = layers["/net/conv1/Conv"]
    rows = (
        LayerPlan(
            first.name,
            "Conv",
            "nd-dp",
            "",
            20,
            (2,) * 4 + (3,) * 4,
            0.01,
            first.macs,
            50_000,
            first.parameters,
            516,
            0.05,
            0.1,
        ),
        LayerPlan("fc", "Gemm", "kept", "fully connected layer", 0, (), 0.0, 160, 160, 170, 170, 0.0, 0.0),
    )
    plan = Plan(1, "", "", 50, 0, "kl", False, False, "50% MACs", rows)
    applied = Applied(plan, {}, {first.name: 0.06}, {first.name: 400})
    agreement = Agreement(10, "kl", 0.012, 0.1, 0.9)
    return Report("net.onnx", "0.1.0", plan.budget, layer_reports(layers, applied), agreement, 1e-7, None, ())


def text(report: Report) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(report_table(report))
    return console.file.getvalue()


def test_json_has_the_totals_and_every_layer(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["macs_before"] == 8 * 16 * 9 * 100 + 160
    assert data["macs"] == 50_160
    assert [layer["name"] for layer in data["layers"]] == ["/net/conv1/Conv", "fc"]
    assert data["layers"][0]["terms_per_channel"] == [2, 3]
    assert data["layers"][0]["measured_error"] == 0.06
    assert data["layers"][1]["reason"] == "fully connected layer"


def test_text_says_gain_loss_and_why(report: Report) -> None:
    shown = text(report)
    assert "net/conv1/Conv" in shown
    assert "2–3" in shown
    assert "kept: fully connected layer" in shown
    assert "2.30× fewer" in shown
    assert "same class on 90.0%" in shown
    assert "on 10 held-back images" in shown


def test_a_layer_with_few_samples_is_pointed_out(report: Report) -> None:
    """Ten samples per unknown are wanted: 72 unknowns, 400 samples."""
    assert "400 of 720 samples wanted" in text(report)
    assert "1 layer had fewer samples than wanted" in text(report)


def test_skipped_images_and_accuracy_are_told(report: Report) -> None:
    shown = text(replace(report, skipped=("bad.png",), accuracy=(0.915, 0.905)))
    assert "1 unreadable images: bad.png" in shown
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
