"""The operator on NumPy arrays, and what is said where it is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.errors import UnavailableError
from tests.kernels.cases import separable

built = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
GEOMETRY = ConvGeometry(5, 4, 3, 3, pads=(1, 1, 1, 1))


def layer(g: ConvGeometry = GEOMETRY) -> Factorization:
    return separable(g, np.array([[0, 0, 1, 3]]), np.random.default_rng(0))


@built
def test_a_nan_reaches_what_sees_it_and_nothing_else() -> None:
    """Neither borders nor limits hide or spread it, and a channel of rank 0 is not read."""
    x = np.random.default_rng(1).standard_normal((2, 4, 9, 11), np.float32)
    x[0, 1, 4, 10] = x[1, 0, 0, 0] = x[1, 2] = np.nan
    y = kernels.DecoupledConv(layer(), limits=(0, 6))(x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(layer()(x.astype(np.float64))))
    assert np.isnan(y).sum() == 5 * (6 + 4)


@built
def test_any_dtype_and_layout_of_the_input_is_taken() -> None:
    """float64, and views that are not contiguous, are copied."""
    x = np.random.default_rng(1).standard_normal((9, 11, 4, 2)).T
    np.testing.assert_allclose(kernels.DecoupledConv(layer())(x), layer()(x), atol=1e-5)


@built
def test_without_images_there_is_no_output() -> None:
    assert kernels.DecoupledConv(layer())(np.zeros((0, 4, 5, 6), np.float32)).shape == (0, 5, 5, 6)


@built
@pytest.mark.parametrize(
    ("shape", "residual", "message"),
    [
        ((4, 5, 6), None, r"input has shape \(4, 5, 6\), not \(n, 4, h, w\)"),
        ((1, 3, 5, 6), None, r"input has shape \(1, 3, 5, 6\)"),
        ((1, 4, 0, 6), None, "0×6 is smaller than the kernel"),
        ((1, 4, 5, 6), (1, 5, 5, 5), r"residual has shape \(1, 5, 5, 5\), not \(1, 5, 5, 6\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape, residual, message) -> None:
    fused = kernels.DecoupledConv(layer())
    with pytest.raises(ValueError, match=f"DecoupledConv: .*{message}"):
        fused(np.zeros(shape, np.float32), None if residual is None else np.zeros(residual, np.float32))


@built
def test_layers_that_cannot_be_fused_are_refused() -> None:
    """One stage; a slope, bias, channels or kernel that do not fit the layer; limits that are no numbers."""
    good = layer()
    with pytest.raises(ValueError, match="only a depthwise stage and a pointwise one"):
        kernels.DecoupledConv(Factorization(GEOMETRY, (ConvStage(GEOMETRY, np.zeros((5, 4, 3, 3))),)))
    with pytest.raises(ValueError, match=r"slope has shape \(4,\)"):
        kernels.DecoupledConv(good, slope=np.ones(4))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\)"):
        kernels.DecoupledConv(replace(good, bias=np.ones(4)))
    outside = replace(good.stages[0], channels=np.array([0, 1, 2, 4]))
    with pytest.raises(ValueError, match="channel"):
        kernels.DecoupledConv(replace(good, stages=(outside, good.stages[1])))
    with pytest.raises(ValueError, match="only a depthwise stage and a pointwise one"):
        kernels.DecoupledConv(replace(good, geometry=replace(GEOMETRY, kh=5)))
    with pytest.raises(ValueError, match="minimum and maximum"):
        kernels.DecoupledConv(good, limits=(np.nan, 1))


def test_where_it_was_not_built_that_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In one line that tells what to do, and before anything is computed."""
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    kernels._library.cache_clear()
    assert not kernels.available()
    for attempt in (
        lambda: kernels.register(ort.SessionOptions()),
        kernels.level,
        lambda: kernels.DecoupledConv(layer()),
    ):
        with pytest.raises(UnavailableError, match=r"not built.*install a C\+\+ compiler") as caught:
            attempt()
        assert "\n" not in str(caught.value)
