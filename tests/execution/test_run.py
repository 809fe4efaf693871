"""How much memory there is, and what it is divided into."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import netdecouple
from netdecouple import Resources, Settings
from netdecouple.convolution import ConvGeometry
from netdecouple.errors import BudgetError
from netdecouple.execution.run import parse_bytes
from netdecouple.fitting.sampling import SplitMoments
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.network import Layer
from tests import networks
from tests.networks import images_for

SETTINGS = Settings(families=("nd",))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4 * 10**9),
        ("500 MB", 5 * 10**8),
        ("3.5gib", 7 << 29),
        ("1024", 1024),
        (7, 7),
        ("2t", 2 * 10**12),
    ],
)
def test_amounts(text: str | int, expected: int):
    assert parse_bytes(text) == expected
    assert Resources(memory=text).memory == expected


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4XB", "0", "0GB", "4 GB of it", "1e9", "nan", "inf"])
def test_what_is_no_amount(text: str):
    with pytest.raises(BudgetError, match="write an amount like 4GB"):
        Resources(memory=text)


def test_everything_held_at_once_fits():
    """Stores and a layer in work; before these, a group's moments, and a batch."""
    given = Resources(memory="4GB").beside(200 << 20, 100 << 20)
    left = 4e9 - given.taken
    assert 2 * given.store_bytes + given.fit_bytes <= left
    assert given.moment_bytes + 4 * given.batch_bytes + 2 * given.store_bytes <= left


def test_without_a_limit_nothing_is_too_wide():
    assert Resources().fit_bytes == float("inf")
    assert Resources().beside(1 << 40, 1 << 40) == Resources()


def test_memory_that_the_model_alone_takes_is_told():
    with pytest.raises(
        BudgetError, match=r"--memory 1GB is too little: the model and its inputs take 6\.9 GB"
    ):
        Resources(memory="1GB").beside(1 << 30, 1 << 20)
    with pytest.raises(BudgetError, match="too little"):
        netdecouple.decouple(
            networks.classifier(),
            images_for(networks.classifier(), 20),
            macs=0.6,
            resources=Resources(memory=10**8),
        )


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each pass through the original network."""
    seen: list[int] = []
    observe = OnnxNetwork.observe

    def count(network: OnnxNetwork, images: np.ndarray, positions: dict, **options: bool) -> object:
        seen.append(len(positions))
        return observe(network, images, positions, **options)

    monkeypatch.setattr(OnnxNetwork, "observe", count)
    return seen


def test_smaller_groups_find_the_same(monkeypatch: pytest.MonkeyPatch):
    """Layers are watched a few at a time; losses and networks are those of one pass."""
    model = networks.residual()
    images = images_for(model, 30)
    seen = watched(monkeypatch)
    one = netdecouple.decouple(model, images, macs=0.6, settings=SETTINGS)
    assert len(seen) == 2
    seen.clear()
    monkeypatch.setattr(Resources, "moment_bytes", 200_000)
    monkeypatch.setattr(Resources, "row_bytes", 1 << 30)
    other = netdecouple.decouple(model, images, macs=0.6, settings=SETTINGS)
    assert len(seen) > 3
    same = [replace(row, predicted_loss=0, predicted_error=0, ridge=0) for row in one.plan.layers]
    assert [replace(r, predicted_loss=0, predicted_error=0, ridge=0) for r in other.plan.layers] == same
    for a, b in zip(one.plan.layers, other.plan.layers, strict=True):
        assert a.predicted_loss == pytest.approx(b.predicted_loss, rel=1e-3)


def test_layers_too_wide_are_fitted_from_their_weights(monkeypatch: pytest.MonkeyPatch):
    """They are judged by what that does to the network; the others are fitted to the inputs as ever."""
    model = networks.classifier()
    images = images_for(model, 40)
    wide = 8.5 * 8 * 144 * 160  # conv3 and conv2: 16 → 16 and 12 → 16 channels
    monkeypatch.setattr(Resources, "fit_bytes", wide - 1)
    seen = watched(monkeypatch)
    result = netdecouple.decouple(model, images, macs=0.5, settings=SETTINGS)
    assert "conv3" not in [la.name for la in result.report.layers if la.samples]
    changed = {row.name: row for row in result.plan.layers if row.changed}
    assert changed["conv3"].ridge == 0
    assert changed["conv2"].ridge > 0
    assert changed["conv3"].predicted_loss > 0
    assert seen[0] == 2  # without conv3
    assert {name for name, row in changed.items() if row.data_free} == {"conv3"}
    again = netdecouple.decouple(model, images, macs=0.5, settings=SETTINGS)
    assert again.model == result.model
    monkeypatch.undo()  # the plan says it, and whoever applies it need not
    assert netdecouple.apply_plan(model, result.plan, images).model == result.model


def test_a_layer_of_2048_channels_is_beyond_4_gb():
    """Three Gram matrices of it alone would take 8 GB; one of 512 channels has room."""

    def layer(n: int) -> Layer:
        g = ConvGeometry(n, n, 3, 3, pads=(1, 1, 1, 1))
        return Layer("x", "Conv", 1, 1, g, size=(14, 14))

    given = Resources(memory="4GB").beside(250 << 20, 150 << 20)
    assert SplitMoments.fit_bytes(layer(512)) < given.fit_bytes < SplitMoments.fit_bytes(layer(1024))


@pytest.mark.parametrize("door", ["onnx", "torch"])
def test_runs_with_little_memory(door: str):
    if door == "torch":
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        nn = torch.nn
        convs = nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU()
        model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        images = torch.randn(30, 3, 16, 16)
    else:
        model = networks.residual()
        images = images_for(model, 30)
    made = netdecouple.decouple(model, images, macs=0.7, settings=SETTINGS, resources=Resources(memory="1GB"))
    report = made.report if door == "onnx" else made.decoupling.report
    assert report.agreement.divergence < 0.3
