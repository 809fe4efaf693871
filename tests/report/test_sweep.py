"""The curve as data."""

from __future__ import annotations

import csv
import io
import json

import pytest

from netdecouple.report.model import Agreement
from netdecouple.report.sweep import Compared, LayerChoice, Sweep, SweepPoint


def point(macs: int, loss: float, measured: bool = True, **more: object) -> SweepPoint:
    """A network of so many MACs in a thousand."""
    agreement = Agreement(images=20, loss="kl", divergence=loss, predicted=loss, same_class=0.9)
    values: dict = {"accuracy": None, "file": None} | more
    return SweepPoint(
        budget=f"{macs / 10:g}% MACs",
        macs_before=1000,
        macs=macs,
        parameters_before=100,
        parameters=50,
        predicted_loss=loss,
        agreement=agreement if measured else None,
        **values,
    )


def test_without_calibration_images_the_predicted_loss_counts():
    """It is all there is."""
    pairs = [(800, 0.002), (500, 0.01), (333, 0.02), (250, 0.2), (200, 0.4)]
    for measured in (True, False):
        points = [point(macs, loss, measured=measured) for macs, loss in pairs]
        assert Sweep.of("net.onnx", "kl", points).knee == 2


@pytest.fixture
def sweep() -> Sweep:
    points = [point(500, 0.01, file="a.onnx", accuracy=(0.9, 0.8)), point(200, 0.4, measured=False)]
    other = Compared(point(300, 0.1), (LayerChoice("conv", "nd-dp", (4, 2)),))
    return Sweep.of("net.onnx", "kl", points, [other])


def test_layers_side_by_side():
    """Every layer of any plan; networks without a plan take no part."""
    one = Compared(point(300, 0.1), (LayerChoice("a", "nd-dp", (4, 2)), LayerChoice("b", "kept", ())))
    other = Compared(point(300, 0.1), (LayerChoice("b", "sd", (3,)),))
    sweep = Sweep.of("net.onnx", "kl", [], [one, Compared(point(200, 0.1), ()), other])
    found = {name: [str(choice) for choice in own] for name, own in sweep.side_by_side().items()}
    assert found == {"a": ["nd-dp 4 2", "None"], "b": ["kept", "sd 3"]}


def test_json(sweep: Sweep):
    """Every field, nested as it is."""
    read = json.loads(sweep.to_json())
    assert (read["model"], read["loss"]) == ("net.onnx", "kl")
    assert read["points"][0]["agreement"]["divergence"] == 0.01
    assert read["points"][1]["agreement"] is None
    assert read["compared"][0]["layers"] == [{"layer": "conv", "family": "nd-dp", "sizes": [4, 2]}]


def test_csv(sweep: Sweep):
    """One line per network; what is not known is left empty."""
    rows = list(csv.DictReader(io.StringIO(sweep.to_csv())))
    assert [row["budget"] for row in rows] == ["50% MACs", "20% MACs", "30% MACs"]
    assert (rows[0]["macs_before"], rows[0]["macs"], rows[0]["accuracy"]) == ("1000", "500", "0.8")
    assert (rows[1]["divergence"], rows[1]["file"]) == ("", "")
    assert {row["knee"] for row in rows} <= {"0", "1"}
