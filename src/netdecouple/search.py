"""Plans that are found by running them: trials of several plans, and the search for the least network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import ceil, inf, isinf, log, log2, sqrt

import numpy as np

from netdecouple.execution.progress import Progress, quiet, with_suffix
from netdecouple.execution.run import Run
from netdecouple.fitting.apply import Applied, apply
from netdecouple.fitting.sampling import Inputs
from netdecouple.fitting.sequential import Targets, targets_for
from netdecouple.network import Array, Network
from netdecouple.planning.analysis import Analysis, Objective
from netdecouple.planning.cost import Budget, Cost
from netdecouple.planning.divergence import Comparison, Loss
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.planning.planner import FormOf, make_plan, reachable

# A plan is made for each of these; the one whose outputs are nearest to the original's in a trial is kept.
OBJECTIVES = (
    Objective(),
    Objective(exponent=0.5),
    Objective(depth=1.0),
    Objective(depth=2.0),
    Objective(exponent=0.5, depth=1.0),
)
BETWEEN = Objective(exponent=0.7, depth=0.5)  # where only one plan is made: a compromise of them
GRID = tuple(Objective(exponent=e, depth=d) for e in (1.0, 0.7, 0.5, 0.35) for d in (0.0, 0.5, 1.0, 2.0))
TRIAL = 0.25  # share of the inputs that a trial is fitted to
LEAST: dict[Loss, int] = {"kl": 64, "relative": 64, "boxes": 32}  # and how many at least
STEP = 1.03  # the search for the least network ends when two budgets are this close
CLOSE = 0.1  # or when one keeps what is asked for, and its error is this near to what is allowed (logarithm)
BELOW = 0.7  # share of the least budget of one objective down to which another one is searched
SEARCHING = "Searching the budget"

# How far a network is from what is asked for, by its layers and its outputs on the held-out inputs: kept if
# not above 0.
Excess = Callable[[Applied, list[Array]], float]


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Args:
        objectives: of the plans.
        last: budgets near the one that a search found that are tried with all inputs.
    """

    objectives: tuple[Objective, ...]
    last: int


EFFORTS = {"low": Effort((BETWEEN,), 0), "normal": Effort(OBJECTIVES, 3), "high": Effort(GRID, 6)}


@dataclass(frozen=True)
class Trials:
    """Applies plans with part of the inputs, and measures what becomes of the outputs on held-out ones."""

    network: Network
    inputs: Inputs
    comparison: Comparison  # with its outputs on the held-out inputs
    progress: Progress
    run: Run

    @cached_property
    def part(self) -> Inputs:
        """The inputs that a trial is fitted to."""
        return self.inputs.part(TRIAL, LEAST[self.comparison.loss])

    def targets(self, plans: Sequence[Plan]) -> Targets | None:
        """Record targets once, for trials of all layers that some plans change."""
        return targets_for(self.network, self.part, plans, self.progress, self.run)

    def apply(self, plan: Plan, targets: Targets | None, progress: Progress = quiet) -> Applied:
        """Apply a plan with part of the inputs."""
        return apply(self.network, self.part, plan, progress, targets, self.run, is_trial=True)

    def outputs(self, applied: Applied) -> list[Array]:
        """The outputs, on the held-out inputs, of the network with a plan applied."""
        return self.network.run(self.inputs.held_out, applied.kernels)

    def best(self, goals: Sequence[Sequence[Plan]]) -> list[Plan]:
        """Try every goal's plans; return its best one each, with what it measured."""
        targets = self.targets(list(chain(*goals)))

        def tried(plan: Plan, number: str) -> Plan:
            named = with_suffix(f"(trial {number})", self.progress)
            outputs = self.outputs(self.apply(plan, targets, named))
            return replace(plan, trial_loss=self.comparison.divergence(outputs))

        best = []
        for plans in goals:
            unlike = [plan for i, plan in enumerate(plans) if plan not in plans[:i]]
            trials = [tried(plan, f"{i} of {len(unlike)}") for i, plan in enumerate(unlike, 1)]
            best.append(min(trials, key=lambda plan: plan.predicted_loss))
        return best


@dataclass(frozen=True)
class _Point:
    """A budget, as a share of the cost, and what a trial of its plan measured."""

    share: float
    excess: float
    loss: float = 0.0


