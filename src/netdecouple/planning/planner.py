"""Plans from an analysis: the least loss within budgets, the paper's own procedure, or a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from netdecouple.convolution import Factorization, Structure, placeholder
from netdecouple.errors import BudgetError, ModelError
from netdecouple.network import Layer
from netdecouple.planning.analysis import Analysis
from netdecouple.planning.candidates import Candidate
from netdecouple.planning.cost import Budget, Cost, Macs, Parameters, total_cost
from netdecouple.planning.knapsack import Option, choose
from netdecouple.planning.plan import LayerPlan, Plan

FIRST = "first convolution"
FULLY_CONNECTED = ("Gemm", "MatMul", "Linear")
NO_CONVOLUTION = "fully connected; published methods are for convolutions"
FULL = 0.98  # share of a budget that is used, from which no fuller plan is looked for
TRIES = 3  # plans that ask for more than the budgets, to fill them
RATIOS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)  # times fewer MACs, in the table of budgets
FormOf = Callable[[Layer, Candidate], str]  # how a layer's candidate is written


def parallel(layer: Layer, candidate: Candidate) -> str:
    """Return the form in standard operators that is fastest in most runtimes."""
    return "parallel"


def plan_within(
    analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel, *, fills: bool = True
) -> Plan:
    """Make a plan by the procedure of the analysis' settings; a rule does not use ``budgets``.

    A plan that ``fills`` its budgets counts what will be removed beside the layers that it changes.

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
            return (filled_plan if fills else make_plan)(analysis, budgets, form)


