"""Convolutions as arrays, held against SciPy's correlation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method
from tests.strategies import geometries, images, kernel


def reference(g: ConvGeometry, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The definition, channel by channel, with zero-stuffed kernels."""
    top, left, bottom, right = g.pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (sh, sw), (dh, dw) = g.strides, g.dilations
    out = []
    for image in x:
        maps = []
        for o in range(g.n_o):
            group = o // (g.n_o // g.groups)
            total = 0
            for i in range(g.n_i // g.groups):
                stuffed = np.zeros((dh * (g.kh - 1) + 1, dw * (g.kw - 1) + 1))
                stuffed[::dh, ::dw] = weight[o, i]
                total = (
                    total + correlate2d(image[group * (g.n_i // g.groups) + i], stuffed, "valid")[::sh, ::sw]
                )
            maps.append(total)
        out.append(maps)
    return np.array(out)


@given(geometries(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_stage_is_the_convolution_it_says(g: ConvGeometry, seed: int) -> None:
    weight, x = kernel(g, seed), images(g, seed)
    np.testing.assert_allclose(ConvStage(g, weight)(x), reference(g, weight, x), atol=1e-10)


@given(geometries(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_patches_times_kernel_are_the_outputs_at_their_positions(g: ConvGeometry, seed: int) -> None:
    weight, x = kernel(g, seed), images(g, seed)
    h, w = g.output_size(*x.shape[2:])
    positions = np.random.default_rng(seed).integers(0, h * w, (len(x), 5))
    patches = g.patches(x, positions)
    assert patches.shape == (len(x) * 5, g.groups, g.n_i // g.groups * g.kh * g.kw)
    found = np.einsum("ngd,gmd->ngm", patches, weight.reshape(g.groups, g.n_o // g.groups, -1)).reshape(
        -1, g.n_o
    )
    outputs = ConvStage(g, weight)(x).reshape(len(x), g.n_o, -1)
    expected = np.concatenate([o[:, p].T for o, p in zip(outputs, positions, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-10)


@given(geometries(), geometries(max_kernel=3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_dense_composes_any_chain_without_inner_padding(
    first: ConvGeometry, second: ConvGeometry, seed: int
) -> None:
    """Strides and dilations of the first stage multiply into the second's taps."""
    groups = second.groups
    middle = first.n_o * groups
    first = ConvGeometry(middle, first.n_i, first.kh, first.kw, first.strides, groups=1)
    second = ConvGeometry(
        groups * 2, middle, second.kh, second.kw, second.strides, dilations=(1, 1), groups=groups
    )
    stages = (ConvStage(first, kernel(first, seed)), ConvStage(second, kernel(second, seed + 1)))
    kh = first.kh + first.strides[0] * (second.kh - 1)
    kw = first.kw + first.strides[1] * (second.kw - 1)
    strides = tuple(a * b for a, b in zip(first.strides, second.strides, strict=True))
    whole = ConvGeometry(second.n_o, first.n_i, kh, kw, strides)
    bias = np.arange(second.n_o, dtype=float)
    chain = Factorization(whole, stages, bias)
    x = images(whole, seed)
    expected = ConvStage(whole, chain.dense())(x) + bias[:, None, None]
    np.testing.assert_allclose(chain(x), expected, atol=1e-9)


def test_a_stage_may_read_channels_in_any_order_and_more_than_once() -> None:
    g = ConvGeometry(2, 3, 1, 1)
    stage = ConvStage(g, np.array([[1.0, 10, 100], [0, 1, 0]])[:, :, None, None], np.array([1, 1, 0]))
    x = np.array([2.0, 3])[None, :, None, None]
    np.testing.assert_array_equal(stage(x).ravel(), [3 + 30 + 200, 3])
    np.testing.assert_array_equal(stage.dense(2)[:, :, 0, 0], [[100, 11], [0, 1]])


def test_macs_count_multiply_adds_at_the_output_resolution() -> None:
    g = ConvGeometry(128, 64, 3, 3, strides=(2, 2), pads=(1, 1, 1, 1))
    assert g.output_size(56, 56) == (28, 28)
    assert g.macs(56, 56) == 128 * 64 * 9 * 28 * 28
    assert ConvGeometry(64, 64, 3, 3, pads=(1, 1, 1, 1), groups=64).macs(8, 8) == 64 * 9 * 64


def test_a_factorization_counts_every_stage_and_one_bias() -> None:
    g = ConvGeometry(8, 4, 3, 3, strides=(2, 2), pads=(1, 1, 1, 1))
    depthwise = ConvGeometry(6, 6, 3, 3, (2, 2), (1, 1, 1, 1), groups=6)
    pointwise = ConvGeometry(8, 6, 1, 1)
    channels = np.array([0, 0, 1, 2, 3, 3])
    stages = (
        ConvStage(depthwise, kernel(depthwise, 0), channels),
        ConvStage(pointwise, kernel(pointwise, 1)),
    )
    both = Factorization(g, stages, np.zeros(8))
    assert both.macs(8, 8) == (6 * 9 + 6 * 8) * 16
    assert both.parameters == 6 * 9 + 6 * 8 + 8
    assert {s.weight.dtype for s in both.astype(np.float32).stages} == {np.dtype(np.float32)}


def test_a_depthwise_stage_and_the_pointwise_one_behind_it_are_separable() -> None:
    """Also with a channel multiplier and groups; not with a selection between them, or any other kernel."""
    depthwise = ConvGeometry(6, 3, 3, 3, groups=3)
    first = ConvStage(depthwise, kernel(depthwise, 0), np.array([0, 0, 1]))
    for g, channels, separable in (
        (ConvGeometry(5, 6, 1, 1), None, True),
        (ConvGeometry(4, 6, 1, 1, groups=2), None, True),
        (ConvGeometry(5, 6, 1, 1), np.arange(6), False),
        (ConvGeometry(10, 5, 1, 1, groups=5), np.arange(5), False),  # 5 groups, and 6 channels before them
        (ConvGeometry(5, 6, 1, 3), None, False),
        (ConvGeometry(5, 6, 1, 1, strides=(2, 1)), None, False),
    ):
        assert first.is_separable_with(ConvStage(g, kernel(g, 0), channels)) is separable
    dense = ConvGeometry(6, 3, 3, 3)
    pointwise = ConvGeometry(5, 6, 1, 1)
    assert not ConvStage(dense, kernel(dense, 0)).is_separable_with(
        ConvStage(pointwise, kernel(pointwise, 0))
    )


def test_a_factorization_is_separable_if_its_stages_are_and_fit_it() -> None:
    """The fused operator takes kernel, strides, pads, dilations and outputs from the whole layer."""
    g = ConvGeometry(5, 3, 3, 2, (2, 1), (1, 0, 1, 0))
    depthwise = replace(g, n_o=6, n_i=6, groups=6)
    pointwise = ConvGeometry(5, 6, 1, 1)
    stages = (
        ConvStage(depthwise, kernel(depthwise, 0), np.array([0, 0, 1, 1, 2, 2])),
        ConvStage(pointwise, kernel(pointwise, 0)),
    )
    assert Factorization(g, stages).is_separable
    assert not Factorization(g, stages[:1]).is_separable
    assert not Factorization(g, (*stages, stages[1])).is_separable
    for other in ({"kh": 5}, {"strides": (1, 1)}, {"pads": (0, 0, 0, 0)}, {"dilations": (2, 1)}, {"n_o": 6}):
        assert not Factorization(replace(g, **other), stages).is_separable


@pytest.mark.parametrize("bad", [{"groups": 3}, {"strides": (0, 1)}, {"n_o": 0}])
def test_impossible_geometries_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"groups|positive"):
        ConvGeometry(**({"n_o": 4, "n_i": 4, "kh": 3, "kw": 3} | bad))


def test_a_kernel_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        ConvStage(ConvGeometry(4, 4, 3, 3), np.zeros((4, 4, 3, 1)))


@given(
    geometries(max_kernel=3), st.integers(0, 99), st.sampled_from(["nd-dp", "nd-pd", "sd", "cd", "sd+nd-dp"])
)
@settings(max_examples=40, deadline=None)
def test_what_is_cast_is_balanced_first(g: ConvGeometry, seed: int, name: str) -> None:
    """A factor that one stage has too much of and the next too little is lost in neither."""
    chosen = method(name)
    problem = Problem.data_free(g, kernel(g, seed), np.zeros(g.n_o))
    fitted, _ = chosen.fit(problem, [Step(size) for size in chosen.exact(g)])
    assume(len(fitted.stages) > 1)
    first, second, *rest = fitted.stages
    factor = 2.0 ** np.random.default_rng(seed).integers(-200, 200, len(first.weight))
    skewed = (
        replace(first, weight=first.weight * factor[:, None, None, None]),
        replace(second, weight=second.weight / factor[second.sources][:, :, None, None]),
    )
    plain, cast = fitted.astype(np.float32), replace(fitted, stages=(*skewed, *rest)).astype(np.float32)
    assert all(np.abs(s.weight).max() < 1e3 for s in cast.stages)
    for a, b in zip(plain.stages, cast.stages, strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)
    scale = np.abs(fitted.dense()).max()
    np.testing.assert_allclose(cast.dense() / scale, fitted.dense() / scale, atol=1e-5)
