"""Moments, held against NumPy on all samples at once."""

from __future__ import annotations

import doctest
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netdecouple import moments
from netdecouple.moments import Moments


def samples(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 2, 5)) * rng.uniform(0.1, 10, 5) + rng.uniform(-50, 50, (2, 5))
    y = x @ rng.standard_normal((5, 3)) + rng.standard_normal((n, 2, 3)) + 7
    return x, y


def assert_equal(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    for name in ("mean_x", "mean_y", "gram", "cross", "power"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-7, err_msg=name)


def test_moments_are_means_and_centred_sums() -> None:
    x, y = samples(40)
    m = Moments.of(x, y)
    for g in range(2):
        np.testing.assert_allclose(m.mean_x[g], x[:, g].mean(0))
        np.testing.assert_allclose(m.gram[g] / 39, np.cov(x[:, g].T))
        np.testing.assert_allclose(m.cross[g] / 39, np.cov(y[:, g].T, x[:, g].T)[:3, 3:])
        np.testing.assert_allclose(m.power[g] / 39, y[:, g].var(0, ddof=1))
    np.testing.assert_allclose(m.variance, y.var(0).sum())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_batches_add_up_to_the_whole(sizes: list[int]) -> None:
    x, y = samples(sum(sizes))
    streamed = Moments.empty(2, 5, 3)
    start = 0
    for size in sizes:
        streamed.add(x[start : start + size].astype(np.float64), y[start : start + size])
        start += size
    assert_equal(streamed, Moments.of(x, y))


def test_float32_samples_are_summed_in_float64() -> None:
    """A mean a thousand times the spread leaves float32 no digits for the sums of squares."""
    rng = np.random.default_rng(0)
    x, y = ((rng.standard_normal((2000, 1, d)) + 1000).astype(np.float32) for d in (3, 2))
    assert_equal(Moments.of(x, y), Moments.of(x.astype(np.float64), y.astype(np.float64)))


def test_the_error_of_one_sample_is_its_squared_residual() -> None:
    moments = Moments.of(np.ones((1, 1, 2)), np.full((1, 1, 1), 5.0))
    once = replace(moments, gram=np.eye(2)[None], cross=np.zeros((1, 1, 2)))  # as of white pseudo-samples
    assert moments.mean_squared_error(np.ones((1, 1, 2)), np.zeros((1, 1))) == 9.0
    assert once.mean_squared_error(np.ones((1, 1, 2)), np.zeros((1, 1))) == 2.0 + 9.0
    assert replace(once, count=2).mean_squared_error(np.ones((1, 1, 2)), np.zeros((1, 1))) == 1.0 + 9.0


def test_shards_add_up_to_the_whole_and_stay_as_they_are() -> None:
    x, y = samples(30)
    a, b = Moments.of(x[:11], y[:11]), Moments.of(x[11:], y[11:])
    before = b.gram.copy()
    a.absorb(b)
    assert_equal(a, Moments.of(x, y))
    np.testing.assert_array_equal(b.gram, before)
    a.absorb(Moments.empty(2, 5, 3))
    assert_equal(a, Moments.of(x, y))


@pytest.mark.parametrize("scale", [1e-42, 1.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_float32_of_any_size_is_summed_without_loss(scale: float, offset: float) -> None:
    """Denormal, huge, or far from zero: as two passes over the same numbers in float64 have it."""
    x, y = (np.float32((v + offset) * scale) for v in samples(200))
    streamed = Moments.empty(2, 5, 3)
    for start in range(0, 200, 7):
        streamed.add(x[start : start + 7], y[start : start + 7])
    wide = x.astype(np.float64)
    centred = wide - wide.mean(0)
    expected = np.einsum("ngi,ngj->gij", centred, centred)
    np.testing.assert_allclose(streamed.gram, expected, rtol=1e-9, atol=1e-9 * expected.max())
    np.testing.assert_allclose(streamed.mean_x, wide.mean(0), rtol=1e-12)


def test_inputs_that_tell_nothing_new_are_counted() -> None:
    """Constant ones, copies, sums of others; and all that are more than the samples."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 2, 6)).astype(np.float32)
    y = np.zeros((60, 2, 3))
    assert Moments.of(x, y).dependent == 0
    x[:, 0, 1] = 3
    x[:, 1, 2], x[:, 1, 5] = x[:, 1, 0], x[:, 1, 3] - 1e4 * x[:, 1, 4]
    assert Moments.of(x, y).dependent == 3
    assert Moments.of(x[:5, :1], y[:5, :1]).dependent == 2
    assert Moments.of(0 * x, y).dependent == Moments.empty(2, 6, 3).dependent == 12


def test_error_is_the_mean_squared_residual() -> None:
    x, y = samples(50)
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3))
    residual = y - np.einsum("ngd,gmd->ngm", x, weight) - bias
    assert Moments.of(x, y).mean_squared_error(weight, bias) == pytest.approx(
        np.square(residual).sum((1, 2)).mean()
    )


def test_the_best_bias_brings_the_mean_residual_to_zero() -> None:
    x, y = samples(50)
    m = Moments.of(x, y)
    weight = np.random.default_rng(1).standard_normal((2, 3, 5))
    residual = y - np.einsum("ngd,gmd->ngm", x, weight) - m.bias(weight)
    np.testing.assert_allclose(residual.mean(0), 0, atol=1e-9)


def test_a_linear_target_needs_no_targets_to_be_seen() -> None:
    x, y = samples(50)
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3))
    y = np.einsum("ngd,gmd->ngm", x, weight) + bias
    assert_equal(Moments.of(x, y * 0).with_linear_target(weight, bias), Moments.of(x, y))


def test_examples_in_docstrings_give_what_they_print() -> None:
    assert doctest.testmod(moments).failed == 0


def test_a_weight_counts_as_so_many_samples() -> None:
    rng = np.random.default_rng(0)
    x, y, times = rng.standard_normal((6, 2, 3)), rng.standard_normal((6, 2, 4)), np.array([1, 3, 2, 1, 1, 2])
    weighted, repeated = (
        Moments.of(x, y, times.astype(float)),
        Moments.of(x.repeat(times, 0), y.repeat(times, 0)),
    )
    for field in ("count", "mean_x", "mean_y", "gram", "cross", "power"):
        np.testing.assert_allclose(
            getattr(weighted, field), getattr(repeated, field), atol=1e-12, err_msg=field
        )
