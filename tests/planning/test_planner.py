"""Plans: what they hold, and by which procedure they are made."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from netdecouple.errors import BudgetError, ModelError
from netdecouple.families.chain import Step, method
from netdecouple.network import Layer
from netdecouple.planning.analysis import Analysis
from netdecouple.planning.candidates import Candidate, LayerCandidates, Rule
from netdecouple.planning.cost import Budget, Macs, Parameters
from netdecouple.planning.plan import VERSION, LayerPlan
from netdecouple.planning.planner import (
    RATIOS,
    budget_rows,
    make_plan,
    objective_of,
    parallel,
    plan_within,
    published_plan,
    reachable,
    ruled_plan,
)
from netdecouple.planning.settings import Settings
from netdecouple.report.build import unused_warning
from tests.planning.layers import conv, linear

FIRST, WIDE, OTHER, LAST = (
    conv("first", 3, 16, 8),
    conv("wide", 16, 32, 8),
    conv("other", 32, 32, 4),
    linear("fc", 32, 10),
)
LAYERS = (FIRST, WIDE, OTHER, LAST)
RIDGE = 0.03
RANKS = (1, 2, 3)


def candidate(layer: Layer, rank: int) -> Candidate:
    """The paper's form with the same T for every channel; its error falls as T rises."""
    steps = (Step(rank * layer.geometry.weight_shape[1]),)
    return Candidate(
        method="nd-dp",
        steps=steps,
        structure=method("nd-dp").structure(layer.geometry, steps),
        relative_error=0.1**rank,
        loss=10 * 0.1**rank,
        objective=20 * 0.1**rank,
    )


def with_losses(found: LayerCandidates, loss: float, objective: float) -> LayerCandidates:
    options = tuple(replace(c, loss=loss, objective=objective) for c in found.candidates)
    return replace(found, candidates=options)


def analysis(settings: Settings = Settings(), ranks: dict[str, tuple[int, ...]] | None = None) -> Analysis:
    """Two convolutions in the middle that may be changed, a first one that may, and a layer that may not."""
    found = {}
    for layer in LAYERS[:3]:
        options = tuple(candidate(layer, rank) for rank in (ranks or {}).get(layer.name, RANKS))
        found[layer.name] = LayerCandidates(layer=layer.name, candidates=options, ridge=RIDGE)
    inputs = SimpleNamespace(fingerprint="images", images=range(50))
    network = SimpleNamespace(layers=LAYERS, fingerprint="network")
    return Analysis(
        network=network,  # type: ignore[arg-type]
        settings=settings,
        inputs=inputs,  # type: ignore[arg-type]
        loss="kl",
        reasons={"fc": "too small"},
        candidates=found,
    )


def least(counter: Macs | Parameters) -> float:
    return sum(
        min([counter.dense(la), *(counter.decoupled(la, candidate(la, 1)) for _ in range(la is not LAST))])
        for la in LAYERS
    )


def test_what_can_be_reached_is_every_layer_at_its_cheapest() -> None:
    for counter in (Macs(), Parameters()):
        assert reachable(analysis(), counter) == least(counter) / sum(counter.dense(la) for la in LAYERS)


