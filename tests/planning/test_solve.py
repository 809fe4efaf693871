"""The knapsack, held against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdecouple.errors import BudgetError
from netdecouple.planning.solve import Option, choose


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 2), st.floats(0.2, 1))
@settings(max_examples=60, deadline=None)
def test_the_choice_is_the_best_of_all(seed: int, depth: int, budgets: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(depth):
        costs = [tuple(rng.uniform(1, 100, budgets)) for _ in range(4)]
        layers.append(
            [Option(0.0, (100.0,) * budgets), *(Option(float(10 ** rng.uniform(-4, 1)), c) for c in costs)]
        )
    limits = [share * 100 * depth] * budgets
    best = None
    for picks in itertools.product(*layers):
        if all(sum(o.costs[b] for o in picks) <= limits[b] for b in range(budgets)):
            loss = sum(o.loss for o in picks)
            best = loss if best is None else min(best, loss)
    if best is None:
        with pytest.raises(BudgetError):
            choose(layers, limits)
        return
    chosen = [options[i] for options, i in zip(layers, choose(layers, limits), strict=True)]
    for b in range(budgets):
        assert sum(o.costs[b] for o in chosen) <= limits[b] * (1 + 1e-12)
    worst = max(o.loss for options in layers for o in options)
    assert sum(o.loss for o in chosen) <= best + 1e-4 * worst


def test_nothing_is_changed_when_the_budget_allows_everything() -> None:
    layers = [[Option(0.0, (10.0,)), Option(1.0, (1.0,))]] * 3
    assert choose(layers, [30.0]) == [0, 0, 0]
