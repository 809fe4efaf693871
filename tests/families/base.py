"""The tests every family must pass. A new member says how to pose and fit itself, nothing else.

The oracle is always the dense convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.families import Family, Problem
from netdecouple.moments import Moments
from tests.strategies import geometries, images, kernel

# every family runs the same test functions; that is the point of a shared base. There are twenty
INHERITED = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.differing_executors])


def aware_problem(g: ConvGeometry, seed: int, ridge: float = 1e-4, dead: int = 0) -> Problem:
    """A problem posed on correlated inputs that are not centred; the first ``dead`` channels are constant."""
    rng = np.random.default_rng(seed)
    d, m = g.n_i // g.groups * g.kh * g.kw, g.n_o // g.groups
    x = (
        rng.standard_normal((3 * d + 20, g.groups, d))
        @ (rng.standard_normal((d, d)) / np.sqrt(d) + np.eye(d))
        + 1
    )
    x[:, :, : dead * g.kh * g.kw] = 2
    weight = kernel(g, seed)
    y = np.einsum("ngd,gmd->ngm", x, weight.reshape(g.groups, m, d)) + 0.5
    return Problem.of(g, weight, Moments.of(x, y)).regularized(ridge)


def data_free_problem(g: ConvGeometry, seed: int) -> Problem:
    return Problem.data_free(g, kernel(g, seed), np.full(g.n_o, 0.5))


def error_of(problem: Problem, factorization: Factorization) -> float:
    """The objective itself, from the composed dense kernel."""
    weight = factorization.dense().reshape(problem.weight.shape)
    return problem.moments.mean_squared_error(weight, factorization.bias.reshape(problem.geometry.groups, -1))


class FamilyTests:
    """Inherit, and say how the family is fitted at each of its ranks."""

    def levels(self, geometry: ConvGeometry) -> Sequence[int]:
        """Numbers of terms from fewest to full rank."""
        raise NotImplementedError

    def fit(self, problem: Problem, level: int) -> Factorization:
        raise NotImplementedError

    @given(geometries(), st.integers(0, 99), st.booleans())
    @settings(INHERITED, max_examples=60)
    def test_exact_at_full_rank(self, g: ConvGeometry, seed: int, aware: bool) -> None:
        """Stages, run one after the other, are the dense convolution to 1e-5."""
        problem = aware_problem(g, seed) if aware else data_free_problem(g, seed)
        full = self.fit(problem, self.levels(g)[-1])
        weight, x = kernel(g, seed), images(g, seed)
        expected = ConvStage(g, weight)(x) + 0.5
        scale = np.abs(expected).max()
        np.testing.assert_allclose(full(x) / scale, expected / scale, atol=1e-5)
        np.testing.assert_allclose(full.dense(), weight, atol=1e-5 * np.abs(weight).max())

    @given(geometries(max_kernel=4), st.integers(0, 99), st.booleans())
    @settings(INHERITED, max_examples=30)
    def test_error_never_rises_with_rank(self, g: ConvGeometry, seed: int, aware: bool) -> None:
        problem = aware_problem(g, seed) if aware else data_free_problem(g, seed)
        errors = [error_of(problem, self.fit(problem, level)) for level in self.levels(g)]
        slack = 1e-7 * max(errors[0], problem.moments.variance)
        assert all(b <= a + slack for a, b in pairwise(errors)), errors

    @given(geometries(), st.integers(0, 99), st.floats(0, 1))
    @settings(INHERITED, max_examples=60)
    def test_stages_agree_with_the_composed_kernel(self, g: ConvGeometry, seed: int, share: float) -> None:
        """At any rank, chain and dense kernel are the same function, borders included."""
        levels = self.levels(g)
        fitted = self.fit(aware_problem(g, seed), levels[int(share * (len(levels) - 1))])
        x = images(g, seed)
        expected = ConvStage(g, fitted.dense())(x) + fitted.bias[:, None, None]
        np.testing.assert_allclose(fitted(x), expected, atol=1e-7 * max(np.abs(expected).max(), 1))

    @pytest.mark.parametrize("seed", range(4))
    def test_fitting_to_data_beats_truncating_the_weights(self, seed: int) -> None:
        """At the same number of terms, in the inputs' metric; no theorem, but so on real sizes."""
        g = ConvGeometry(12, 10, 3, 3)
        problem = aware_problem(g, seed)
        for level in self.levels(g)[:3]:
            blind = self.fit(data_free_problem(g, seed), level)
            weight = blind.dense().reshape(problem.weight.shape)
            best_bias = problem.moments.mean_squared_error(weight, problem.moments.bias(weight))
            fitted = error_of(problem, self.fit(problem, level))
            assert fitted <= best_bias * (1 + 1e-6) + 1e-8 * problem.moments.variance

    @given(geometries(max_kernel=4), st.integers(0, 99), st.floats(0, 1))
    @settings(INHERITED, max_examples=30)
    def test_the_bias_leaves_no_mean_error(self, g: ConvGeometry, seed: int, share: float) -> None:
        problem = aware_problem(g, seed)
        levels = self.levels(g)
        fitted = self.fit(problem, levels[int(share * (len(levels) - 1))])
        weight = fitted.dense().reshape(problem.weight.shape)
        np.testing.assert_allclose(fitted.bias, problem.moments.bias(weight).ravel(), atol=1e-9)


