"""Hypothesis strategies, in one place."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from netdecouple.convolution import ConvGeometry


@st.composite
def geometries(draw: st.DrawFn, max_kernel: int = 7, max_channels: int = 4) -> ConvGeometry:
    """Any 2-D convolution: kernel 1–7 each side, strides, all four pads, dilations, groups."""
    groups = draw(st.integers(1, 3))
    side = st.integers(1, max_kernel)
    small = st.integers(1, 3)
    return ConvGeometry(
        n_o=groups * draw(st.integers(1, max_channels)),
        n_i=groups * draw(st.integers(1, max_channels)),
        kh=draw(side),
        kw=draw(side),
        strides=(draw(small), draw(small)),
        pads=tuple(draw(st.integers(0, 3)) for _ in range(4)),
        dilations=(draw(small), draw(small)),
        groups=groups,
    )


def kernel(geometry: ConvGeometry, seed: int) -> np.ndarray:
    """A random kernel (n_o, n_i / groups, kh, kw)."""
    return np.random.default_rng(seed).standard_normal(geometry.weight_shape)


def images(geometry: ConvGeometry, seed: int, count: int = 2, extra: int = 4) -> np.ndarray:
    """Random images (n, n_i, h, w), large enough for the kernel even without padding."""
    h = geometry.dilations[0] * (geometry.kh - 1) + 1 + extra
    w = geometry.dilations[1] * (geometry.kw - 1) + 1 + extra
    return np.random.default_rng(seed + 1).standard_normal((count, geometry.n_i, h, w))
