"""CP: the family tests, and which channels go."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry
from netdecouple.families import Problem
from netdecouple.families.cp import ChannelPruning
from netdecouple.moments import Moments
from tests.families.base import OneFamilyTests, aware_problem
from tests.strategies import kernel


class TestChannelPruning(OneFamilyTests):
    family = ChannelPruning()


def test_it_keeps_what_the_others_cannot_replace() -> None:
    """A channel that is a copy of another goes first, one that weighs nothing goes with it."""
    g = ConvGeometry(8, 5, 3, 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 5, 9))
    x[:, 3] = x[:, 0]
    weight = kernel(g, 0)
    weight[:, 4] = 0
    y = np.einsum("ncd,ocd->no", x, weight.reshape(8, 5, 9))
    problem = Problem.of(g, weight, Moments.of(x.reshape(500, 1, 45), y[:, None])).regularized(1e-9)
    fitted = ChannelPruning().fit(problem, 3)
    kept = set(fitted.stages[0].channels)
    assert 4 not in kept
    assert kept & {0, 3}
    assert kept >= {1, 2}
    assert problem.relative_error(fitted) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_greedy_elimination_comes_close_to_trying_every_choice(seed: int) -> None:
    g = ConvGeometry(6, 6, 3, 3)
    problem = aware_problem(g, seed)
    family = ChannelPruning()
    best = min(problem.squared_error(family.fit(problem, 3, np.array(c))) for c in combinations(range(6), 3))
    assert problem.squared_error(family.fit(problem, 3)) <= 1.1 * best


def test_the_rest_is_refitted() -> None:
    """Least squares on the kept channels, not the kernel with holes."""
    g = ConvGeometry(6, 6, 3, 3)
    problem = aware_problem(g, 0)
    fitted = ChannelPruning().fit(problem, 4)
    holes = np.zeros(g.weight_shape)
    holes[:, fitted.stages[0].channels] = kernel(g, 0)[:, fitted.stages[0].channels]
    cut = holes.reshape(problem.weight.shape)
    assert (
        problem.squared_error(fitted)
        < 0.9 * problem.moments.mean_squared_error(cut, problem.moments.bias(cut)) * problem.moments.count
    )


def test_every_group_keeps_as_many() -> None:
    g = ConvGeometry(6, 8, 3, 3, groups=2)
    kept = ChannelPruning().fit(aware_problem(g, 0), 3).stages[0].channels
    assert [np.count_nonzero(kept < 4), np.count_nonzero(kept >= 4)] == [3, 3]
