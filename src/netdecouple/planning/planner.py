"""Plans from an analysis: the least loss within budgets, the paper's own procedure, or a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from netdecouple.errors import BudgetError, ModelError
from netdecouple.network import Layer
from netdecouple.planning.analysis import Analysis
from netdecouple.planning.candidates import Candidate
from netdecouple.planning.cost import Budget, Macs, Parameters
from netdecouple.planning.knapsack import Option, choose
from netdecouple.planning.plan import LayerPlan, Plan

FIRST = "first convolution"
FULLY_CONNECTED = ("Gemm", "MatMul", "Linear")
NO_CONVOLUTION = "fully connected; published methods are for convolutions"
RATIOS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # times fewer MACs, in the table of budgets
FormOf = Callable[[Layer, Candidate], str]  # how a layer's candidate is written


def parallel(layer: Layer, candidate: Candidate) -> str:
    """Return the form in standard operators that is fastest in most runtimes."""
    return "parallel"


def plan_within(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Make a plan by the procedure of the analysis' settings; a rule does not use ``budgets``.

    Raises:
        BudgetError: a budget cannot be met, or no layer can follow the rule.
        ModelError: a predicted loss is NaN or Inf.
    """
    match analysis.settings.procedure:
        case "rule":
            return ruled_plan(analysis, form)
        case "published":
            return published_plan(analysis, budgets, form)
        case "planned":
            return make_plan(analysis, budgets, form)


