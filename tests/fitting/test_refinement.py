"""Training the decoupled layers together: what is kept, what is changed of the inputs, what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

import netdecouple
from netdecouple import Settings
from netdecouple.errors import BudgetError, ModelError, UnavailableError
from netdecouple.planning.divergence import divergence
from netdecouple.report.model import Report
from netdecouple.report.text import summary
from tests.networks import Builder, classifier, detector, images_for, restorer

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


class Alone:
    """Random numbers with which every picture is mixed with itself."""

    def __init__(self) -> None:
        self.integers, self.random = np.random.default_rng(0).integers, np.random.default_rng(1).random

    def permutation(self, n: int) -> np.ndarray:
        return np.arange(n)


def test_pictures_are_mirrored_and_shifted() -> None:
    """A picture that is its column's number is still a sequence of steps of one, also at its ends."""
    pictures = np.tile(np.arange(16, dtype=np.float32), (64, 1, 16, 1))
    changed = augmented(pictures, Alone())  # type: ignore[arg-type]
    assert changed.shape == pictures.shape
    assert changed.dtype == np.float32
    steps = np.diff(changed[:, 0, 0], axis=1).round(4)
    assert np.isin(steps, (-1, 1)).all()
    mirrored = np.mean(steps[:, 8] == -1)
    assert 0.25 < mirrored < 0.75
    assert len(np.unique(changed[:, 0, 0, 8].round(4))) > 4, "all are shifted alike"


def test_pictures_are_mixed() -> None:
    pictures = np.repeat(np.eye(8, dtype=np.float32)[:, :, None, None], 16, axis=2).repeat(16, axis=3)
    changed = augmented(pictures, np.random.default_rng(0))
    np.testing.assert_allclose(changed.sum(axis=1), 1, rtol=1e-5)
    assert sum(((row > 0.01) & (row < 0.99)).any() for row in changed[:, :, 0, 0]) >= 4


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
    with torch.no_grad():
        module[-1].weight *= 20
    weights = [parameter.clone() for parameter in module.parameters()]
    new = netdecouple.decouple(module, torch.randn(60, 3, 12, 12), **ARGUMENTS, refine=1)
    refined = new.decoupling.report.refinement
    assert refined.loss < refined.loss_before
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))


def test_weights_that_are_given_back_stay_as_they_were() -> None:
    """The training goes on, and changes weights in place."""
    from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
    from netdecouple.frontends.torch.convolutions import Convolution, Factorized

    geometry = ConvGeometry(4, 3, 3, 3)
    stage = ConvStage(geometry, np.ones(geometry.weight_shape, np.float32))
    exact = Factorization(geometry, (stage,), np.ones(4, np.float32))
    module = Factorized.of(
        Convolution(
            n_o=4, n_i=3, kernel=(3, 3), strides=(1, 1), before=(0, 0), after=(0, 0), dilations=(1, 1)
        ),
        exact,
    )
    given = module.factorization()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert given.stages[0].weight.min() == 1
    assert given.bias.min() == 1


def test_where_nothing_is_changed_nothing_is_trained() -> None:
    model = classifier()
    report = netdecouple.decouple(model, images_for(model, 20), macs=1.0, settings=QUICK, refine=1).report
    assert report.refinement is None
    assert report.macs == report.macs_before


@pytest.mark.parametrize("are_logits", [True, False])
def test_the_loss_is_the_divergence_that_is_reported(are_logits: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.standard_normal((6, 10)).astype(np.float32)) for _ in range(2))
    if not are_logits:
        a, b = a.softmax(dim=-1), b.softmax(dim=-1)
    expected = divergence([a.numpy()], [b.numpy()], "kl")
    assert float(refinement._loss([a], [b.requires_grad_()], "kl").detach()) == pytest.approx(
        expected, rel=1e-4
    )


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


def test_a_fixed_batch_is_filled_up() -> None:
    """Of 13 held-out inputs the last batch of four has one."""
    model = classifier(batch=4)
    report = netdecouple.decouple(model, images_for(model, 65), **ARGUMENTS, refine=1).report
    assert report.refinement is not None
    assert report.refinement.loss == pytest.approx(report.agreement.divergence, rel=0.01)


def test_outputs_that_are_not_one_per_input_are_refused() -> None:
    with pytest.raises(ModelError, match="not all outputs are one per input"):
        netdecouple.decouple(detector(), images_for(detector(), 20), macs=0.5, refine=1)


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
