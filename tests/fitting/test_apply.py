"""Applying a plan: its cost is linear in depth, and each layer corrects the errors of those before it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from netdecouple import Settings
from netdecouple.convolution import ConvGeometry, spread
from netdecouple.errors import ModelError
from netdecouple.families import Problem
from netdecouple.families.chain import method
from netdecouple.fitting.apply import Applied, apply, difference
from netdecouple.fitting.sampling import Inputs, SplitMoments, sample_positions
from netdecouple.fitting.sequential import Targets
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.analysis import analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.divergence import divergence
from netdecouple.planning.planner import make_plan
from tests import networks
from tests.networks import images_for
from tests.test_api import DEMO, MODEL


@pytest.fixture(scope="module")
def pieces() -> tuple:
    images = np.load(DEMO / "digits.npz")["calib"][:60].transpose(0, 3, 1, 2).astype(np.float32) / 255
    network = OnnxNetwork(read_model(MODEL), images)
    inputs = Inputs.split(images, 0)
    analysis = analyze(network, inputs, Settings(families=("nd", "cd")))
    return network, inputs, make_plan(analysis, [Budget(Macs(), 0.25)])


@pytest.fixture(scope="module")
def applied(pieces: tuple) -> Applied:
    return apply(*pieces)


@pytest.fixture(scope="module")
def with_targets(pieces: tuple) -> tuple[Applied, list[str]]:
    """The same with targets that were recorded before, and the nodes that were run for it."""
    network, inputs, plan = pieces
    targets = Targets(network, inputs, [plan])
    nodes: list[str] = []
    open_session = onnxruntime.InferenceSession

    def record(model: bytes, *others: Any, **options: Any) -> Any:
        nodes.extend(node.output[0] for node in onnx.load_from_string(model).graph.node)
        return open_session(model, *others, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnxruntime, "InferenceSession", record)
        return apply(network, inputs, plan, targets=targets), nodes


def test_every_node_of_the_network_runs_once_per_batch(with_targets: tuple[Applied, list[str]]) -> None:
    """Whatever the depth, applying costs one forward pass, not one per layer (DESIGN §4)."""
    applied, nodes = with_targets
    assert len(applied.factorizations) == 5
    assert 5 < len(nodes) == len(set(nodes))


def test_targets_that_were_recorded_before_change_nothing(
    applied: Applied, with_targets: tuple[Applied, list[str]]
) -> None:
    other, _ = with_targets
    assert applied.plan == other.plan
    assert applied.errors == other.errors


def test_the_target_of_a_residual_branch_includes_the_error_of_its_shortcut() -> None:
    """t = (y + s) - s'; without a shortcut, t = y."""
    model = networks.residual()
    images = images_for(model, 12)
    network, inputs = OnnxNetwork(read_model(model), images), Inputs.split(images, 0)
    plan = make_plan(analyze(network, inputs, Settings(families=("nd",))), [Budget(Macs(), 0.5)])
    targets = Targets(network, inputs, [plan])
    changed = [row.name for row in plan.layers if row.changed]
    original = {o.layer: o for o in network.observe(inputs.images, targets.positions)}
    with_shortcut = [name for name in changed if original[name].shortcut is not None]
    assert 0 < len(with_shortcut) < len(changed)
    for name in changed:
        y, s = original[name].outputs, original[name].shortcut
        observed = replace(original[name], shortcut=None if s is None else 2 * s)
        expected = y if s is None else y + s - 2 * s
        np.testing.assert_allclose(targets.of(observed), expected, atol=1e-6)


def test_later_layers_make_up_for_earlier_ones(pieces: tuple, applied: Applied) -> None:
    """Fitting on what the decoupled network feeds a layer beats fitting each layer on its own."""
    network, inputs, _ = pieces
    layers = {layer.name: layer for layer in network.layers}
    positions = {name: sample_positions(layers[name], 100, 0) for name in applied.factorizations}
    moments = {name: SplitMoments(layers[name], inputs) for name in positions}
    for seen in network.observe(inputs.images, positions):
        moments[seen.layer].add(seen.images, seen.patches, seen.outputs)
    alone = {}
    for row in applied.plan.layers:
        if row.changed:
            layer = layers[row.name]
            problem = Problem.of(layer.geometry, layer.weight, moments[row.name].both.fitted)
            alone[row.name], _ = method(row.family).fit(problem.regularized(row.ridge), row.steps)
    original = network.run(inputs.held_out)
    together, separately = (
        network.run_built(network.build(f), inputs.held_out) for f in (applied.factorizations, alone)
    )
    assert divergence(original, together, "kl") < 0.8 * divergence(original, separately, "kl")


def test_measured_errors_are_those_of_layers_fitted_at_all(applied: Applied) -> None:
    assert set(applied.errors) == set(applied.factorizations)
    assert all(0 < e < 1 for e in applied.errors.values())
    assert all(row.channels and row.ridge for row in applied.plan.layers if row.changed)
    assert all(len(row.channels) == len(row.sizes) for row in applied.plan.layers if row.changed)


def test_ranked_outputs_may_change_places_but_not_be_wrong() -> None:
    """A list of the best of 80 scores, with the index of each; scores come in pairs of almost equal ones.

    The scores of a pair differ by 2e-6, more than any processor rounds float64 and less than the noise that
    `difference` compares with. Exchanging the scores of some pairs is thus a difference that noise explains.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((80, 16, 1, 1))
    weight[1::2] = weight[::2] * (1 + 2e-6)
    kernels = spread(ConvGeometry(80, 16, 1, 1), weight, np.ones(80))
    images = rng.standard_normal((8, 16))

    def run(images: np.ndarray, kernels: dict[str, Any]) -> list[np.ndarray]:
        rows = np.float64(kernels["head"][0][:, :, 0, 0])
        scores = (images[:, None] * rows).sum(axis=2)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :60]
        return [np.stack([np.take_along_axis(scores, best, 1), best], axis=2)]

    network: Any = SimpleNamespace(run=run)
    applied = Applied(plan=SimpleNamespace(), factorizations={"head": kernels})  # type: ignore[arg-type]
    (own,) = applied.kernels.values()
    exchanged = own[0].copy()
    exchanged[:40] = own[0][:40].reshape(20, 2, -1)[:, ::-1].reshape(40, 16, 1, 1)
    swapped = run(images, {"head": (exchanged, own[1])})
    assert difference(network, applied, images, swapped, 1e-3) > 1e-3
    wrong = run(images, {"head": (np.roll(own[0], 1, axis=1), own[1])})
    with pytest.raises(ModelError, match="differ from those of its own plan"):
        difference(network, applied, images, wrong, 1e-3)