def make_plan(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Choose a candidate of every layer, or keep it: the least loss within the budgets.

    Raises:
        BudgetError: a budget cannot be met; the message says what can.
        ModelError: a predicted loss is NaN or Inf.
    """
    layers = analysis.network.layers
    _check_reachable(analysis, budgets)
    options = [_options(analysis, layer, budgets) for layer in layers]
    picks = choose(options, [b.limit(layers) for b in budgets])
    reasons = [_not_cheaper(analysis, layer, budgets) for layer in layers]
    return _plan(analysis, picks, reasons, _text(budgets), form)


def reachable(analysis: Analysis, budgets: Sequence[Budget]) -> list[float]:
    """Return the least that the network's layers can cost, in each budget's unit."""
    least = []
    for budget in budgets:
        total = 0.0
        for layer in analysis.network.layers:
            costs = [budget.cost.decoupled(layer, c) for c in _candidates(analysis, layer)]
            total += min([budget.cost.dense(layer), *costs])
        least.append(total)
    return least


def _check_reachable(analysis: Analysis, budgets: Sequence[Budget]) -> None:
    layers = analysis.network.layers
    for budget, least in zip(budgets, reachable(analysis, budgets), strict=True):
        if budget.limit(layers) < least:
            total = budget.cost.fixed + sum(budget.cost.dense(la) for la in layers)
            share = (budget.cost.fixed + least) / total
            raise BudgetError(
                f"{budget} is out of reach; the least this network can have is {100 * share:.1f}% "
                f"({1 / share:.2f} times fewer {budget.cost.unit}) with the layers that may be changed"
            )


def _options(analysis: Analysis, layer: Layer, budgets: Sequence[Budget]) -> list[Option]:
    """Return what can be done to a layer: first to keep it, then its candidates."""
    objectives = analysis.objectives.get(layer.name, ())
    if not np.isfinite(objectives).all():
        raise ModelError(
            f"layer {layer.name!r}: its predicted loss is NaN or Inf, because the network makes too large "
            "numbers; check the preprocessing, or exclude the layer with exclude="
        )
    return [Option(0.0, tuple(b.cost.dense(layer) for b in budgets))] + [
        Option(objective, tuple(b.cost.decoupled(layer, c) for b in budgets))
        for objective, c in zip(objectives, _candidates(analysis, layer), strict=True)
    ]


def _not_cheaper(analysis: Analysis, layer: Layer, budgets: Sequence[Budget]) -> str:
    """Return the reason if none of a layer's candidates is cheaper than the layer, in some budget's unit."""
    candidates = _candidates(analysis, layer)
    for budget in budgets if candidates else ():
        if all(budget.cost.decoupled(layer, c) >= budget.cost.dense(layer) for c in candidates):
            return f"no candidate has less {budget.cost.unit}"
    return ""


def objective_of(analysis: Analysis, plan: Plan) -> float:
    """Return what `make_plan` minimises, for a plan of this analysis."""
    total = 0.0
    for row in plan.layers:
        if row.changed:
            choices = [(c.method, c.sizes) for c in analysis.candidates[row.name].candidates]
            total += analysis.objectives[row.name][choices.index((row.family, row.sizes))]
    return total


def published_plan(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Make the paper's own plan: the first convolution kept, the largest common rank T for all others.

    Raises:
        BudgetError: not even T = 1 meets the budgets.
    """
    layers = analysis.network.layers
    first = _first_convolution(layers)
    options = [_options(analysis, layer, budgets) for layer in layers]
    ranks = [[0, *(_common_rank(la, c) for c in _candidates(analysis, la))] for la in layers]
    for rank in range(max(map(max, ranks)), 0, -1):
        picks = [
            r.index(rank) if rank in r and la is not first else 0 for la, r in zip(layers, ranks, strict=True)
        ]
        costs = np.sum([o[pick].costs for o, pick in zip(options, picks, strict=True)], axis=0)
        if all(cost <= budget.limit(layers) for cost, budget in zip(costs, budgets, strict=True)):
            reasons = [FIRST if layer is first else "" for layer in layers]
            return _plan(analysis, picks, reasons, _text(budgets), form)
    raise BudgetError(f"not even T = 1 meets {_text(budgets)}; leave out uniform_rank=")


def ruled_plan(analysis: Analysis, form: FormOf = parallel) -> Plan:
    """Make the plan of the settings' rule: its one candidate for every convolution but the first.

    Raises:
        BudgetError: no layer can follow the rule.
    """
    layers, rule = analysis.network.layers, analysis.settings.rule
    assert rule is not None
    first = _first_convolution(layers)
    reasons = [
        FIRST if la is first else NO_CONVOLUTION if la.operator in FULLY_CONNECTED else "" for la in layers
    ]
    picks = [
        1 if _candidates(analysis, la) and not reason else 0
        for la, reason in zip(layers, reasons, strict=True)
    ]
    if not any(picks):
        raise BudgetError(f"rule={rule}: no layer becomes cheaper by it; give a smaller size")
    return _plan(analysis, picks, reasons, str(rule), form)


@dataclass(frozen=True)
class BudgetRow:
    """One line of the table of budgets: a ratio, and the cost and predicted loss of a plan for it."""

    label: str
    macs: int
    parameters: int
    predicted_loss: float


def budget_rows(analysis: Analysis) -> list[BudgetRow]:
    """Plan for a series of MAC budgets, and for the least that can be reached."""
    least = reachable(analysis, [Budget(Macs(), 1.0)])[0] / sum(la.macs for la in analysis.network.layers)
    shares = [1 / ratio for ratio in RATIOS if 1 / ratio > least]
    rows = []
    for share in [*shares, least * (1 + 1e-9)]:
        plan = make_plan(analysis, [Budget(Macs(), share)])
        label = f"{plan.before.macs / plan.after.macs:.2f}×"
        rows.append(BudgetRow(label, plan.after.macs, plan.after.parameters, plan.predicted_loss))
    return rows


def _first_convolution(layers: Sequence[Layer]) -> Layer | None:
    """Return the layer that published procedures keep."""
    return next((la for la in layers if la.operator.startswith("Conv")), None)


def _candidates(analysis: Analysis, layer: Layer) -> tuple[Candidate, ...]:
    found = analysis.candidates.get(layer.name)
    return found.candidates if found else ()


def _common_rank(layer: Layer, candidate: Candidate) -> int:
    """T of a candidate that has the same for all channels."""
    assert layer.geometry is not None
    return candidate.sizes[0] // layer.geometry.weight_shape[1]


def _plan(
    analysis: Analysis, picks: Sequence[int], reasons: Sequence[str], budget: str, form: FormOf
) -> Plan:
    """Return the plan of one pick per layer: 0 keeps it, for a reason; n takes its candidate n - 1."""
    network, settings, inputs = analysis.network, analysis.settings, analysis.inputs
    choices = zip(network.layers, picks, reasons, strict=True)
    return Plan(
        model=network.fingerprint,
        images=inputs.fingerprint,
        samples=len(inputs.images),
        seed=settings.seed,
        loss=analysis.loss,
        data_free=settings.data_free,
        uniform_rank=settings.uniform_rank or (settings.rule is not None and settings.rule.is_uniform),
        budget=budget,
        layers=tuple(
            _changed(analysis, layer, pick - 1, form)
            if pick
            else LayerPlan.kept(layer, reason or analysis.reasons.get(layer.name, "worth its cost"))
            for layer, pick, reason in choices
        ),
    )


def _changed(analysis: Analysis, layer: Layer, index: int, form: FormOf) -> LayerPlan:
    """Return the plan for one layer that becomes its candidate number ``index``."""
    found = analysis.candidates[layer.name]
    candidate = found.candidates[index]
    return LayerPlan(
        name=layer.name,
        operator=layer.operator,
        family=candidate.method,
        sizes=candidate.sizes,
        ridge=found.ridge,
        macs_before=layer.macs,
        macs=Macs().decoupled(layer, candidate),
        parameters_before=layer.parameters,
        parameters=Parameters().decoupled(layer, candidate),
        predicted_error=candidate.relative_error,
        predicted_loss=analysis.losses[layer.name][index],
        form=form(layer, candidate),
        data_free=found.data_free,
    )


def _text(budgets: Sequence[Budget]) -> str:
    return " and ".join(map(str, budgets))
