"""Whole runs with little memory: the same results, or a clear refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import netdecouple
from netdecouple import Resources, Settings
from netdecouple.errors import BudgetError
from netdecouple.execution.memory import Memory
from netdecouple.execution.run import Run
from netdecouple.fitting.apply import Applied, apply
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.analysis import analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.planner import make_plan
from tests import networks
from tests.networks import images_for

SETTINGS = Settings(families=("nd",))


def test_memory_that_the_model_alone_takes_is_an_error():
    message = r"memory=1GB is too little: the model and its inputs take 6\.9 GB"
    with pytest.raises(BudgetError, match=message), Resources(memory="1GB").opened(1 << 30, 1 << 20):
        pass
    with pytest.raises(BudgetError, match="too little"):
        netdecouple.decouple(
            networks.classifier(),
            images_for(networks.classifier(), 20),
            macs=0.6,
            resources=Resources(memory=10**8),
        )


class Watched(OnnxNetwork):
    """A network that counts the layers in each pass through it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.passes: list[int] = []

    def observe(self, images: Any, positions: Any, **options: bool) -> Any:
        self.passes.append(len(positions))
        return super().observe(images, positions, **options)


def decoupled(model: Any, images: np.ndarray, macs: float, memory: Memory) -> tuple[Watched, Applied]:
    """Plan and apply, with the network, its passes counted."""
    network = Watched(read_model(model), images, memory)
    inputs, run = Inputs.split(images, 0), Run(memory=memory)
    plan = make_plan(analyze(network, inputs, SETTINGS, run=run), [Budget(Macs(), macs)])
    return network, apply(network, inputs, plan, run=run)


def test_smaller_groups_find_the_same():
    """Layers are observed a few at a time; losses and networks are those of one pass."""
    model = networks.residual()
    images = images_for(model, 30)
    network, one = decoupled(model, images, 0.6, Memory())
    assert len(network.passes) == 2
    network, other = decoupled(model, images, 0.6, Memory(moment_bytes=200_000, row_bytes=1 << 30))
    assert len(network.passes) > 3
    same = [replace(row, predicted_loss=0, predicted_error=0, ridge=0) for row in one.plan.layers]
    assert [replace(r, predicted_loss=0, predicted_error=0, ridge=0) for r in other.plan.layers] == same
    for a, b in zip(one.plan.layers, other.plan.layers, strict=True):
        assert a.predicted_loss == pytest.approx(b.predicted_loss, rel=1e-3)


def test_layers_too_wide_are_fitted_from_their_weights():
    """Their loss is that in the network; the others are fitted to the inputs as ever."""
    model = networks.classifier()
    images = images_for(model, 40)
    wide = 8.5 * 8 * 144 * 160  # conv3 and conv2: 16 → 16 and 12 → 16 channels
    network, applied = decoupled(model, images, 0.5, Memory(fit_bytes=wide - 1))
    assert "conv3" not in applied.samples
    changed = {row.name: row for row in applied.plan.layers if row.changed}
    assert changed["conv3"].ridge == 0
    assert changed["conv2"].ridge > 0
    assert changed["conv3"].predicted_loss > 0
    assert network.passes[0] == 2  # without conv3
    assert {name for name, row in changed.items() if row.data_free} == {"conv3"}
    again = apply(network, Inputs.split(images, 0), applied.plan)  # the plan says it, with any memory
    for name, factorization in applied.factorizations.items():
        for one, other in zip(factorization.stages, again.factorizations[name].stages, strict=True):
            np.testing.assert_array_equal(one.weight, other.weight)


@pytest.mark.parametrize("framework", ["onnx", "torch"])
def test_runs_with_little_memory(framework: str):
    if framework == "torch":
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
    report = made.report if framework == "onnx" else made.decoupling.report
    assert report.agreement.divergence < 0.3
