"""The search for the least network, where what trials measure is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, log
from types import SimpleNamespace
from typing import Any

import pytest

from netdecouple import search
from netdecouple.execution.progress import quiet
from netdecouple.planning.analysis import Objective
from netdecouple.planning.settings import EffortName, Settings
from netdecouple.search import BELOW, EFFORTS, OBJECTIVES, STEP, least_network

REACHABLE = 0.1


@dataclass(frozen=True)
class Plan:
    """A plan is what it was made for."""

    layers: tuple[Objective, float]
    trial_loss: float | None = None


@dataclass(frozen=True)
class Applied:
    plan: Plan
    inputs: str


@dataclass(frozen=True)
class Choices:
    """An analysis, which is its objective."""

    settings: Settings

    def with_objective(self, objective: Objective) -> Objective:
        return objective


class Trials:
    """The network's error goes up as its share goes down, at a rate of each objective."""

    network, inputs, part, run = None, "all", "part", None
    progress = staticmethod(quiet)
    comparison = SimpleNamespace(divergence=lambda outputs: outputs)

    def __init__(self, rates: dict[Objective, float], gain: float = 1.0) -> None:
        self.rates, self.gain = rates, gain  # errors are so many times less with all inputs
        self.fits: list[Applied] = []

    def targets(self, plans: Any) -> None:
        return None

    def apply(self, plan: Plan, targets: None) -> Applied:
        return Applied(plan, self.part)

    def outputs(self, applied: Applied) -> float:
        objective, share = applied.plan.layers
        self.fits.append(applied)
        error = self.rates.get(objective, 8.0) * -log(share)
        return error / (self.gain if applied.inputs == "all" else 1.0)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "reachable", lambda *_: REACHABLE)
    monkeypatch.setattr(search, "make_plan", lambda choice, budgets, form: Plan((choice, budgets[0].share)))
    monkeypatch.setattr(search, "apply", lambda network, inputs, plan, *_, **__: Applied(plan, inputs))


def found(trials: Trials, limit: float, smooth: bool = True, effort: EffortName = "normal") -> Applied:
    """Search for the least network with an error below the limit."""

    def excess(applied: Any, error: Any) -> float:
        if not smooth:
            return inf if error > limit else -inf
        return log(max(error, 1e-9) / limit)

    return least_network(trials, Choices(Settings(effort=effort)), None, None, excess)  # type: ignore[arg-type]


@pytest.mark.parametrize("best", range(len(OBJECTIVES)))
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("limit", [0.03, 0.3, 3.0])
def test_the_least_network_of_the_best_objective_is_found(best: int, smooth: bool, limit: float) -> None:
    """With few trials; what is kept is kept with all inputs, too."""
    trials = Trials({OBJECTIVES[best]: 4.0})
    objective, share = found(trials, limit, smooth).plan.layers
    exact = max(2.718281828 ** (-limit / 4.0), REACHABLE)  # where the error is the limit
    assert exact <= share < exact * 1.15
    assert objective == OBJECTIVES[best] or share < 1.05 * exact  # both are that near
    assert len(trials.fits) < 24


def test_no_plan_is_tried_twice() -> None:
    trials = Trials({OBJECTIVES[2]: 4.0})
    found(trials, 0.5)
    parts = [fit.plan.layers for fit in trials.fits if fit.inputs == "part"]
    assert len(parts) == len(set(parts))


def test_smaller_budgets_are_tried_where_all_inputs_fit_better() -> None:
    worse, better = (found(Trials({}, gain), 0.5).plan.layers[1] for gain in (1.0, 2.0))
    assert worse / STEP ** (2 ** EFFORTS["normal"].last) < better < worse


def test_larger_budgets_are_tried_where_all_inputs_fit_worse() -> None:
    """Until one keeps what is asked for, if it is the original."""
    trials = Trials({}, 0.8)
    result = found(trials, 0.5)
    assert 0.3 < trials.outputs(result) <= 0.5
    assert found(Trials({}, 1e-9), 0.5).plan.layers[1] == 1.0


def test_what_trials_measured_is_the_prediction() -> None:
    """Of near budgets, where the plan was not tried."""
    trials = Trials({}, 2.0)
    plan = found(trials, 0.5).plan
    assert plan.trial_loss == pytest.approx(trials.outputs(Applied(replace(plan), "part")), rel=0.1)


def test_another_objective_is_searched_below_what_the_first_one_found() -> None:
    """However much better it is, so that few more trials are needed."""
    trials = Trials({OBJECTIVES[3]: 0.01})
    share = found(trials, 0.5).plan.layers[1]
    first = found(Trials({}), 0.5).plan.layers[1]
    assert first * BELOW / STEP**8 < share < first * BELOW * STEP


def test_more_effort_tries_more_plans() -> None:
    fits = []
    for effort in EFFORTS:
        trials = Trials({}, 2.0)
        found(trials, 0.5, effort=effort)
        fits.append(len(trials.fits))
    assert fits == sorted(set(fits))
    assert fits[0] <= 8
