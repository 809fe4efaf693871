"""The knapsack, compared with trying everything."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdecouple.errors import BudgetError
from netdecouple.planning.knapsack import Option, choose


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


@pytest.mark.parametrize("seed", [2, 3, 6, 8, 11, 17, 20, 23])
def test_a_limit_is_never_overshot_by_the_solvers_tolerance(seed: int) -> None:
    """A choice that costs half a millionth more than the limit is none; the best of the others is taken."""
    rng = np.random.default_rng(seed)
    layers = [
        [Option(0.0, (100.0,)), *(Option(rng.uniform(1, 10), (rng.uniform(10, 90),)) for _ in range(5))]
        for _ in range(6)
    ]
    sums = {"loss": np.zeros(1), "cost": np.zeros(1)}
    for options in layers:
        sums["loss"] = np.add.outer(sums["loss"], [o.loss for o in options]).ravel()
        sums["cost"] = np.add.outer(sums["cost"], [o.costs[0] for o in options]).ravel()
    within = sums["cost"] <= 300
    tempting = sums["cost"][within][np.argmin(sums["loss"][within])]
    limit = tempting * (1 - 4e-7)
    chosen = [options[i] for options, i in zip(layers, choose(layers, [limit]), strict=True)]
    assert sum(o.costs[0] for o in chosen) <= limit
    best = sums["loss"][sums["cost"] <= limit].min()
    assert sum(o.loss for o in chosen) == pytest.approx(best, rel=2e-5)


@pytest.mark.parametrize("beyond", [1.0, 1 + 1e-9, 1 + 1e-7, 1 + 1e-5])
def test_the_least_can_be_had_where_layers_differ_a_millionfold(beyond: float) -> None:
    """The solver's tolerance, a millionth of the limit, is more than all that the small layers cost."""
    small = [Option(0.0, (512.0,)), Option(0.01, (340.0,)), Option(5.0, (272.0,))]
    layers = [[Option(0.0, (1.6e9,)), Option(1.0, (4e8,))], *[small] * 4]
    limit = (4e8 + 4 * 272) * beyond
    picks = choose(layers, [limit])
    assert sum(options[i].costs[0] for options, i in zip(layers, picks, strict=True)) <= limit
    assert (picks[1:] == [2, 2, 2, 2]) == (beyond < 1 + 1e-6)


def test_a_limit_that_is_the_least_but_for_rounding_is_met() -> None:
    """Where nothing is cheaper than the original, all of it is the least."""
    layers = [[Option(0.0, (0.1,)), Option(1.0, (0.3,))] for _ in range(3)]
    total = sum([0.1] * 3)
    for limit in (total, np.nextafter(total, 0)):
        assert choose(layers, [float(limit)]) == [0, 0, 0]
    with pytest.raises(BudgetError):
        choose(layers, [total * 0.999999])


def test_no_choice_at_all_is_an_error() -> None:
    with pytest.raises(BudgetError, match="cannot be met together; let more stay"):
        choose([[Option(0.0, (2.0,)), Option(1.0, (1.0,))]], [0.5])


def test_budgets_far_apart_in_size_are_all_kept() -> None:
    """MACs run into billions where milliseconds are fractions."""
    layers = [
        [Option(0.0, (4e9, 0.4)), Option(1.0, (1e9, 0.4)), Option(3.0, (4e9, 0.1)), Option(9.0, (1e9, 0.1))]
    ]
    assert [choose(layers, limits)[0] for limits in ((4e9, 0.4), (2e9, 0.4), (4e9, 0.2), (2e9, 0.2))] == [
        0,
        1,
        2,
        3,
    ]


def test_losses_of_any_size_are_weighed() -> None:
    """Sums of losses of 1e-30 are compared like those of 1e30."""
    for unit in (1e-30, 1.0, 1e30):
        layers = [
            [Option(0.0, (2.0,)), Option(2 * unit, (1.0,))],
            [Option(0.0, (2.0,)), Option(unit, (1.0,))],
        ]
        assert choose(layers, [3.0]) == [0, 1]
    assert choose([[Option(0.0, (2.0,)), Option(0.0, (1.0,))]], [1.0]) == [1]


TALKATIVE = """
import ctypes, os, sys
from netdecouple.planning import knapsack
if {apart}:
    sys.stdout = os.fdopen(os.dup(1), "w")
solve = knapsack.milp
def talkative(*arguments, **options):
    ctypes.CDLL(None).puts(b"solver")
    return solve(*arguments, **options)
knapsack.milp = talkative
assert knapsack.choose([[knapsack.Option(0.0, (1.0,))]], [2.0]) == [0]
ctypes.CDLL(None).puts(b"native")
print("python")
"""


@pytest.mark.skipif(os.name != "posix", reason="descriptors are Posix's")
@pytest.mark.parametrize("apart", [True, False])
def test_what_the_solver_prints_is_discarded_where_python_prints_elsewhere(apart: bool) -> None:
    """As it does in the command line. Otherwise nothing may be lost of what others print meanwhile."""
    command = [sys.executable, "-c", TALKATIVE.format(apart=apart)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert sorted(printed.split()) == ["native", "python", *([] if apart else ["solver"])]