def filled_plan(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Make a plan that leaves no room in its budgets, by what would be written.

    A layer that reads fewer channels makes the filters before it cheaper, which `make_plan` does not count.
    So more is asked of it, until a network of this structure costs what the budgets allow.

    Raises:
        BudgetError: as `make_plan`.
        ModelError: as `make_plan`.
    """

    def planned(scale: float) -> tuple[Plan, float]:
        asked = [replace(budget, share=min(budget.share * scale, 1.0)) for budget in budgets]
        plan = replace(make_plan(analysis, asked, form), budget=_text(budgets))
        known = _known_structures(analysis, plan)
        if scale == 1 and all(structure.reads_all for structure in known.values()):
            return plan, 1.0  # `make_plan` has counted everything
        written = _written(analysis, plan, known)
        return plan, max(used(budget, analysis.network.layers, written) for budget in budgets)

    scale, over = 1.0, min((1 / budget.share for budget in budgets), default=1.0)  # all can stay at `over`
    best, full = planned(scale)
    for _ in range(TRIES):
        if full >= FULL:
            break
        more = min(scale / full, np.sqrt(scale * over))
        plan, share = planned(more)
        if share <= 1:
            scale, best, full = more, plan, share
        else:
            over = more
    return best


def used(budget: Budget, layers: Sequence[Layer], written: Sequence[Layer]) -> float:
    """Return the share of a budget that the layers of a written network use."""
    return total_cost(budget.cost, written) / (budget.share * total_cost(budget.cost, layers))


def _known_structures(analysis: Analysis, plan: Plan) -> dict[str, Structure]:
    """Return those of changed layers; which channels a depthwise stage reads is known after the fit only."""
    structures = {row.name: analysis.planned(row).structure for row in plan.layers if row.changed}
    return {name: s for name, s in structures.items() if s.stages[0].groups == s.geometry.groups}


def _written(analysis: Analysis, plan: Plan, known: Mapping[str, Structure]) -> Sequence[Layer]:
    """Return the layers of a plan's network, at what they cost at most."""
    network = analysis.network
    others = {row.name: row for row in plan.layers if row.changed and row.name not in known}
    built = {name: placeholder(structure) for name, structure in known.items()}
    return [
        replace(la, macs=row.macs, parameters=row.parameters) if (row := others.get(la.name)) else la
        for la in network.layers_of(network.build(built, {}, {}), built)
    ]


def placeholders(analysis: Analysis, plan: Plan) -> dict[str, Factorization]:
    """Return the changed layers of a plan that is not fitted yet, with weights that mean nothing."""
    changed = [row for row in plan.layers if row.changed]
    return {row.name: placeholder(analysis.planned(row).structure) for row in changed}


def make_plan(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Choose a candidate of every layer, or keep it: the least loss within the budgets.

    Raises:
        BudgetError: a budget cannot be met; the message says what can.
        ModelError: a predicted loss is NaN or Inf.
    """
    layers = analysis.network.layers
    for budget in budgets:
        share = reachable(analysis, budget.cost)
        if budget.share < share:
            raise BudgetError(
                f"{budget} is out of reach; the least this network can have is {100 * share:.1f}% "
                f"({1 / share:.2f} times fewer {budget.cost.unit}) with the layers that may be changed"
            )
    options = [_options(analysis, layer, budgets) for layer in layers]
    picks = choose(options, [b.limit(layers) for b in budgets])
    return _plan(analysis, picks, [_not_cheaper(o, budgets) for o in options], _text(budgets), form)


def reachable(analysis: Analysis, cost: Cost) -> float:
    """Return the least share of the original's cost that the network can have."""
    layers = analysis.network.layers
    least = cost.fixed
    for layer in layers:
        least += min([cost.dense(layer), *(cost.decoupled(layer, c) for c in analysis.candidates_of(layer))])
    return least / total_cost(cost, layers)


def _options(analysis: Analysis, layer: Layer, budgets: Sequence[Budget]) -> list[Option]:
    """Return what can be done to a layer: first to keep it, then its candidates."""
    candidates = analysis.candidates_of(layer)
    if not np.isfinite([c.objective for c in candidates]).all():
        raise ModelError(
            f"layer {layer.name!r}: its predicted loss is NaN or Inf, because the network makes too large "
            "numbers; check the preprocessing, or exclude the layer with exclude="
        )
    return [Option(0.0, tuple(b.cost.dense(layer) for b in budgets))] + [
        Option(c.objective, tuple(b.cost.decoupled(layer, c) for b in budgets)) for c in candidates
    ]


def _not_cheaper(options: Sequence[Option], budgets: Sequence[Budget]) -> str:
    """Return the reason if none of a layer's candidates is cheaper than the layer, in some budget's unit."""
    for budget, dense, *others in zip(budgets, *(option.costs for option in options), strict=True):
        if others and min(others) >= dense:
            return f"no candidate has less {budget.cost.unit}"
    return ""


def objective_of(analysis: Analysis, plan: Plan) -> float:
    """Return what `make_plan` minimises, for a plan of this analysis."""
    return sum(analysis.planned(row).objective for row in plan.layers if row.changed)


def published_plan(analysis: Analysis, budgets: Sequence[Budget], form: FormOf = parallel) -> Plan:
    """Make the paper's own plan: the first convolution kept, the largest common rank T for all others.

    Raises:
        BudgetError: not even T = 1 meets the budgets.
    """
    layers = analysis.network.layers
    first = _first_convolution(layers)
    options = [_options(analysis, layer, budgets) for layer in layers]
    # T of every option: the published procedure has the same for all channels
    ranks = [[0, *(c.sizes[0] // la.weight.shape[1] for c in analysis.candidates_of(la))] for la in layers]
    for rank in range(max(map(max, ranks)), 0, -1):
        pairs = zip(layers, ranks, strict=True)
        picks = [r.index(rank) if rank in r and la is not first else 0 for la, r in pairs]
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
    pairs = zip(layers, reasons, strict=True)
    picks = [int(bool(analysis.candidates_of(la)) and not reason) for la, reason in pairs]
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
    """Plan for a series of MAC budgets, and for the least that can be reached; no plan is listed twice."""
    least = reachable(analysis, Macs())
    shares = [1 / ratio for ratio in RATIOS if 1 / ratio > least]
    rows = []
    for share in [*shares, least * (1 + 1e-9)]:
        plan = make_plan(analysis, [Budget(Macs(), share)])
        label = f"{plan.before.macs / plan.after.macs:.2f}×"
        rows.append(BudgetRow(label, plan.after.macs, plan.after.parameters, plan.predicted_loss))
    return list(dict.fromkeys(rows))


def _first_convolution(layers: Sequence[Layer]) -> Layer | None:
    """Return the layer that published procedures keep."""
    return next((la for la in layers if la.operator.startswith("Conv")), None)


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
    return replace(
        LayerPlan.kept(layer, ""),
        family=candidate.method,
        sizes=candidate.sizes,
        ridge=found.ridge,
        macs=Macs().decoupled(layer, candidate),
        parameters=Parameters().decoupled(layer, candidate),
        predicted_error=candidate.relative_error,
        predicted_loss=candidate.loss,
        form=form(layer, candidate),
        data_free=found.data_free,
    )


def _text(budgets: Sequence[Budget]) -> str:
    return " and ".join(map(str, budgets))
