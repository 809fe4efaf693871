"""How far to pull a fit towards the original weight, decided on samples it has not seen."""

from __future__ import annotations

from collections.abc import Callable

from netdecouple.convolution import Factorization
from netdecouple.families import Problem
from netdecouple.moments import Moments

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
START = 3
WORTH = 0.99  # a step must bring the error below this share, or it follows noise


def held_back_error(problem: Problem, held_back: Moments, factorization: Factorization) -> float:
    """Mean squared error per sample, over all outputs, on moments the fit has not seen."""
    groups = problem.geometry.groups
    weight = factorization.dense().reshape(problem.weight.shape)
    assert factorization.bias is not None
    return held_back.error(weight, factorization.bias.reshape(groups, -1))


def best_ridge(problem: Problem, held_back: Moments, fit: Callable[[Problem], Factorization]) -> float:
    """Walk down the grid of ridges from its middle until the held-back error rises again."""
    errors: dict[int, float] = {}

    def error(i: int) -> float:
        if i not in errors:
            errors[i] = held_back_error(problem, held_back, fit(problem.regularized(RIDGES[i])))
        return errors[i]

    at = START
    for step in (1, -1):
        while 0 <= at + step < len(RIDGES) and error(at + step) < WORTH * error(at):
            at += step
        if at != START:
            break
    return RIDGES[at]
