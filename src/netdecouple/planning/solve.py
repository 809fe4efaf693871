"""The choice: one candidate per layer, least predicted loss, cost within the budgets.

A multiple-choice knapsack, solved exactly by HiGHS through scipy.optimize.milp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from netdecouple.errors import BudgetError, ModelError
from netdecouple.network import Layer
from netdecouple.planning.analysis import Analysis
from netdecouple.planning.candidates import Candidate
from netdecouple.planning.cost import Budget, Macs, Parameters
from netdecouple.planning.plan import VERSION, LayerPlan, Plan

FIRST = "first convolution"
FULLY_CONNECTED = ("Gemm", "MatMul", "Linear")
NO_CONVOLUTION = "fully connected; published methods are for convolutions"
FormOf = Callable[[Layer, Candidate], str]  # how a layer's candidate is written


def parallel(layer: Layer, candidate: Candidate) -> str:
    """The form for standard operators that is fastest in most runtimes."""
    return "parallel"


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a layer: what it loses, and what it costs in every budget's unit."""

    loss: float
    costs: tuple[float, ...]


def choose(layers: Sequence[Sequence[Option]], limits: Sequence[float]) -> list[int]:
    """Pick one option per layer: minimal total loss with every total cost at most its limit.

    Raises:
        BudgetError: no choice meets the limits.
    """
    sizes = [len(options) for options in layers]
    ends = np.cumsum(sizes, dtype=np.int64)
    losses = np.array([o.loss for options in layers for o in options])
    costs = np.array([o.costs for options in layers for o in options], float).T  # (budgets, options)
    once = np.zeros((len(layers), len(losses)))
    for row, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        once[row, end - size : end] = 1
    starts = ends - sizes
    least = np.minimum.reduceat(costs, starts, axis=1)  # (budgets, layers)
    room = np.asarray(limits, float) - least.sum(axis=1)  # what can be spent beyond
    above = costs - np.repeat(least, sizes, axis=1)
    possible = np.all(above <= room[:, None], axis=0)
    scale = np.where(room > 0, room, 1.0)
    for slack in (0.0, 2e-6, 1e-5):  # the solver may overshoot a limit by its tolerance of 1e-6; we may not
        solution = milp(
            losses / max(losses.max(initial=0.0), np.finfo(float).tiny),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint(above / scale[:, None], -np.inf, room / scale * (1 - slack)),
            ],
            integrality=np.ones(len(losses)),
            bounds=Bounds(0, possible.astype(float)),
            options={"mip_rel_gap": 1e-5, "time_limit": 60.0},
        )
        if solution.x is None:
            break
        picks = [int(np.argmax(solution.x[end - size : end])) for end, size in zip(ends, sizes, strict=True)]
        if np.all(costs[:, np.array(picks) + starts].sum(axis=1) <= limits):
            return picks
    raise BudgetError("the budgets cannot be met together; let more stay of one of them")


def reachable(analysis: Analysis, budgets: Sequence[Budget]) -> list[float]:
    """The least the network's layers can cost in each budget's unit."""
    least = []
    for budget in budgets:
        total = 0.0
        for layer in analysis.network.layers:
            found = analysis.candidates.get(layer.name)
            costs = [budget.cost.decoupled(layer, c) for c in found.candidates] if found else []
            total += min([budget.cost.dense(layer), *costs])
        least.append(total)
    return least


