"""ND in the DP form: the family tests, for a common rank and for ranks per channel, and what is its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdecouple.convolution import ConvGeometry, Factorization
from netdecouple.families import Problem, nd
from tests.families.base import FamilyTests, OneFamilyTests, aware_problem, data_free_problem, error_of
from tests.strategies import geometries, kernel


class TestCommonRank(FamilyTests):
    def levels(self, geometry: ConvGeometry) -> Sequence[int]:
        return range(1, nd.full_rank(geometry) + 1)

    def fit(self, problem: Problem, level: int) -> Factorization:
        return nd.fit(problem, np.full(problem.geometry.n_i, level))


class TestRankPerChannel(OneFamilyTests):
    family = nd.DepthwisePointwise()


class TestPointwiseDepthwise(OneFamilyTests):
    family = nd.PointwiseDepthwise()


@given(geometries(max_kernel=4), st.integers(0, 99), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_data_free_fit_is_the_truncated_svd_of_every_slice(g: ConvGeometry, seed: int, rank: int) -> None:
    """The paper, section 3: slice i of the kernel is n_o × k²."""
    rank = min(rank, nd.full_rank(g))
    problem = data_free_problem(g, seed)
    dense = nd.fit(problem, np.full(g.n_i, rank)).dense()
    m = g.n_o // g.groups
    for group in range(g.groups):
        rows = slice(group * m, (group + 1) * m)
        for i in range(g.n_i // g.groups):
            u, s, vt = np.linalg.svd(kernel(g, seed)[rows, i].reshape(m, -1), full_matrices=False)
            expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
            np.testing.assert_allclose(dense[rows, i].reshape(m, -1), expected, atol=1e-8)


@given(geometries(max_kernel=4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_error_curve_is_what_fitting_each_number_of_terms_gives(g: ConvGeometry, seed: int) -> None:
    """One Cholesky factorization against one least-squares fit per number of terms."""
    problem = aware_problem(g, seed)
    terms = nd.spectrum(problem)
    curve = nd.error_curve(problem, terms, terms.order())
    assert curve[0] == pytest.approx(1)
    assert np.all(np.diff(curve) <= 1e-12)
    for count in range(1, min(len(curve), 9)):
        fitted = nd.fit(problem, terms.ranks(count), sweeps=0)
        centred = error_of(problem, fitted) / problem.moments.variance
        assert curve[count] == pytest.approx(centred, abs=1e-6)


def test_descent_improves_on_the_refit_and_never_rises() -> None:
    problem = aware_problem(ConvGeometry(16, 24, 3, 3), 0)
    ranks = nd.spectrum(problem).ranks(50)
    errors = [error_of(problem, nd.fit(problem, ranks, sweeps=n)) for n in range(5)]
    assert all(b <= a * (1 + 1e-10) for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.97 * errors[0]


def test_blocks_of_channels_change_nothing() -> None:
    """Computing the residual for several channels at once is bookkeeping, not another algorithm."""
    problem = aware_problem(ConvGeometry(8, 21, 3, 3), 1)
    ranks = nd.spectrum(problem).ranks(40)
    whole = nd.fit(problem, ranks).dense()
    np.testing.assert_allclose(nd.fit(problem, ranks, block=1).dense(), whole, atol=1e-9)


def test_pooled_ranks_beat_a_common_rank_at_the_same_cost() -> None:
    """Channels differ in what they carry; some carry nothing and get rank 0."""
    g = ConvGeometry(16, 12, 3, 3)
    rng = np.random.default_rng(0)
    weight = kernel(g, 0) * np.repeat([0.0, 0.1, 3.0], 4)[None, :, None, None]
    problem = Problem.data_free(g, weight + 1e-9 * rng.standard_normal(weight.shape), np.zeros(16))
    terms = nd.spectrum(problem)
    pooled, common = terms.ranks(36), terms.ranks(36, uniform=True)
    assert pooled.sum() == common.sum() == 36
    assert list(pooled[:4]) == [0, 0, 0, 0]
    assert list(common) == [3] * 12
    assert error_of(problem, nd.fit(problem, pooled)) < 0.5 * error_of(problem, nd.fit(problem, common))


def test_terms_cost_a_filter_and_a_column_each() -> None:
    g = ConvGeometry(24, 12, 3, 5, pads=(1, 2, 1, 2), groups=2)
    fitted = nd.DepthwisePointwise().fit(data_free_problem(g, 0), 17)
    assert fitted.macs(10, 10) == 17 * 2 * (15 + 12) * 100


@given(geometries(max_kernel=4), st.integers(0, 99), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_data_free_pd_is_the_truncated_svd_of_every_output_channel(
    g: ConvGeometry, seed: int, rank: int
) -> None:
    """The paper, section 3, PD: slice o of the kernel is n_i × k²."""
    pd = nd.PointwiseDepthwise()
    rank = min(rank, pd.exact(g))
    dense = pd.fit(data_free_problem(g, seed), rank).dense()
    for found, slice_ in zip(dense, kernel(g, seed), strict=True):
        u, s, vt = np.linalg.svd(slice_.reshape(len(slice_), -1), full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(found.reshape(len(slice_), -1), expected, atol=1e-5)


def test_energy_is_averaged_over_the_slices_that_are_not_zero() -> None:
    """The authors' threshold: cumulative σ² of every slice, a dead slice counts for nothing."""
    g = ConvGeometry(6, 3, 1, 2)
    weight = np.zeros(g.weight_shape)
    weight[0, 0, 0, 0] = 2  # one term is all of slice 0
    weight[0, 1, 0, 0] = weight[1, 1, 0, 1] = 1  # half of slice 1; slice 2 is zero
    problem = Problem.data_free(g, weight, np.zeros(6))
    np.testing.assert_allclose(nd.DepthwisePointwise().energies(problem), [0.75, 1.0])


def test_groups_with_unequal_numbers_of_terms_are_refused() -> None:
    problem = data_free_problem(ConvGeometry(4, 4, 3, 3, groups=2), 0)
    with pytest.raises(ValueError, match="every group"):
        nd.fit(problem, np.array([1, 1, 2, 1]))


def test_dead_channels_do_no_harm() -> None:
    """A channel that is always constant has no metric; the fit stays finite and exact elsewhere."""
    problem = aware_problem(ConvGeometry(8, 6, 3, 3), 0, ridge=1e-6, dead=2)
    fitted = nd.fit(problem, np.full(6, 8))
    assert np.isfinite(fitted.dense()).all()
    assert error_of(problem, fitted) < 1e-4 * problem.moments.variance
