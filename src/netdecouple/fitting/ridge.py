"""How far to pull a fit towards the original weight, decided on samples it has not seen."""

from __future__ import annotations

from collections.abc import Callable

from netdecouple.convolution import Factorization
from netdecouple.families import Problem
from netdecouple.moments import Moments

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
START = 3
EXACT = 1e-12  # of the variance: a smaller error is rounding, and no other ridge can be better
WORTH = 0.99  # a step must bring the error below this share, or it follows noise


def held_back_error(problem: Problem, held_back: Moments, factorization: Factorization) -> float:
    """Mean squared error per sample, over all outputs, on moments the fit has not seen."""
    g, stages = problem.geometry, factorization.stages
    assert factorization.bias is not None
    bias = factorization.bias.reshape(g.groups, -1)
    if g.is_pointwise and g.groups == 1 and len(stages) == 2:  # far less work through the narrow middle
        narrow, wide = stages[0].dense(g.n_i), stages[1].dense(stages[0].geometry.n_o)
        return held_back.mapped(narrow[None, :, :, 0, 0]).mean_squared_error(wide[None, :, :, 0, 0], bias)
    return held_back.mean_squared_error(factorization.dense().reshape(problem.weight.shape), bias)


def best_ridge(
    problem: Problem, held_back: Moments, fit: Callable[[Problem], Factorization]
) -> tuple[float, Problem]:
    """Walk down the grid of ridges from its middle until the held-back error rises again.

    The problem with that ridge comes back too, with what fitting it has already worked out.
    """

    def tried(i: int) -> tuple[float, Problem]:
        regular = problem.regularized(RIDGES[i])
        return held_back_error(problem, held_back, fit(regular)), regular

    at, (least, best) = START, tried(START)
    for step in (1, -1):
        while 0 <= at + step < len(RIDGES):
            error, regular = tried(at + step)
            if not error < WORTH * least or least <= EXACT * held_back.variance:
                break
            at, least, best = at + step, error, regular
        if at != START:
            break
    return RIDGES[at], best
