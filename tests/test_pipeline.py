"""The order of steps, where it decides what comes out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import pytest

import netdecouple
from netdecouple import Settings, pipeline
from netdecouple.fitting.apply import apply
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.analysis import analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.divergence import divergence
from netdecouple.planning.planner import make_plan
from tests import networks


def chain() -> onnx.ModelProto:
    """Convolutions in a row, wide and narrow ones, whose output is an image."""
    b = networks.Builder()
    x, widths = "image", (3, 24, 12, 32, 3)
    for index, (n_i, n_o) in enumerate(pairwise(widths)):
        x = b.node("Relu", b.conv(x, n_i, n_o, 3, f"conv{index}"))
    return b.model([(x, ("N", 3, 8, 8))])


@pytest.mark.parametrize("exponents", [(1.0, 0.5), (0.5, 1.0)])
def test_of_several_plans_the_one_that_measures_best_is_kept(
    exponents: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the whole network does on held-out inputs, not by the order of the plans."""
    settings = Settings(families=("nd",))
    model = chain()
    images = networks.images_for(model, 30)
    network, inputs = OnnxNetwork(read_model(model), images), Inputs.split(images, 0)
    analysis = analyze(network, inputs, settings)
    original, measured = network.run(inputs.held_out), {}
    for exponent in exponents:
        plan = make_plan(analysis.with_exponent(exponent), [Budget(Macs(), 0.6)])
        outputs = network.run(inputs.held_out, apply(network, inputs, plan).kernels)
        measured[plan.layers] = divergence(original, outputs, analysis.loss)
    assert len(measured) == 2
    monkeypatch.setattr(pipeline, "EXPONENTS", exponents)
    result = netdecouple.decouple(model, images, macs=0.6, settings=settings)
    assert result.report.agreement is not None
    np.testing.assert_allclose(result.report.agreement.divergence, min(measured.values()), rtol=1e-4)
    worst = max(measured.values())
    assert result.report.agreement.divergence < 0.99 * worst


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