@dataclass
class _Search:
    """Trials of plans for budgets in one unit, for several objectives."""

    trials: Trials
    choices: Sequence[Analysis]  # the analysis, for every objective
    cost: Cost
    form: FormOf
    excess: Excess
    least: float  # share that can be reached
    known: dict[tuple[LayerPlan, ...], _Point] = field(default_factory=dict)
    points: dict[int, list[_Point]] = field(default_factory=dict)  # by objective

    def plan(self, choice: int, share: float) -> Plan:
        return make_plan(self.choices[choice], [Budget(self.cost, share)], self.form)

    @cached_property
    def targets(self) -> Targets | None:
        """For all layers that any budget changes: the least network changes all of them."""
        return self.trials.targets([self.plan(0, self.least)])

    def tried(self, choice: int, share: float) -> _Point:
        """Try the plan of an objective for a budget, unless it is known already."""
        trials, plan = self.trials, self.plan(choice, share)
        trials.progress(SEARCHING, len(self.known), max(self.most, len(self.known) + 1))
        if plan.layers not in self.known:
            applied = trials.apply(plan, self.targets)
            outputs = trials.outputs(applied)
            loss = trials.comparison.divergence(outputs)
            self.known[plan.layers] = _Point(share, self.excess(applied, outputs), loss)
        point = replace(self.known[plan.layers], share=share)
        self.points.setdefault(choice, []).append(point)
        return point

    @property
    def most(self) -> int:
        """About how many trials there will be at most."""
        return ceil(log2(max(log(1 / self.least) / log(STEP), 1.0))) + len(self.choices)

    def narrowed(self, choice: int, low: _Point, high: _Point) -> _Point:
        """Return the least budget found between one that is too small and one that is large enough."""
        while high.share / low.share > STEP and high.excess <= -CLOSE:
            found = self.tried(choice, _between(low, high))
            low, high = (low, found) if found.excess <= 0 else (found, high)
        return high

    def predicted(self, choice: int, plan: Plan, share: float) -> Plan:
        """Note in a plan what its trial measured, or what those of near budgets did."""
        if plan.layers in self.known:
            return replace(plan, trial_loss=self.known[plan.layers].loss)
        points = sorted({(p.share, p.loss) for p in self.points.get(choice, [])} | {(1.0, 0.0)})
        shares, losses = zip(*points, strict=True)
        return replace(plan, trial_loss=float(np.interp(log(share), np.log(shares), losses)))


def _between(low: _Point, high: _Point) -> float:
    """Return the share at which a line through both would be 0, or the middle as long as one is not known."""
    known = not (isinf(low.excess) or isinf(high.excess))
    weight = low.excess / (low.excess - high.excess) if known else 0.5
    weight = min(max(weight, 0.25), 0.75)
    return float(low.share ** (1 - weight) * high.share**weight)


def least_network(
    trials: Trials,
    analysis: Analysis,
    cost: Cost,
    form: FormOf,
    excess: Excess,
    finished: Callable[[Plan], Plan] = lambda plan: plan,
) -> Applied:
    """Search the budget for the least network whose excess is 0 or less.

    The search tries plans with part of the inputs: first those of one objective, then all objectives for the
    budget that was found, and smaller ones for the best of them. What it finds is applied with all inputs,
    then larger budgets until one keeps what is asked for, then a few smaller ones.

    Args:
        cost: in which the network is to be the least.
        form: how a candidate is written.
        finished: completes a plan before it is applied with all inputs.
    """
    least = min(reachable(analysis, cost) * (1 + 1e-9), 1.0)
    effort = EFFORTS[analysis.settings.effort]
    choices = [analysis.with_objective(objective) for objective in effort.objectives]
    search = _Search(trials, choices, cost, form, excess, least)
    choice, high = 0, search.narrowed(0, _Point(least, inf), _Point(1.0, -inf))
    if high.share < 1:
        found = [high, *(search.tried(other, high.share) for other in range(1, len(choices)))]
        choice = min(range(len(found)), key=lambda i: (found[i].excess, found[i].loss))
        if choice:
            high = search.narrowed(choice, _Point(max(high.share * BELOW, least), inf), found[choice])
    trials.progress(SEARCHING, search.most, search.most)

    def fitted(share: float) -> tuple[Applied, float]:
        plan = finished(search.predicted(choice, search.plan(choice, share), share))
        applied = apply(trials.network, trials.inputs, plan, trials.progress, run=trials.run)
        return applied, excess(applied, trials.outputs(applied))

    low, share, more = None, high.share, STEP
    result, over = fitted(share)
    while share < 1 and over > 0:
        low, more = _Point(share, over), more**2
        share = min(share * more, 1.0)
        result, over = fitted(share)
    high = _Point(share, over)
    for _ in range(effort.last):  # fits to more inputs are better than those of the search
        if low is None:
            share, more = max(high.share / more, least), more**2
        else:
            share = _between(low, high)
        if high.share / share < sqrt(STEP) or high.excess > -CLOSE:
            break
        lower, over = fitted(share)
        if over > 0:
            low = _Point(share, over)
        else:
            high, result = _Point(share, over), lower
    return result