def test_a_plan_holds_what_was_decided_and_where_it_comes_from() -> None:
    seen = analysis(Settings(seed=7))
    plan = make_plan(seen, [Budget(Macs(), 0.6)], form=lambda layer, c: f"{layer.name} in {len(c.steps)}")
    assert (plan.version, plan.model, plan.images, plan.samples, plan.seed) == (
        VERSION,
        "network",
        "images",
        50,
        7,
    )
    assert (plan.loss, plan.data_free, plan.uniform_rank, plan.budget) == ("kl", False, False, "60% MACs")
    assert [row.name for row in plan.layers] == [la.name for la in LAYERS]
    assert plan.before.macs == sum(la.macs for la in LAYERS)
    assert plan.after.macs <= 0.6 * plan.before.macs
    for layer, row in zip(LAYERS, plan.layers, strict=True):
        assert (row.operator, row.macs_before, row.parameters_before) == (
            layer.operator,
            layer.macs,
            layer.parameters,
        )
        if row.changed:
            chosen = candidate(layer, row.sizes[0] // layer.geometry.weight_shape[1])
            assert (row.family, row.reason, row.form) == ("nd-dp", "", f"{layer.name} in 1")
            assert (row.macs, row.parameters) == (
                Macs().decoupled(layer, chosen),
                Parameters().decoupled(layer, chosen),
            )
            assert (row.predicted_error, row.predicted_loss) == (
                chosen.relative_error,
                10 * chosen.relative_error,
            )
            # channels are known when the plan has been applied
            assert (row.channels, row.ridge) == ((), RIDGE)
        else:
            assert row == LayerPlan.kept(layer, row.reason)
    assert any(row.changed for row in plan.layers)


def test_of_all_plans_the_one_with_the_least_predicted_loss_is_made() -> None:
    seen = analysis()
    for share in (0.35, 0.5, 0.7, 0.9):
        limit = share * sum(la.macs for la in LAYERS)
        choices = [
            [
                (la.macs, 0.0),
                *((Macs().decoupled(la, candidate(la, r)), 10 * 0.1**r) for r in RANKS if la is not LAST),
            ]
            for la in LAYERS
        ]
        best = min(
            sum(loss for _, loss in picks)
            for picks in itertools.product(*choices)
            if sum(macs for macs, _ in picks) <= limit
        )
        assert make_plan(seen, [Budget(Macs(), share)]).predicted_loss == pytest.approx(best)


def test_the_choice_minimises_the_objective_and_the_plan_predicts_the_loss() -> None:
    """The margin decides between layers that would lose the same, and is in no predicted number."""
    seen = analysis(ranks=dict.fromkeys(("first", "wide", "other"), (2,)))
    limit = sum(la.macs for la in LAYERS) - min(
        la.macs - Macs().decoupled(la, candidate(la, 2)) for la in (WIDE, OTHER)
    )
    for dear in ("wide", "other"):
        objectives = {"first": 9.0, "wide": 1.0, "other": 1.0, dear: 3.0}
        options = {name: with_losses(c, 0.5, objectives[name]) for name, c in seen.candidates.items()}
        equal = replace(seen, candidates=options)
        plan = make_plan(equal, [Budget(Macs(), limit / sum(la.macs for la in LAYERS))])
        assert [row.name for row in plan.layers if row.changed] == [{"wide": "other", "other": "wide"}[dear]]
        assert plan.predicted_loss == 0.5
        assert objective_of(equal, plan) == 1.0


def test_kept_layers_say_why() -> None:
    """Named before planning; nothing cheaper in the budget's unit; or not worth it."""
    layers = {row.name: row.reason for row in make_plan(analysis(), [Budget(Macs(), 1.0)]).layers}
    assert layers == {
        "first": "worth its cost",
        "wide": "worth its cost",
        "other": "worth its cost",
        "fc": "too small",
    }
    full = analysis(ranks={"wide": (9,)})  # all terms: as exact as the layer, and dearer
    plan = make_plan(full, [Budget(Macs(), 0.7), Budget(Parameters(), 1.0)])
    assert {row.name: row.reason for row in plan.layers}["wide"] == "no candidate has less MACs"
    assert plan.budget == "70% MACs and 100% parameters"


def test_a_candidate_that_costs_the_same_is_none() -> None:
    """Six terms of a 3 × 3 kernel with 18 outputs: 6 · (9 + 18) = 9 · 18."""
    layer = conv("even", 4, 18, 8)
    option = candidate(layer, 6)
    assert Macs().decoupled(layer, option) == layer.macs
    seen = replace(
        analysis(),
        network=SimpleNamespace(layers=(layer,), fingerprint=""),
        candidates={"even": LayerCandidates(layer="even", candidates=(option,))},
    )
    (row,) = make_plan(seen, [Budget(Macs(), 1.0)]).layers
    assert row.reason == "no candidate has less MACs"


def test_a_network_of_which_nothing_can_be_changed_meets_a_budget_of_everything() -> None:
    seen = replace(analysis(), candidates={})
    plan = make_plan(seen, [Budget(Macs(), 1.0)])
    assert not any(row.changed for row in plan.layers)
    with pytest.raises(BudgetError, match="not even T = 1 meets 100% MACs and 100% parameters;"):
        published_plan(seen, [Budget(Macs(), 1.0), Budget(Parameters(), 1.0)])


def test_a_budget_out_of_reach_says_what_can_be_had() -> None:
    share = least(Parameters()) / sum(la.parameters for la in LAYERS)
    for budgets in ([Budget(Parameters(), 0.05)], [Budget(Macs(), 0.9), Budget(Parameters(), 0.05)]):
        with pytest.raises(BudgetError, match="out of reach") as raised:
            make_plan(analysis(), budgets)
        assert f"is {100 * share:.1f}% ({1 / share:.2f} times fewer parameters)" in str(raised.value)
        assert str(raised.value).startswith("5% parameters")
    plan = make_plan(analysis(), [Budget(Parameters(), share * (1 + 1e-9))])
    assert plan.after.parameters == least(Parameters())


def test_losses_that_are_not_finite_are_refused() -> None:
    seen = analysis()
    name, found = next(iter(seen.candidates.items()))
    broken = replace(seen, candidates=seen.candidates | {name: with_losses(found, 0.5, np.inf)})
    with pytest.raises(ModelError, match=f"layer '{name}': its predicted loss is NaN or Inf.* exclude="):
        make_plan(broken, [Budget(Macs(), 0.5)])


@pytest.mark.parametrize(("ranks", "labels"), [((1, 2, 3), RATIOS), ((3,), RATIOS[:3])])
def test_the_table_of_budgets_ends_at_the_least_that_can_be_reached(
    ranks: tuple[int, ...], labels: tuple[float, ...]
) -> None:
    """T = 1 of every layer takes 6.9 times fewer MACs, T = 3 takes 2.3 times fewer."""
    seen = analysis(ranks=dict.fromkeys(("first", "wide", "other"), ranks))
    rows = budget_rows(seen)
    total = sum(la.macs for la in LAYERS)
    fewest = round(reachable(seen, Macs()) * total)
    assert (rows[-1].macs, rows[-1].label) == (fewest, f"{total / fewest:.2f}×")
    plans = [make_plan(seen, [Budget(Macs(), 1 / ratio)]) for ratio in labels]
    found = [(plan.after.macs, plan.after.parameters, plan.predicted_loss) for plan in plans]
    assert [(row.macs, row.parameters, row.predicted_loss) for row in rows[:-1]] == list(dict.fromkeys(found))
    assert all(plan.after.macs <= total / ratio for ratio, plan in zip(labels, plans, strict=True))
    assert len(set(rows)) == len(rows) < len(labels) + 1  # there are fewer plans than budgets


@pytest.mark.parametrize(
    ("shares", "warning"),
    [
        ((0.54, 0.9), ()),
        ((0.8, 0.9), ("50% MACs are left, where 80% MACs was asked for",)),
        ((0.8, 0.6), ("50% parameters are left, where 60% parameters was asked for",)),
        ((), ()),
    ],
)
def test_a_budget_that_is_not_used_up_is_said(shares: tuple[float, ...], warning: tuple[str, ...]) -> None:
    """The one that is used up most, where there are two."""
    budgets = [Budget(cost, share) for cost, share in zip((Macs(), Parameters()), shares, strict=False)]
    half = [replace(la, macs=la.macs // 2, parameters=la.parameters // 2) for la in LAYERS]
    found = unused_warning(budgets, LAYERS, half)
    assert tuple(text.partition(";")[0] for text in found) == warning


PAPER = Settings(data_free=True, uniform_rank=True)


def test_the_published_procedure_keeps_the_first_convolution_and_gives_all_others_one_rank() -> None:
    macs = {
        r: FIRST.macs + LAST.macs + sum(Macs().decoupled(la, candidate(la, r)) for la in (WIDE, OTHER))
        for r in RANKS
    }
    total = sum(la.macs for la in LAYERS)
    for rank in RANKS:
        plan = published_plan(analysis(PAPER), [Budget(Macs(), macs[rank] / total)], form=lambda *_: "fused")
        assert plan.after.macs == macs[rank]
        assert [row.sizes for row in plan.layers] == [(), (16 * rank,), (32 * rank,), ()]
        assert [row.reason for row in plan.layers] == ["first convolution", "", "", "too small"]
        assert [row.form for row in plan.layers] == ["", "fused", "fused", ""]
        assert plan.budget.endswith("MACs")
        assert (plan.data_free, plan.uniform_rank) == (True, True)
    budgets = [Budget(Macs(), 1.0)]
    form = "fused".format
    assert plan_within(analysis(PAPER), budgets, form) == published_plan(analysis(PAPER), budgets, form)
    assert plan_within(analysis(PAPER), budgets) == published_plan(analysis(PAPER), budgets, parallel)
    with pytest.raises(BudgetError, match=r"not even T = 1 meets .*; leave out uniform_rank="):
        published_plan(analysis(PAPER), [Budget(Macs(), 0.99 * macs[1] / total)])


def test_the_published_procedure_meets_every_budget() -> None:
    parameters = FIRST.parameters + LAST.parameters
    parameters += sum(Parameters().decoupled(la, candidate(la, 1)) for la in (WIDE, OTHER))
    share = parameters / sum(la.parameters for la in LAYERS)
    plan = published_plan(analysis(PAPER), [Budget(Macs(), 1.0), Budget(Parameters(), share)])
    assert plan.after.parameters == parameters
    assert plan.budget == f"100% MACs and {Budget(Parameters(), share)}"


def test_a_layer_without_the_common_rank_is_kept_by_the_published_procedure() -> None:
    plan = published_plan(analysis(PAPER, {"other": (1,)}), [Budget(Macs(), 1.0)])
    assert [row.sizes for row in plan.layers] == [(), (48,), (), ()]


@pytest.mark.parametrize("settings", [Settings(), Settings(data_free=True), Settings(uniform_rank=True)])
def test_only_both_settings_together_mean_the_published_procedure(settings: Settings) -> None:
    """Under the others the least loss wins, for which the first convolution may change, too."""
    plan = plan_within(
        analysis(settings), [Budget(Macs(), least(Macs()) / sum(la.macs for la in LAYERS) + 1e-9)]
    )
    assert [row.changed for row in plan.layers] == [True, True, True, False]
    assert [row.form for row in plan.layers] == ["parallel"] * 3 + [""]


def test_a_rule_is_followed_by_every_convolution_but_the_first() -> None:
    rule = Rule.parse("nd-dp:T=2")
    ruled = analysis(Settings(rule=rule), dict.fromkeys(("first", "wide", "other"), (2,)))
    plan = ruled_plan(ruled, "fused".format)
    assert plan_within(ruled, [], "fused".format) == plan
    assert [row.form for row in plan.layers] == ["", "fused", "fused", ""]
    assert [row.sizes for row in plan.layers] == [(), (32,), (64,), ()]
    assert [row.reason for row in plan.layers] == [
        "first convolution",
        "",
        "",
        "fully connected; published methods are for convolutions",
    ]
    assert (plan.budget, plan.uniform_rank) == (str(rule), True)
    share = Rule.parse("nd-dp:2x")
    assert not ruled_plan(analysis(Settings(rule=share), {"wide": (2,), "other": (2,)})).uniform_rank


def test_a_rule_that_no_layer_can_follow_is_refused() -> None:
    seen = analysis(Settings(rule=Rule.parse("nd-dp:T=9")), dict.fromkeys(("wide", "other"), ()))
    with pytest.raises(BudgetError, match=r"rule=nd-dp, size 9 in every layer: no layer becomes cheaper"):
        ruled_plan(seen)
