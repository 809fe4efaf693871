"""The curve as data, and where its knee is."""

from __future__ import annotations

import csv
import io
import json

import pytest

from netdecouple.report.model import Agreement
from netdecouple.report.sweep import Compared, LayerChoice, Sweep, SweepPoint, knee


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


def curve(*pairs: tuple[int, float]) -> list[SweepPoint]:
    return [point(macs, loss) for macs, loss in pairs]


def test_the_knee_of_a_curve_that_bends():
    """Little is lost down to a third of the MACs, and much beyond."""
    assert knee(curve((800, 0.002), (500, 0.01), (333, 0.02), (250, 0.2), (200, 0.4))) == 2


def test_the_order_of_the_points_does_not_matter():
    """The same network is found."""
    assert knee(curve((200, 0.4), (333, 0.02), (500, 0.01), (250, 0.2), (800, 0.002))) == 1


def test_a_flat_curve_recommends_the_smallest():
    """Nothing that shows is lost anywhere."""
    assert knee(curve((800, 0.001), (500, 0.002), (333, 0.009))) == 2


def test_a_straight_line_has_no_knee():
    """Every halving of the MACs costs the same: it is the user's to choose."""
    assert knee(curve((500, 0.1), (250, 0.2), (125, 0.3))) is None


def test_a_curve_that_is_saturated_has_no_knee():
    """All is lost at once, or the loss rises less and less."""
    assert knee(curve((800, 2.0), (500, 2.2), (250, 2.3))) is None
    assert knee(curve((800, 0.2), (500, 0.3), (250, 0.35))) is None


def test_ruined_networks_do_not_hide_the_knee():
    """However much is lost where all is lost, the knee stays: up to 10 nats it would move."""
    some = [(800, 0.002), (500, 0.01), (400, 0.03), (250, 0.3)]
    assert knee(curve(*some, (200, 0.6), (150, 10.0))) == knee(curve(*some, (200, 3.0))) == 2


def test_a_point_that_another_beats_is_not_the_knee():
    """It has more MACs and loses more."""
    assert knee(curve((500, 0.05), (480, 0.01), (300, 0.3))) == 1


def test_few_points():
    """The original and one network make no curve, unless that network loses nothing."""
    assert knee([]) is None
    assert knee(curve((500, 0.1))) is None
    assert knee(curve((500, 0.001))) == 0


def test_without_calibration_images_the_predicted_loss_counts():
    """It is all there is."""
    pairs = [(800, 0.002), (500, 0.01), (333, 0.02), (250, 0.2), (200, 0.4)]
    assert knee([point(macs, loss, measured=False) for macs, loss in pairs]) == 2


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
