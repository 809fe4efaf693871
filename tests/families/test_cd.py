"""CD: the family tests, and that it is reduced-rank regression."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry
from netdecouple.families.cd import ChannelDecomposition
from tests.families.base import OneFamilyTests, aware_problem, data_free_problem
from tests.strategies import kernel


class TestChannelDecomposition(OneFamilyTests):
    family = ChannelDecomposition()


@pytest.mark.parametrize("g", [ConvGeometry(10, 4, 3, 3), ConvGeometry(40, 6, 1, 1)])
def test_data_free_fit_is_the_truncated_svd_of_the_kernel(g: ConvGeometry) -> None:
    """Whether there are more outputs than unknowns or fewer."""
    found = ChannelDecomposition().fit(data_free_problem(g, 0), 4).dense().reshape(g.n_o, -1)
    u, s, vt = np.linalg.svd(kernel(g, 0).reshape(g.n_o, -1), full_matrices=False)
    np.testing.assert_allclose(found, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-10)


@pytest.mark.parametrize("g", [ConvGeometry(8, 5, 3, 3), ConvGeometry(30, 5, 1, 1)])
def test_no_kernel_of_the_same_rank_is_better(g: ConvGeometry) -> None:
    """Reduced-rank regression is a global optimum: small steps within the rank only lose."""
    problem = aware_problem(g, 0)
    best = ChannelDecomposition().fit(problem, 3)
    error = problem.squared_error(best)
    narrow, wide = (stage.weight for stage in best.stages)
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = narrow + 1e-2 * rng.standard_normal(narrow.shape)
        turned = wide + 1e-2 * rng.standard_normal(wide.shape)
        dense = np.einsum("or,rikl->oikl", turned[:, :, 0, 0], moved).reshape(problem.weight.shape)
        assert (
            problem.moments.mean_squared_error(dense, problem.moments.bias(dense)) * problem.moments.count
            > error
        )


@pytest.mark.parametrize("g", [ConvGeometry(9, 4, 3, 2), ConvGeometry(60, 18, 1, 1, groups=2)])
def test_the_curve_is_exact(g: ConvGeometry) -> None:
    problem = aware_problem(g, 3)
    family = ChannelDecomposition()
    for size in range(1, 10):
        expected = problem.relative_error(family.fit(problem, size))
        assert family.curve(problem)[size] == pytest.approx(expected, abs=1e-9)


def test_a_pointwise_layer_becomes_two_of_low_rank() -> None:
    g = ConvGeometry(16, 12, 1, 1, strides=(2, 2))
    fitted = ChannelDecomposition().fit(aware_problem(g, 0), 5)
    assert [s.geometry.weight_shape for s in fitted.stages] == [(5, 12, 1, 1), (16, 5, 1, 1)]
    assert [s.geometry.strides for s in fitted.stages] == [(2, 2), (1, 1)]
