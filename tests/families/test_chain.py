"""Every combination of families passes the family tests; names, steps and trials of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdecouple.convolution import ConvGeometry, Factorization
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method, methods, pareto
from tests.families.base import INHERITED, FamilyTests, aware_problem, data_free_problem
from tests.strategies import geometries, images

CHAINS = [name for name in methods(["all"]) if "+" in name] + ["cd+nd-pd", "sd+nd-pd", "cp+nd-pd"]


def steps_of(name: str, g: ConvGeometry, share: float) -> list[Step]:
    """All sizes at a share of what makes each exact, or as large as what the outer ones leave allows."""
    steps: list[Step] = []
    exact = method(name).exact(g)
    for index, most in enumerate(exact):
        rest = [Step(1)] * (len(exact) - index - 1)
        for size in range(max(1, round(share * most)), 0, -1):
            try:
                method(name).structure(g, [*steps, Step(size), *rest])
            except ValueError:
                continue
            steps.append(Step(size))
            break
    return steps


def inherited(name: str) -> Any:
    """The body of one of the family tests, without its examples."""
    test: Any = getattr(FamilyTests, name)
    return test.hypothesis.inner_test


class CombinedTests(FamilyTests):
    name: str

    def levels(self, geometry: ConvGeometry) -> Sequence[int]:
        return (40, 70, 100)

    def fit(self, problem: Problem, level: int) -> Factorization:
        return method(self.name).fit(problem, steps_of(self.name, problem.geometry, level / 100))[0]

    # fewer examples than of a family: each stage has those of its family, and here only joining them is new

    @given(geometries(), st.integers(0, 99), st.booleans())
    @settings(INHERITED, max_examples=25)
    def test_exact_at_full_rank(self, g: ConvGeometry, seed: int, aware: bool) -> None:
        inherited("test_exact_at_full_rank")(self, g, seed, aware)

    @given(geometries(max_kernel=4), st.integers(0, 99), st.booleans())
    @settings(INHERITED, max_examples=15)
    def test_error_never_rises_with_rank(self, g: ConvGeometry, seed: int, aware: bool) -> None:
        inherited("test_error_never_rises_with_rank")(self, g, seed, aware)

    @given(geometries(), st.integers(0, 99), st.floats(0, 1))
    @settings(INHERITED, max_examples=25)
    def test_stages_agree_with_the_composed_kernel(self, g: ConvGeometry, seed: int, share: float) -> None:
        inherited("test_stages_agree_with_the_composed_kernel")(self, g, seed, share)

    @given(geometries(max_kernel=4), st.integers(0, 99), st.floats(0.2, 1))
    @settings(INHERITED, max_examples=15)
    def test_its_structure_is_what_fitting_gives(self, g: ConvGeometry, seed: int, share: float) -> None:
        steps = steps_of(self.name, g, share)
        fitted, _ = method(self.name).fit(data_free_problem(g, seed), steps)
        assert fitted.structure.stages == method(self.name).structure(g, steps).stages

    @given(geometries(max_kernel=4), st.integers(0, 99), st.floats(0.2, 1))
    @settings(INHERITED, max_examples=15)
    def test_the_steps_it_took_give_the_same_again(self, g: ConvGeometry, seed: int, share: float) -> None:
        problem, m = aware_problem(g, seed), method(self.name)
        once, steps = m.fit(problem, steps_of(self.name, g, share))
        m.structure(g, steps)
        again, _ = m.fit(problem, steps)
        np.testing.assert_array_equal(once.dense(), again.dense())


# one class per combination, so that a failure names it
for _name in CHAINS:
    _title = "Test" + _name.replace("+", " ").replace("-", " ").title().replace(" ", "")
    globals()[_title] = type(_title, (CombinedTests,), {"name": _name, "__doc__": _name})


def test_all_are_the_subsets_of_four_families_and_pd() -> None:
    assert len(methods(["all"])) == 16
    assert methods(["nd", "sd"]) == ("sd", "nd-dp", "nd-pd", "sd+nd-dp")
    assert methods(["cd+nd"]) == ("cd+nd-dp",)
    published = {"nd-dp", "sd", "cd", "cp", "sd+nd-dp", "cd+nd-dp", "cp+nd-dp", "cd+sd", "cd+cp", "cd+sd+cp"}
    assert published <= set(methods(["paper"]))
    assert "sd+cp" not in methods(["paper"])


@pytest.mark.parametrize("name", ["tucker", "nd+cd", "sd+sd", "cd+", "nd-dp+nd-pd"])
def test_what_cannot_be_combined_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"family|combine"):
        method(name)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("cd+nd-dp", [Step(4)]),
        ("cd", [Step(4), Step(2)]),
        ("cd", [Step(0)]),
        ("cp", [Step(7)]),
        ("cp", [Step(3, np.array([0, 1, 1]))]),
        ("cp", [Step(3, np.array([0, 1, 6]))]),
        ("cp", [Step(3, np.array([0, 1]))]),
        ("nd-dp", [Step(3, np.array([2, 1, 1]))]),
    ],
)
def test_steps_that_do_not_fit_are_refused(name: str, steps: list[Step]) -> None:
    with pytest.raises(ValueError, match="size"):
        method(name).structure(ConvGeometry(8, 6, 3, 3), steps)


@pytest.mark.parametrize("name", methods(["all"]))
def test_trials_foresee_what_fitting_gives(name: str) -> None:
    """Costs exactly; errors from above, for the rest of the chain makes up for some of them."""
    g = ConvGeometry(12, 10, 3, 3, pads=(1, 1, 1, 1))
    problem = aware_problem(g, 0)
    trials = method(name).trials(problem, (9, 9), [0.7, 0.5, 0.3])
    assert trials == pareto(trials)
    for trial in trials:
        fitted, _ = method(name).fit(problem, trial.steps)
        assert trial.macs == fitted.macs(9, 9) == trial.structure(g).macs(9, 9) < g.macs(9, 9)
        assert problem.squared_error(fitted) <= 1.05 * trial.squared_error


def test_channels_are_selected_among_those_selected_before() -> None:
    g = ConvGeometry(6, 8, 3, 3, pads=(1, 1, 1, 1))
    fitted, steps = method("cp+nd-dp").fit(aware_problem(g, 0), [Step(5), Step(12)])
    assert set(fitted.stages[0].channels) <= set(steps[0].channels)
    x = images(g, 0)
    touched = x.copy()
    touched[:, np.setdiff1d(np.arange(8), steps[0].channels)] += 1
    np.testing.assert_array_equal(fitted(x), fitted(touched))


@pytest.mark.parametrize("name", CHAINS)
def test_nothing_is_gained_by_forgetting_that_inputs_are_white(name: str) -> None:
    """What a first stage reads of white inputs is white, and is fitted as such, in far less time."""
    g = ConvGeometry(12, 12, 3, 3, pads=(1, 1, 1, 1), groups=2)
    problem = data_free_problem(g, 3)
    forgetful = replace(problem, white=False)
    steps = steps_of(name, g, 0.5)
    fitted, _ = method(name).fit(problem, steps)
    as_any, _ = method(name).fit(forgetful, steps)
    assert problem.squared_error(fitted) == pytest.approx(problem.squared_error(as_any), rel=1e-6)
    first = method(name).families[0].fit(problem, steps[0].size).stages[0]
    assert problem.of_stage((), first, False).white
