"""The ridge is chosen on samples that the fit has not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method
from netdecouple.fitting.ridge import RIDGES, START, best_ridge, held_out_error
from netdecouple.moments import Moments
from tests.strategies import kernel

G = ConvGeometry(6, 4, 3, 3)
D = 36  # unknowns per output


def dense(problem: Problem) -> Factorization:
    """The best dense kernel: the regularised target itself."""
    weight = problem.target.reshape(problem.geometry.weight_shape)
    bias = problem.moments.bias(problem.target).ravel()
    return Factorization(problem.geometry, (ConvStage(problem.geometry, weight),), bias)


def posed(count: int, noise: float, drift: float, seed: int = 0) -> tuple[Problem, Moments]:
    """Noisy targets of a kernel ``drift`` away from the layer's, and held-out moments of them."""
    rng = np.random.default_rng(seed)
    weight = kernel(G, seed)
    true = weight.reshape(6, D) + drift * rng.standard_normal((6, D))

    def moments(n: int) -> Moments:
        x = rng.standard_normal((n, 1, D))
        return Moments.of(x, x @ true.T + noise * rng.standard_normal((n, 1, 6)))

    return Problem.of(G, weight, moments(count)), moments(4000)


def test_few_noisy_samples_are_trusted_little_and_many_clean_ones_much() -> None:
    weak, strong = posed(40, 3.0, 0.01), posed(4000, 0.0, 1.0)
    assert best_ridge(*weak, dense)[0] == RIDGES[-1]
    assert best_ridge(*strong, dense)[0] == RIDGES[0]


@pytest.mark.parametrize(
    ("count", "noise", "drift"), [(60, 1.0, 0.2), (300, 1.0, 0.2), (40, 3.0, 0.01), (4000, 0.1, 1.0)]
)
def test_the_walk_ends_where_no_neighbour_is_worth_a_step(count: int, noise: float, drift: float) -> None:
    problem, held_out = posed(count, noise, drift)
    errors = [held_out_error(problem, held_out, dense(problem.regularized(r))) for r in RIDGES]
    ridge, regular = best_ridge(problem, held_out, dense)
    at = RIDGES.index(ridge)
    assert errors[at] <= errors[START]
    away = at + 1 if at > START else at - 1 if at < START else None
    for i in (at - 1, at + 1) if away is None else (away,):
        assert not 0 <= i < len(RIDGES) or errors[i] >= 0.99 * errors[at]
    np.testing.assert_array_equal(regular.moments.gram, problem.regularized(ridge).moments.gram)


def test_what_fitting_has_worked_out_comes_back_and_nothing_is_fitted_twice() -> None:
    problem, held_out = posed(300, 1.0, 0.2)
    seen: list[Problem] = []

    def fit(regular: Problem) -> Factorization:
        seen.append(regular)
        return dense(regular)

    _, best = best_ridge(problem, held_out, fit)
    assert any(best is regular for regular in seen)
    strengths = [round(float(np.trace(p.moments.gram[0])), 6) for p in seen]
    assert len(set(strengths)) == len(strengths)


def test_a_step_that_changes_nothing_is_not_taken() -> None:
    """Where the layer does already what is asked for, every ridge is as good, and the middle one stays."""
    problem, held_out = posed(300, 0.0, 0.0)
    assert best_ridge(problem, held_out, dense)[0] == RIDGES[START]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["cd", "nd-dp"])
def test_the_held_out_error_is_the_mean_squared_residual(name: str, k: int, groups: int) -> None:
    """By the short way through a narrow middle, too."""
    g = ConvGeometry(6, 4, k, k, groups=groups)
    d, m = g.n_i // groups * k * k, g.n_o // groups
    rng = np.random.default_rng(k)
    weight = kernel(g, 1)
    x = rng.standard_normal((90, groups, d)) + 0.3
    y = (
        np.einsum("ngd,gmd->ngm", x, weight.reshape(groups, m, d))
        + 0.1 * rng.standard_normal((90, groups, m))
        + 1
    )
    problem = Problem.of(g, weight, Moments.of(x[:60], y[:60]))
    fitted, _ = method(name).fit(problem, [Step(1)])
    shifted = replace(fitted, bias=fitted.bias + 0.5)
    for factorization in (fitted, shifted):
        made = np.einsum("ngd,gmd->ngm", x[60:], factorization.dense().reshape(groups, m, d))
        residual = y[60:] - made - factorization.bias.reshape(groups, m)
        error = held_out_error(problem, Moments.of(x[60:], y[60:]), factorization)
        assert error == pytest.approx(np.square(residual).sum((1, 2)).mean())