class OneFamilyTests(FamilyTests):
    """The tests of one family: inherit, and name it."""

    family: Family

    def levels(self, geometry: ConvGeometry) -> Sequence[int]:
        full = self.family.exact(geometry)
        return sorted({max(1, full * i // 5) for i in range(6)})

    def fit(self, problem: Problem, level: int) -> Factorization:
        return self.family.fit(problem, level)

    @given(geometries(max_kernel=4), st.integers(0, 99), st.booleans())
    @settings(INHERITED, max_examples=30)
    def test_the_curve_falls_from_everything_to_nothing(
        self, g: ConvGeometry, seed: int, aware: bool
    ) -> None:
        """Foreseen errors start at all of the targets' power, never rise, and end at what no fit explains."""
        problem = aware_problem(g, seed) if aware else data_free_problem(g, seed)
        curve = self.family.curve(problem)
        assert len(curve) == self.family.exact(g) + 1
        assert curve[0] == pytest.approx(1, abs=1e-6)
        assert np.all(np.diff(curve) <= 1e-8)
        assert curve[-1] < 1e-4

    @given(geometries(max_kernel=4), st.integers(0, 99), st.floats(0, 1))
    @settings(INHERITED, max_examples=30)
    def test_fitting_does_no_worse_than_the_curve_foresees(
        self, g: ConvGeometry, seed: int, share: float
    ) -> None:
        problem = aware_problem(g, seed)
        levels = self.levels(g)
        level = levels[int(share * (len(levels) - 1))]
        assert problem.squared_error(self.fit(problem, level)) <= problem.power * (
            self.family.curve(problem)[level] + 1e-4
        )

    @given(geometries(max_kernel=4), st.integers(0, 99), st.floats(0, 1))
    @settings(INHERITED, max_examples=30)
    def test_white_inputs_spare_work_and_change_nothing(
        self, g: ConvGeometry, seed: int, share: float
    ) -> None:
        """What is left out for white inputs is what an identity for a metric would not change."""
        short = data_free_problem(g, seed)
        long = replace(short, white=False)
        np.testing.assert_allclose(self.family.curve(short), self.family.curve(long), atol=1e-6)
        level = self.levels(g)[int(share * (len(self.levels(g)) - 1))]
        errors = [error_of(long, self.fit(problem, level)) for problem in (short, long)]
        assert errors[0] <= errors[1] + 1e-7 * long.moments.variance
        fitted = self.fit(short, level)
        assert short.squared_error(fitted) == pytest.approx(long.squared_error(fitted), abs=1e-8 * long.power)

    @given(geometries(), st.integers(0, 99), st.floats(0, 1))
    @settings(INHERITED, max_examples=30)
    def test_its_structure_is_what_fitting_gives(self, g: ConvGeometry, seed: int, share: float) -> None:
        levels = self.levels(g)
        level = levels[int(share * (len(levels) - 1))]
        fitted = self.fit(data_free_problem(g, seed), level)
        assert fitted.structure.stages == self.family.structure(g, level).stages
        h, w = images(g, seed).shape[2:]
        assert fitted.macs(h, w) == self.family.structure(g, level).macs(h, w)

    @given(geometries(max_kernel=4), st.integers(0, 99), st.floats(0, 1))
    @settings(INHERITED, max_examples=20)
    def test_the_channels_it_chose_give_the_same_again(
        self, g: ConvGeometry, seed: int, share: float
    ) -> None:
        problem = aware_problem(g, seed)
        levels = self.levels(g)
        level = levels[int(share * (len(levels) - 1))]
        once = self.fit(problem, level)
        again = self.family.fit(problem, level, once.stages[0].channels)
        np.testing.assert_array_equal(once.dense(), again.dense())
