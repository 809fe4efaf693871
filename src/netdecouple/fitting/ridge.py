"""How far a fit is pulled towards the original weight, chosen by the error on held-out inputs."""

from __future__ import annotations

from collections.abc import Callable

from netdecouple.convolution import Factorization
from netdecouple.families import Problem
from netdecouple.moments import Moments

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
START = 3  # index of the first ridge tried
EXACT = 1e-12  # of the variance: a smaller error is rounding, and no other ridge can be better
STEP = 0.99  # a step along the grid must reduce the error to this share; smaller gains are noise


def held_out_error(problem: Problem, held_out: Moments, factorization: Factorization) -> float:
    """Return the mean squared error per sample, summed over outputs, on moments that were not fitted to."""
    g, stages = problem.geometry, factorization.stages
    assert factorization.bias is not None
    bias = factorization.bias.reshape(g.groups, -1)
    if g.is_pointwise and g.groups == 1 and len(stages) == 2:  # far cheaper between the stages
        inner, outer = stages[0].dense(g.n_i), stages[1].dense(stages[0].geometry.n_o)
        return held_out.mapped(inner[None, :, :, 0, 0]).mean_squared_error(outer[None, :, :, 0, 0], bias)
    return held_out.mean_squared_error(factorization.dense().reshape(problem.weight.shape), bias)


def best_ridge(
    problem: Problem, held_out: Moments, fit: Callable[[Problem], Factorization]
) -> tuple[float, Problem]:
    """Search the grid of ridges from its middle, in one direction, until the held-out error rises.

    Returns:
        The ridge, and the problem regularised with it, which caches what fitting it has computed.
    """

    def evaluate(i: int) -> tuple[float, Problem]:
        regularized = problem.regularized(RIDGES[i])
        return held_out_error(problem, held_out, fit(regularized)), regularized

    best, (least, best_problem) = START, evaluate(START)
    for step in (1, -1):
        while 0 <= best + step < len(RIDGES):
            error, regularized = evaluate(best + step)
            if not error < STEP * least or least <= EXACT * held_out.variance:
                break
            best, least, best_problem = best + step, error, regularized
        if best != START:
            break
    return RIDGES[best], best_problem
