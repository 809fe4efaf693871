"""Plans round-trip through JSON, and anything that is not a plan is refused in one line."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from netdecouple.errors import PlanError
from netdecouple.network import Layer
from netdecouple.planning.cost import Costs
from netdecouple.planning.plan import LayerPlan, Plan

LAYER = LayerPlan(
    name="a/b",
    operator="Conv",
    family="cd+nd-dp",
    sizes=(3, 4),
    channels=((), (0, 0, 2, 2)),
    ridge=0.01,
    macs_before=900,
    macs=300,
    parameters_before=90,
    parameters=30,
    predicted_error=0.05,
    predicted_loss=0.002,
)
KEPT = LayerPlan.kept(Layer("fc", "Gemm", 100, 110), "fully connected layer")
PLAN = Plan(
    model="ab12",
    images="cd34",
    samples=100,
    seed=0,
    loss="kl",
    data_free=False,
    uniform_rank=False,
    budget="50% MACs",
    layers=(LAYER, KEPT),
)


def test_a_plan_comes_back_equal_and_as_the_same_text() -> None:
    text = PLAN.to_json()
    assert Plan.from_json(text) == PLAN
    assert Plan.from_json(text).to_json() == text


def test_a_plan_adds_its_layers_up() -> None:
    assert (PLAN.before, PLAN.after) == (Costs(1000, 200), Costs(400, 140))
    assert PLAN.predicted_loss == 0.002
    assert [la.changed for la in PLAN.layers] == [True, False]


def test_steps_are_sizes_with_the_channels_that_are_known() -> None:
    cd, nd = LAYER.steps
    assert (cd.size, cd.channels, nd.size, list(nd.channels)) == (3, None, 4, [0, 0, 2, 2])
    assert [step.channels for step in replace(LAYER, channels=()).steps] == [None, None]
    assert replace(LAYER, channels=()).with_steps(LAYER.steps) == LAYER


def test_a_plan_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAN.seed = 1  # type: ignore[misc]


def changed(**values: object) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | values)


def layer(**values: object) -> str:
    rows = json.loads(PLAN.to_json())["layers"]
    return changed(layers=[rows[0] | values, rows[1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan"),
        ("{", "not a plan"),
        ("[1, 2]", "not a plan"),
        ("{}", "not a plan"),
        ("[" * 100_000, "not a plan"),
        (changed(version=99), "version 99"),
        (changed(extra=1), "fields"),
        (changed(samples="100"), "'samples' must be int"),
        (changed(samples=True), "'samples' must be int"),
        (changed(samples=-1), "not negative"),
        (changed(layers={}), "'layers' must be a list"),
        (changed(layers=[1]), "fields"),
        (layer(channels=[[1.5]]), "'channels' must be int"),
        (layer(channels=[1]), "'channels' must be a list"),
        (layer(ridge="x"), "'ridge' must be float"),
        (layer(ridge=float("nan")), "finite"),
        (layer(sizes=[None]), "'sizes' must be int"),
        (layer(sizes=3), "'sizes' must be a list"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_json(text, "plan.json")
    assert "\n" not in str(caught.value)
    assert "plan.json" in str(caught.value)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json"):
        Plan.load(tmp_path / "nowhere.json")
