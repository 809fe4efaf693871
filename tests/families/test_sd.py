"""SD: the family tests, and what conjugate gradients add to the closed form."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from netdecouple.convolution import ConvGeometry
from netdecouple.families.base import FitOptions
from netdecouple.families.sd import SpatialDecomposition
from tests.families.base import OneFamilyTests, aware_problem, data_free_problem
from tests.strategies import kernel


class TestSpatialDecomposition(OneFamilyTests):
    family = SpatialDecomposition()


def test_data_free_fit_is_the_truncated_svd_of_the_unfolded_kernel() -> None:
    """Jaderberg et al., scheme 2: (n_i · kh) × (n_o · kw)."""
    g = ConvGeometry(6, 4, 3, 5)
    found = SpatialDecomposition().fit(data_free_problem(g, 0), 5).dense()
    unfolded = kernel(g, 0).transpose(1, 2, 0, 3).reshape(12, 30)
    u, s, vt = np.linalg.svd(unfolded, full_matrices=False)
    expected = ((u[:, :5] * s[:5]) @ vt[:5]).reshape(4, 3, 6, 5).transpose(2, 0, 1, 3)
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_refinement_improves_on_the_closed_form_and_never_rises() -> None:
    problem = aware_problem(ConvGeometry(16, 12, 3, 3), 0)
    errors = [
        problem.squared_error(SpatialDecomposition(FitOptions(rounds=n)).fit(problem, 10)) for n in range(4)
    ]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors)), errors
    assert errors[-1] < 0.97 * errors[0]


def test_strides_pads_and_dilations_are_shared_between_the_stages() -> None:
    g = ConvGeometry(6, 4, 3, 5, (2, 3), (1, 2, 0, 4), (2, 1))
    rows, columns = SpatialDecomposition().structure(g, 7).stages
    assert (rows.kh, rows.kw, rows.strides, rows.pads, rows.dilations) == (3, 1, (2, 1), (1, 0, 0, 0), (2, 1))
    assert (columns.kh, columns.kw, columns.strides, columns.pads) == (1, 5, (1, 3), (0, 2, 0, 4))
