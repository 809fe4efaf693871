"""Candidates: predicted errors are those of real fits on held-back samples."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry
from netdecouple.families import Problem, decoupling
from netdecouple.families.ridge import held_back_error
from netdecouple.moments import Moments
from netdecouple.planning.candidates import candidates, data_free_candidates, term_levels
from tests.strategies import kernel

G = ConvGeometry(24, 16, 3, 3)


def two_sides(count: int) -> tuple[Problem, Moments]:
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((144, 144)) * np.geomspace(1, 0.05, 144)
    x = (rng.standard_normal((2, count, 144)) @ mix)[:, :, None]
    weight = kernel(G, 0)
    y = x @ weight.reshape(24, -1).T
    return Problem.of(G, weight, Moments.of(x[0], y[0])), Moments.of(x[1], y[1])


@pytest.mark.parametrize("uniform", [False, True])
def test_predicted_errors_are_close_to_those_of_full_fits(uniform: bool) -> None:
    problem, held = two_sides(4000)
    found = candidates("c", problem, held, uniform, probes=3)
    assert list(found.terms) == sorted(found.terms, reverse=True)
    assert list(found.errors) == sorted(found.errors)
    regular = problem.regularized(1e-2)
    terms = decoupling.spectrum(regular)
    for count, predicted in list(zip(found.terms, found.errors, strict=True))[::4]:
        ranks = terms.common_ranks(count // 16) if uniform else terms.pooled_ranks(count)
        real = held_back_error(problem, held, decoupling.fit(regular, ranks)) / held.variance
        assert predicted == pytest.approx(real, rel=0.4, abs=2e-3)


def test_few_samples_are_judged_on_inputs_that_were_not_fitted() -> None:
    """200 samples for 144 unknowns: what the fit shows on its own samples is far too good."""
    problem, held = two_sides(200)
    found = candidates("c", problem, held, False, probes=3)
    for probe in found.probes:
        weight = probe.weight.reshape(1, 24, -1).astype(float)
        own = problem.moments.error(weight, probe.bias[None]) / problem.moments.variance
        assert probe.error > 1.05 * own


def test_levels_cost_less_than_the_layer_and_uniform_ones_are_whole_ranks() -> None:
    for g in (G, ConvGeometry(512, 512, 3, 3), ConvGeometry(8, 6, 5, 1, groups=2), ConvGeometry(4, 4, 1, 3)):
        for uniform in (False, True):
            levels = term_levels(g, uniform)
            assert all(t * decoupling.macs_per_term(g) < np.prod(g.weight_shape) for t in levels)
            if uniform:
                assert all(t % (g.n_i // g.groups) == 0 for t in levels)
    assert len(term_levels(ConvGeometry(512, 512, 3, 3), False)) > 20


def test_data_free_errors_are_shares_of_the_weights_energy() -> None:
    found = data_free_candidates("c", Problem.data_free(G, kernel(G, 0), np.zeros(24)), uniform=True)
    energy = [np.linalg.svd(kernel(G, 0)[:, i].reshape(24, 9), compute_uv=False) ** 2 for i in range(16)]
    for count, error in zip(found.terms, found.errors, strict=True):
        rank = count // 16
        expected = sum(e[rank:].sum() for e in energy) / sum(e.sum() for e in energy)
        assert error == pytest.approx(expected, abs=1e-9)