def make_plan(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Choose what to do to every layer: least predicted loss within the budgets.

    Raises:
        BudgetError: a budget cannot be met; the message says what can.
        ModelError: what a layer would lose is not finite.
    """
    layers = analysis.network.layers
    for budget, least in zip(budgets, reachable(analysis, budgets), strict=True):
        if budget.limit(layers) < least:
            total = budget.cost.fixed + sum(budget.cost.dense(la) for la in layers)
            share = (budget.cost.fixed + least) / total
            raise BudgetError(
                f"{budget} is out of reach; the least this network can have is {100 * share:.1f}% "
                f"({1 / share:.2f} times fewer {budget.cost.unit}) with the layers that may be changed"
            )
    options = []
    for layer in layers:
        choices = [Option(0.0, tuple(b.cost.dense(layer) for b in budgets))]
        if found := analysis.candidates.get(layer.name):
            if not np.isfinite(analysis.losses[layer.name]).all():
                raise ModelError(
                    f"layer {layer.name!r}: what it would lose is no finite number; the network makes too "
                    "large ones: check the preprocessing, or leave the layer alone (--exclude)"
                )
            choices += [
                Option(loss, tuple(b.cost.decoupled(layer, c) for b in budgets))
                for loss, c in zip(analysis.losses[layer.name], found.candidates, strict=True)
            ]
        options.append(choices)
    chosen = choose(options, [b.limit(layers) for b in budgets])
    rows = [
        _layer_plan(analysis, la, pick - 1, reason=_not_faster(analysis, la, budgets), form=form)
        for la, pick in zip(layers, chosen, strict=True)
    ]
    return _plan(analysis, rows, " and ".join(map(str, budgets)))


def _not_faster(analysis: Analysis, layer: Layer, budgets: Sequence[Budget]) -> str:
    """Why a layer is kept that could be changed: none of its candidates costs less, in some unit."""
    found = analysis.candidates.get(layer.name)
    for budget in budgets if found and found.candidates else ():
        assert found is not None
        if all(budget.cost.decoupled(layer, c) >= budget.cost.dense(layer) for c in found.candidates):
            return f"no candidate has less {budget.cost.unit}"
    return ""


@dataclass(frozen=True)
class BudgetRow:
    """One line of the table of budgets: a ratio, and what a plan for it would cost and lose."""

    label: str
    macs: int
    parameters: int
    predicted_loss: float


RATIOS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


def budget_rows(analysis: Analysis) -> list[BudgetRow]:
    """Plan for a ladder of MAC budgets, and for the least that can be reached."""
    layers = analysis.network.layers
    least = reachable(analysis, [Budget(Macs(), 1.0)])[0] / sum(layer.macs for layer in layers)
    shares = [1 / ratio for ratio in RATIOS if 1 / ratio > least]
    rows = []
    for share in [*shares, least * (1 + 1e-9)]:
        plan = make_plan(analysis, [Budget(Macs(), share)])
        label = f"{plan.macs_before / plan.macs:.2f}×"
        rows.append(BudgetRow(label, plan.macs, plan.parameters, plan.predicted_loss))
    return rows


def plan_within(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Plan for budgets as the settings say: the least loss, or the paper's own procedure.

    Raises:
        BudgetError: a budget cannot be met.
    """
    published = analysis.settings.data_free and analysis.settings.uniform_rank
    return (published_plan if published else make_plan)(analysis, budgets, form)


def published_plan(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """The paper's own procedure: the first convolution kept, one rank T for all others, as large as fits.

    Raises:
        BudgetError: not even T = 1 meets the budgets.
    """
    layers = analysis.network.layers
    first = first_convolution(layers)
    deepest = max((_common_rank(la, c) for la in layers for c in _found(analysis, la)), default=0)
    for rank in range(deepest, 0, -1):
        rows, costs = [], [0.0] * len(budgets)
        for layer in layers:
            ranks = [_common_rank(layer, c) for c in _found(analysis, layer)]
            index = ranks.index(rank) if rank in ranks and layer is not first else -1
            rows.append(_layer_plan(analysis, layer, index, FIRST if layer is first else "", form))
            for i, budget in enumerate(budgets):
                candidate = _found(analysis, layer)[index] if index >= 0 else None
                costs[i] += budget.cost.decoupled(layer, candidate) if candidate else budget.cost.dense(layer)
        if all(cost <= b.limit(layers) for cost, b in zip(costs, budgets, strict=True)):
            return _plan(analysis, rows, " and ".join(map(str, budgets)))
    raise BudgetError(f"not even T = 1 meets {' and '.join(map(str, budgets))}; leave --uniform-rank away")


def ruled_plan(analysis: Analysis, form: FormOf = parallel) -> Plan:
    """The one candidate of every convolution but the first that the settings' rule asks for.

    Raises:
        BudgetError: no layer can follow the rule.
    """
    layers, rule = analysis.network.layers, analysis.settings.rule
    assert rule is not None
    first = first_convolution(layers)
    rows = []
    for layer in layers:
        reason = FIRST if layer is first else NO_CONVOLUTION if layer.operator in FULLY_CONNECTED else ""
        index = 0 if _found(analysis, layer) and not reason else -1
        rows.append(_layer_plan(analysis, layer, index, reason, form))
    if not any(row.changed for row in rows):
        raise BudgetError(f"--method {rule}: no layer becomes cheaper by it; give a smaller size")
    return _plan(analysis, rows, str(rule))


def first_convolution(layers: Sequence[Layer]) -> Layer | None:
    """The layer that published procedures leave alone."""
    return next((la for la in layers if la.operator.startswith("Conv")), None)


def _found(analysis: Analysis, layer: Layer) -> tuple[Candidate, ...]:
    found = analysis.candidates.get(layer.name)
    return found.candidates if found else ()


def _common_rank(layer: Layer, candidate: Candidate) -> int:
    """T of a candidate that has the same for all channels."""
    assert layer.geometry is not None
    return candidate.sizes[0] // layer.geometry.weight_shape[1]


def _layer_plan(
    analysis: Analysis, layer: Layer, index: int, reason: str = "", form: FormOf = parallel
) -> LayerPlan:
    """Plan for one layer: its candidate number ``index``, or nothing at all if that is -1."""
    if index < 0:
        reason = reason or analysis.reasons.get(layer.name, "worth its cost")
        costs = (layer.macs, layer.macs, layer.parameters, layer.parameters)
        return LayerPlan(layer.name, layer.operator, "kept", reason, (), (), 0.0, *costs, 0.0, 0.0)
    found, candidate = analysis.candidates[layer.name], _found(analysis, layer)[index]
    return LayerPlan(
        layer.name,
        layer.operator,
        candidate.method,
        "",
        candidate.sizes,
        (),
        found.ridge,
        layer.macs,
        Macs().decoupled(layer, candidate),
        layer.parameters,
        Parameters().decoupled(layer, candidate),
        candidate.relative_error,
        analysis.losses[layer.name][index],
        form(layer, candidate),
        found.data_free,
    )


def _plan(analysis: Analysis, rows: Sequence[LayerPlan], budget: str) -> Plan:
    settings, inputs = analysis.settings, analysis.inputs
    return Plan(
        VERSION,
        analysis.network.fingerprint,
        inputs.fingerprint,
        len(inputs.images),
        settings.seed,
        analysis.loss,
        settings.data_free,
        settings.uniform_rank or (settings.rule is not None and settings.rule.is_uniform),
        budget,
        tuple(rows),
    )
