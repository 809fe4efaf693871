"""Settings, and the procedure that follows from them."""

from __future__ import annotations

import pytest

from netdecouple.errors import BudgetError
from netdecouple.planning.candidates import Rule
from netdecouple.planning.settings import Procedure, Settings

RULE = Rule.parse("cd:rank=2")


@pytest.mark.parametrize(
    ("settings", "procedure"),
    [
        (Settings(), "planned"),
        (Settings(data_free=True), "planned"),
        (Settings(uniform_rank=True), "planned"),
        (Settings(data_free=True, uniform_rank=True), "published"),
        (Settings(rule=RULE), "rule"),
        (Settings(rule=RULE, data_free=True, uniform_rank=True), "rule"),
    ],
)
def test_only_both_options_together_mean_the_published_procedure(
    settings: Settings, procedure: Procedure
) -> None:
    assert settings.procedure == procedure


def test_the_published_procedure_knows_one_method() -> None:
    assert Settings(data_free=True, uniform_rank=True, families=("sd",)).methods == ("nd-dp",)
    assert Settings(data_free=True, families=("sd",)).methods == ("sd",)


def test_a_string_is_taken_for_a_tuple() -> None:
    assert Settings(exclude="c1").exclude == ("c1",)  # type: ignore[arg-type]
    assert Settings(families="nd-dp").families == ("nd-dp",)  # type: ignore[arg-type]
    assert Settings(families="nd, sd").methods == Settings(families=("nd", "sd")).methods  # type: ignore[arg-type]


def test_an_unknown_loss_is_refused() -> None:
    """By an error that is a ValueError as well."""
    for kind in (BudgetError, ValueError):
        with pytest.raises(kind, match="loss='l2': give kl or relative"):
            Settings(loss="l2")  # type: ignore[arg-type]


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(BudgetError, match="effort='max': give low or normal or high"):
        Settings(effort="max")  # type: ignore[arg-type]
