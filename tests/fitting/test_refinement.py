"""Training the decoupled layers together: what is kept, what is changed of the inputs, what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import netdecouple
from netdecouple import Settings
from netdecouple.errors import BudgetError, ModelError, UnavailableError
from netdecouple.report.model import Report
from netdecouple.report.text import summary
from tests.networks import Builder, classifier, images_for, restorer

torch = pytest.importorskip("torch")

from netdecouple.fitting import refinement  # noqa: E402
from netdecouple.fitting.refinement import augmented  # noqa: E402

QUICK = Settings(families=("nd",))
ARGUMENTS = {"macs": 0.4, "settings": QUICK}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second goes by whenever the time is read, so that a minute is some 55 steps on every machine."""
    ticks = itertools.count()
    monkeypatch.setattr(refinement, "monotonic", lambda: float(next(ticks)))


def test_pictures_are_mirrored_shifted_and_mixed() -> None:
    """A picture that is its column's number, shifted and mirrored, is still a sequence of steps of one."""
    rng = np.random.default_rng(0)
    pictures = np.tile(np.arange(16, dtype=np.float32), (64, 1, 16, 1))
    changed = augmented(pictures, rng)
    assert changed.shape == pictures.shape
    assert changed.dtype == np.float32
    assert changed.min() >= 0
    assert changed.max() <= 15 + 1e-5
    steps = np.diff(changed[:, 0, 0], axis=1)
    mirrored, straight = (np.mean(np.median(steps, axis=1) == sign) for sign in (-1, 1))
    assert mirrored > 0.2
    assert straight > 0.2
    assert np.mean(~np.isin(steps, (-1, 0, 1)).all(axis=1)) > 0.2, "none is mixed"


@pytest.mark.parametrize("build", [classifier, restorer])
def test_outputs_come_nearer_to_the_originals(build: object) -> None:
    model = build()  # type: ignore[operator]
    images = images_for(model, 60)
    before = netdecouple.decouple(model, images, **ARGUMENTS)
    result = netdecouple.decouple(model, images, **ARGUMENTS, refine=1)
    refined, report = result.report.refinement, result.report
    assert refined is not None
    assert refined.loss < refined.loss_before
    assert refined.loss_before == pytest.approx(before.report.agreement.divergence, rel=0.01)
    assert refined.loss == pytest.approx(report.agreement.divergence, rel=0.01)
    assert report.macs == before.report.macs
    assert result.plan == before.plan
    assert all(layer.measured_error is None for layer in report.layers)
    assert report == Report.from_json(report.to_json())
    assert any(
        line.plain.startswith("Refined") and "steps of training" in line.plain for line in summary(report)
    )


def test_a_module_is_refined_as_well() -> None:
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    weights = [parameter.clone() for parameter in module.parameters()]
    new = netdecouple.decouple(module, torch.randn(60, 3, 12, 12), **ARGUMENTS, refine=1)
    refined = new.decoupling.report.refinement
    assert refined.loss < refined.loss_before
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))


def test_what_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "RATE", 1e3)  # destroys the network at the first step
    model = classifier()
    result = netdecouple.decouple(model, images_for(model, 60), **ARGUMENTS, refine=1)
    before = netdecouple.decouple(model, images_for(model, 60), **ARGUMENTS)
    report = result.report
    assert report.refinement is not None
    assert report.refinement.loss == report.refinement.loss_before
    assert any("brought nothing" in line.plain for line in summary(report))
    assert replace(report.agreement, predicted=0) == replace(before.report.agreement, predicted=0)


def test_a_network_that_cannot_be_refined_is_refused_before_the_work() -> None:
    b = Builder()
    x = b.node("Celu", b.conv("image", 3, 12, 3, "first"), name="odd")
    b.classifier(b.conv(x, 12, 12, 3, "second"), 12)
    steps: list[str] = []
    with pytest.raises(ModelError, match=r"cannot run its Celu 'odd' .*leave out refine="):
        netdecouple.decouple(
            b.model(), images_for(b.model(), 20), macs=0.5, refine=1,
            progress=lambda step, done, total: steps.append(step),
        )  # fmt: skip
    assert "Decoupling layers" not in steps


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_are_a_number_above_zero(minutes: float) -> None:
    with pytest.raises(BudgetError, match=r"refine=.*give minutes, more than 0"):
        netdecouple.decouple(classifier(), images_for(classifier(), 20), macs=0.5, refine=minutes)


def test_without_inputs_nothing_is_refined() -> None:
    with pytest.raises(BudgetError, match="refine= trains on calibration inputs"):
        netdecouple.decouple(classifier(), None, macs=0.5, refine=1, settings=Settings(data_free=True))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import netdecouple.fitting

    monkeypatch.delattr(netdecouple.fitting, "refinement")
    monkeypatch.setitem(__import__("sys").modules, "netdecouple.fitting.refinement", None)
    with pytest.raises(UnavailableError, match="refine= needs PyTorch"):
        netdecouple.decouple(classifier(), images_for(classifier(), 20), macs=0.5, refine=1)
