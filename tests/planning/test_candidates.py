"""Candidates: predicted errors are those of real fits on held-out samples."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.errors import BudgetError
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method, methods
from netdecouple.fitting.ridge import RIDGES, held_out_error
from netdecouple.moments import Moments
from netdecouple.network import Layer
from netdecouple.planning.candidates import (
    HOPELESS,
    LayerCandidates,
    Rule,
    candidates,
    parse_families,
)
from tests.families.base import aware_problem
from tests.planning.layers import conv, linear
from tests.strategies import kernel

LAYER = conv("c", 16, 24, 10)
G = LAYER.geometry
assert G is not None


def two_sides(count: int) -> tuple[Problem, Moments]:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((144, 144)) * np.geomspace(1, 0.05, 144)
    x = (rng.standard_normal((2, count, 144)) @ mix)[:, :, None]
    weight = kernel(G, 0)
    y = x @ weight.reshape(24, -1).T
    return Problem.of(G, weight, Moments.of(x[0], y[0])), Moments.of(x[1], y[1])


def data_free(
    layer: Layer, names: tuple[str, ...], uniform: bool, rule: Rule | None = None
) -> LayerCandidates:
    g = layer.geometry
    assert g is not None
    problem = Problem.data_free(g, kernel(g, 0), np.zeros(g.n_o))
    return candidates(layer, problem, None, names, uniform, 3, rule)


@pytest.mark.parametrize(
    ("names", "uniform"),
    [(("all",), False), (("nd-dp",), True), (("nd-dp",), False), (("cd", "sd", "cp"), False)],
)
def test_predicted_errors_are_close_to_those_of_full_fits(names: tuple[str, ...], uniform: bool) -> None:
    """Within 40 %; no margin is in them."""
    problem, held = two_sides(4000)
    found = candidates(LAYER, problem, held, methods(names), uniform, 3).candidates
    regular = problem.regularized(1e-2)
    for candidate in found[::3]:
        fitted, _ = method(candidate.method, uniform).fit(regular, candidate.steps)
        real = held_out_error(problem, held, fitted) / held.variance
        assert real / 1.4 - 2e-3 <= candidate.relative_error <= 1.4 * real + 2e-3, candidate


@pytest.mark.parametrize("names", [("all",), ("nd-dp",), ("cd", "sd")])
def test_candidates_go_from_much_to_little_per_method(names: tuple[str, ...]) -> None:
    """No candidate of a method costs less and loses less than another one of it."""
    problem, held = two_sides(4000)
    found = candidates(LAYER, problem, held, methods(names), False, 3).candidates
    for name in {c.method for c in found}:
        own = [c for c in found if c.method == name]
        macs = [c.structure.macs(*LAYER.size) for c in own]
        assert macs == sorted(set(macs), reverse=True)
        assert [c.relative_error for c in own] == sorted(c.relative_error for c in own)


def test_what_is_hopeless_is_not_among_them() -> None:
    """Every candidate is near the least error to be had at its MACs, and costs less than the layer."""
    problem, held = two_sides(4000)
    found = candidates(LAYER, problem, held, methods(["all"]), False, 3).candidates
    assert len({c.method for c in found}) > 3
    for candidate in found:
        macs = candidate.structure.macs(*LAYER.size)
        assert macs < LAYER.macs
        least = min(c.relative_error for c in found if c.structure.macs(*LAYER.size) <= macs)
        assert candidate.relative_error <= 2 * HOPELESS * least  # what fitting showed came later


def test_few_samples_are_judged_on_inputs_that_were_not_fitted() -> None:
    """200 samples for 144 unknowns: what the fit shows on its own samples is far too good."""
    problem, held = two_sides(200)
    found = candidates(LAYER, problem, held, ("nd-dp",), False, probes=3)
    for probe in found.probes:
        weight = probe.weight.reshape(1, 24, -1).astype(float)
        own = problem.moments.mean_squared_error(weight, probe.bias[None]) / problem.moments.variance
        assert probe.relative_error > 1.05 * own


def test_uniform_sizes_are_whole_ranks() -> None:
    for layer in (LAYER, conv("g", 8, 6, 8, k=5, groups=2), conv("n", 4, 4, 8)):
        assert layer.geometry is not None
        per_rank = layer.geometry.weight_shape[1]
        assert all(c.sizes[0] % per_rank == 0 for c in data_free(layer, ("nd-dp",), True).candidates)
    assert len(data_free(LAYER, ("nd-dp",), False).candidates) > 20


def test_a_layer_that_nothing_makes_cheaper_has_no_candidates() -> None:
    """64 → 1: one rank for all channels costs more than the layer."""
    assert data_free(conv("last", 64, 1, 8), ("nd-dp",), True).candidates == ()


@pytest.mark.parametrize("names", [("nd-dp",), methods(["all"])])
@pytest.mark.parametrize("layer", [conv("last", 64, 1, 8), conv("p", 16, 8, 8, k=1)])
def test_one_rank_for_all_channels_may_be_too_much(layer: Layer, names: tuple[str, ...]) -> None:
    """Fitted to data too, where a ridge has to be chosen first."""
    problem = aware_problem(layer.geometry, 0)
    found = candidates(layer, problem, problem.moments, names, True, 3)
    assert "nd-dp" not in {c.method for c in found.candidates}


@pytest.mark.parametrize("large", [143, 144])
def test_a_wide_layer_keeps_the_ridge_of_its_candidates(large: int) -> None:
    problem = aware_problem(LAYER.geometry, 0)
    found = candidates(LAYER, problem, problem.moments, ("nd-dp",), False, 1, large=large)
    assert LAYER.geometry.unknowns == 144
    assert found.ridge in (RIDGES if large < 144 else (0.0,))


def test_pointwise_layers_are_for_low_rank_and_pruning() -> None:
    found = data_free(conv("p", 16, 24, 8, k=1), methods(["all"]), False).candidates
    assert {c.method for c in found} == {"cd", "cp"}


FC = linear("fc", 40, 30)


@pytest.mark.parametrize("names", [("all",), ("nd", "cd")])
def test_fully_connected_layers_are_for_plain_low_rank(names: tuple[str, ...]) -> None:
    """Each is cheaper than the layer, and as good as the eigenvalues say."""
    found = data_free(FC, methods(names), False).candidates
    assert {c.method for c in found} == {"cd"}
    values = np.linalg.svd(kernel(FC.geometry, 0).reshape(30, 40), compute_uv=False) ** 2
    for candidate in found:
        assert candidate.structure.macs(1, 1) < FC.macs
        (rank,) = candidate.sizes
        assert candidate.relative_error == pytest.approx(values[rank:].sum() / values.sum(), abs=1e-9)


def test_fully_connected_layers_are_left_out_by_families_and_rules_that_do_not_suit_them() -> None:
    assert data_free(FC, methods(["nd", "sd", "cp"]), False) == LayerCandidates(layer="fc")
    for rule in ("nd-dp:T=4", "cp:channels=8", "sd:2x", "cd+nd:50%"):
        assert data_free(FC, methods(["all"]), False, Rule.parse(rule)) == LayerCandidates(layer="fc")
    (found,) = data_free(FC, (), False, Rule.parse("cd:rank=5")).candidates
    assert (found.method, found.sizes) == ("cd", (5,))
    assert data_free(FC, (), False, Rule.parse("cd:rank=20")).candidates == ()  # costs more than the layer


def test_a_fully_connected_layer_with_few_samples_comes_out_safe() -> None:
    """Twenty images for 300 inputs: on others hardly worse than what the weights alone would give."""
    layer = linear("fc", 300, 60)
    g = layer.geometry
    assert g is not None
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((300, 300)) * np.geomspace(1, 0.1, 300)
    seen, new = (np.maximum(rng.standard_normal((n, 300)) @ mix, 0)[:, None] for n in (20, 500))
    weight = kernel(g, 0).reshape(60, 300)
    noisy = seen + 0.3 * seen.std() * rng.standard_normal(seen.shape)  # as decoupled layers before it make it
    held = Moments.of(new, new @ weight.T)
    problem = Problem.of(g, weight.reshape(g.weight_shape), Moments.of(noisy, seen @ weight.T))
    found = candidates(layer, problem, held, methods(["all"]), False, 3)
    blind = Problem.data_free(g, weight.reshape(g.weight_shape), np.zeros(60))
    for probe, share in zip(
        sorted(found.probes, key=lambda p: p.relative_error), (0.5, 0.2, 0.07), strict=True
    ):
        rank = round(share * layer.macs / 360)
        truncated = held_out_error(blind, held, method("cd").fit(blind, [Step(rank)])[0]) / held.variance
        assert probe.relative_error < 1.1 * truncated


def test_wide_pointwise_layers_have_candidates_too() -> None:
    """What is too slow for them is left out, not everything."""
    found = data_free(conv("p", 1600, 24, 4, k=1), methods(["all"]), False).candidates
    assert {c.method for c in found} == {"cd"}


def test_data_free_errors_are_shares_of_the_weights_energy() -> None:
    found = data_free(LAYER, ("nd-dp",), True)
    energy = [np.linalg.svd(kernel(G, 0)[:, i].reshape(24, 9), compute_uv=False) ** 2 for i in range(16)]
    for candidate in found.candidates:
        rank = candidate.sizes[0] // 16
        expected = sum(e[rank:].sum() for e in energy) / sum(e.sum() for e in energy)
        assert candidate.relative_error == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("nd-dp:T=4", Rule("nd-dp", "size", 4)),
        ("nd:energy=0.8", Rule("nd-dp", "energy", 0.8)),
        ("cd:rank=32", Rule("cd", "size", 32)),
        ("cp:channels=8", Rule("cp", "size", 8)),
        ("sd:2x", Rule("sd", "share", 0.5)),
        ("cd+nd:40%", Rule("cd+nd-dp", "share", 0.4)),
    ],
)
def test_rules_are_read_as_people_write_them(text: str, rule: Rule) -> None:
    assert Rule.parse(text) == rule


@pytest.mark.parametrize(
    "text",
    [
        "nd",
        "nd:",
        "nd:T=0",
        "nd:T=1.5",
        "nd:T=x",
        "nd:energy=2",
        "nd:size=3",
        "tucker:2x",
        "cd+nd:T=4",
        "sd:0x",
    ],
)
def test_rules_that_make_no_sense_are_refused_in_a_line(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Rule.parse(text)
    assert "\n" not in str(caught.value)


def test_a_rule_of_a_size_gives_that_size() -> None:
    (found,) = data_free(LAYER, (), False, Rule("nd-dp", "size", 2)).candidates
    assert found.sizes == (32,)
    assert list(np.bincount(found.structure.channels[0])) == [2] * 16
    (found,) = data_free(LAYER, (), False, Rule("cd", "size", 7)).candidates
    assert found.sizes == (7,)
    assert data_free(LAYER, (), False, Rule("nd-dp", "size", 9)).candidates == ()  # costs more than the layer


def test_a_rule_of_energy_gives_the_least_size_that_carries_it() -> None:
    values = np.stack([np.linalg.svd(kernel(G, 0)[:, i].reshape(24, 9), compute_uv=False) for i in range(16)])
    shares = (np.cumsum(values**2, axis=1) / (values**2).sum(axis=1, keepdims=True)).mean(axis=0)
    (found,) = data_free(LAYER, (), False, Rule("nd-dp", "energy", 0.5)).candidates
    assert found.sizes == (16 * (np.flatnonzero(shares >= 0.5)[0] + 1),)


@pytest.mark.parametrize("name", ["sd", "cd", "cp", "nd-dp", "nd-pd", "cd+nd-dp", "cd+sd+cp"])
def test_a_rule_of_a_share_comes_close_to_it_from_below(name: str) -> None:
    (found,) = data_free(LAYER, (), False, Rule(name, "share", 0.5)).candidates
    assert found.method == name
    assert 0.3 * LAYER.macs < found.structure.macs(*LAYER.size) <= 0.5 * LAYER.macs


def test_families_are_read_from_a_list() -> None:
    assert parse_families("nd, sd") == methods(["nd", "sd"])
    with pytest.raises(BudgetError, match="tucker"):
        parse_families("nd,tucker")
    with pytest.raises(BudgetError):
        parse_families("")


@pytest.mark.parametrize("aware", [False, True])
def test_a_layer_that_makes_nothing_costs_next_to_nothing(aware: bool) -> None:
    """Where all weights are zero, as in residual branches before training, the least will do."""
    problem, held = two_sides(200)
    zero = np.zeros(G.weight_shape)
    if aware:
        moments, held = (
            m.with_linear_target(np.zeros((1, 24, 144)), np.ones((1, 24))) for m in (problem.moments, held)
        )
        problem = Problem.of(G, zero, moments)
    else:
        problem = Problem.data_free(G, zero, np.ones(24))
    found = candidates(LAYER, problem, held if aware else None, methods(("all",)), False, 3)
    assert found.candidates
    assert found.probes
    least = min(c.structure.macs(*LAYER.size) for c in found.candidates)
    assert least < 0.05 * LAYER.macs
    assert np.isfinite([c.relative_error for c in found.candidates]).all()
    assert max(np.abs(probe.weight).max() for probe in found.probes) < 1e-6
