"""The order of steps, where it decides what comes out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest

import netdecouple
from netdecouple import Settings, search
from netdecouple.fitting.apply import apply
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning import planner
from netdecouple.planning.analysis import Objective, analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.divergence import divergence
from netdecouple.planning.planner import make_plan
from tests import networks


def chain(*widths: int) -> onnx.ModelProto:
    """Convolutions in a row, wide and narrow ones, whose output is an image."""
    b = networks.Builder()
    x, widths = "image", widths or (3, 24, 12, 32, 3)
    for index, (n_i, n_o) in enumerate(pairwise(widths)):
        x = b.node("Relu", b.conv(x, n_i, n_o, 3, f"conv{index}"))
    return b.model([(x, ("N", 3, 8, 8))])


OBJECTIVES = (Objective(), Objective(exponent=0.5), Objective(depth=2.0))


@pytest.mark.parametrize("objectives", [OBJECTIVES, OBJECTIVES[::-1]])
def test_of_several_plans_the_one_that_measures_best_is_kept(
    objectives: tuple[Objective, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the whole network does in a trial, which is the prediction, not by their order."""
    settings = Settings(families=("nd",))
    model = chain()
    images = networks.images_for(model, 120)
    network, inputs = OnnxNetwork(read_model(model), images), Inputs.split(images, 0)
    inputs = inputs.with_scales(network, 0)
    analysis = analyze(network, inputs, settings)
    original, measured = network.run(inputs.held_out), {}
    for objective in objectives:
        plan = make_plan(analysis.with_objective(objective), [Budget(Macs(), 0.6)])
        trial = apply(network, inputs.part(search.TRIAL, search.LEAST[analysis.loss]), plan, is_trial=True)
        outputs = network.run(inputs.held_out, trial.kernels)
        measured[tuple(row.sizes for row in plan.layers)] = divergence(original, outputs, analysis.loss)
    assert len(measured) == 3
    monkeypatch.setitem(search.EFFORTS, "normal", search.Effort(objectives, last=2))
    result = netdecouple.decouple(model, images, macs=0.6, settings=settings)
    best = min(measured, key=measured.__getitem__)
    assert tuple(row.sizes for row in result.plan.layers) == best
    assert result.report.agreement is not None
    np.testing.assert_allclose(result.report.agreement.predicted, measured[best], rtol=1e-4)
    assert result.report.agreement.divergence == pytest.approx(measured[best], rel=0.5)


def test_a_few_unusual_inputs_do_not_decide_the_fit() -> None:
    """Squared errors of inputs with a thousand times the signal would be all that a fit sees."""
    model = chain()
    usual = networks.images_for(model, 60)
    unusual = usual.copy()
    unusual[:3] *= 1000
    network = OnnxNetwork(read_model(model), usual)
    fresh = networks.images_for(model, 200, seed=1)
    original = network.run(fresh)
    errors = []
    for images in (usual, unusual):
        result = netdecouple.decouple(model, images, macs=0.5, settings=Settings(families=("nd",)))
        errors.append(divergence(original, network.run_built(result.model, fresh), "relative"))
    assert errors[1] < 1.5 * errors[0]


def pruned(macs: float) -> float:
    """The MACs that are left, relative to what was asked for, where layers may only read fewer channels."""
    model = chain(3, 24, 24, 24, 24, 3)
    images, settings = networks.images_for(model, 60), Settings(families=("cp",))
    report = netdecouple.decouple(model, images, macs=macs, settings=settings).report
    assert report.budget == f"{100 * macs:.4g}% MACs"
    return report.macs / report.macs_before / macs


def test_a_budget_counts_the_filters_that_nothing_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a plan that does not count them, far less than what was asked for would be left."""
    assert 0.9 < pruned(0.7) <= 1
    with monkeypatch.context() as changed:
        changed.setattr(planner, "TRIES", 0)
        assert pruned(0.7) < 0.8
    # where a fit reads other channels than were planned for, the budget holds all the same
    shares = iter([0.5])
    monkeypatch.setattr(planner, "used", lambda *costs: next(shares, 1.0))
    assert pruned(0.7) < 0.8
