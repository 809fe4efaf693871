"""Equal channels and terms are taken in the order of their indices, whatever a processor rounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry
from netdecouple.families import Problem
from netdecouple.families.chain import Step, Trial, method, pareto
from netdecouple.families.linalg import comparable
from netdecouple.moments import Moments

G = ConvGeometry(6, 8, 3, 3)
NOISE = 1 + 1e-15 * np.random.default_rng(1).standard_normal(100)  # as another processor's rounding


def test_numbers_that_differ_by_rounding_become_equal() -> None:
    """Relative to the largest of a row; numbers that differ by more stay apart."""
    values = np.array([[3.0, 1.0, 1.0, 0.0], [1.0, 2.0, 1 + 1e-11, 1e-300]])
    found = comparable(values)
    np.testing.assert_array_equal(comparable(values * NOISE[:4]), found)
    assert found[0, 1] == found[0, 2]
    assert found[1, 0] < found[1, 2]
    assert comparable(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("data_free", [True, False])
@pytest.mark.parametrize(("name", "size"), [("cp", 5), ("nd-dp", 31)])
def test_equal_channels_go_by_index(name: str, size: int, data_free: bool) -> None:
    """Every channel stands there twice. Noise as of rounding does not change which are read."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4, 3, 3)).repeat(2, axis=1)
    x = (rng.standard_normal((200, 36)) @ (rng.standard_normal((36, 36)) + 3 * np.eye(36))).reshape(200, 4, 9)
    x = x.repeat(2, axis=1)
    chosen = []
    for noise in (np.ones(8), NOISE[:8], NOISE[8:16]):
        own, seen = weight * noise[:, None, None], (x * noise[:, None]).reshape(200, 1, 72)
        y = seen @ own.reshape(6, 72).T
        problem = (
            Problem.data_free(G, own, np.zeros(6))
            if data_free
            else Problem.of(G, own, Moments.of(seen, y)).regularized(1e-3)
        )
        _, steps = method(name).fit(problem, (Step(size),))
        chosen.append(steps[0].channels.tolist())
    assert chosen[0] == chosen[1] == chosen[2]


def test_trials_that_lose_the_same_but_for_rounding_are_one() -> None:
    """The first of them is kept, and no other costs more for nothing."""
    one = Trial(steps=(Step(3),), stages=(), macs=100, squared_error=1.0)
    trials = [replace(one, steps=(Step(n),), squared_error=float(e)) for n, e in enumerate(NOISE[:5])]
    trials += [replace(one, macs=200, squared_error=1 - 1e-15), replace(one, macs=300, squared_error=0.5)]
    assert pareto(trials) == [trials[-1], trials[0]]
    assert pareto([]) == []
