"""Random layers for the fused operator, and what they compute, in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from netdecouple import kernels
from netdecouple.convolution import Array, ConvGeometry, ConvStage, Factorization

COUNT = 600
TOLERANCE = 1e-5  # relative to the largest output before it is clipped


@dataclass(frozen=True)
class Case:
    """A layer and an input for it, all float32."""

    factorization: Factorization
    x: Array
    slope: Array | None
    limits: tuple[float, float]
    residual: Array | None

    def expected(self) -> tuple[Array, float]:
        """What the layer puts out, in float64, and how large that is before it is clipped."""
        y = self.factorization.astype(np.float64)(self.x.astype(np.float64))
        if self.residual is not None:
            y = y + self.residual
        if self.slope is not None:
            y = np.where(y < 0, y * self.slope[:, None, None], y)
        return np.clip(y, *self.limits), float(np.abs(y).max(initial=1e-30))


def separable(g: ConvGeometry, rows: np.ndarray, rng: np.random.Generator) -> Factorization:
    """A random factorization whose depthwise rows read these channels (groups, rows)."""
    terms = rows.size
    depthwise = ConvGeometry(terms, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, terms)
    pointwise = ConvGeometry(g.n_o, terms, 1, 1, groups=g.groups)
    first, second = (rng.standard_normal(part.weight_shape, np.float32) for part in (depthwise, pointwise))
    stages = (ConvStage(depthwise, first, rows.ravel()), ConvStage(pointwise, second))
    return Factorization(g, stages, rng.standard_normal(g.n_o, np.float32))


def rows_of(ranks: list[int], groups: int, rng: np.random.Generator) -> np.ndarray:
    """Which channel every row reads (groups, sum of ranks); every group ranks its channels differently."""
    parts = [np.repeat(np.arange(len(ranks)), rng.permutation(ranks)) + g * len(ranks) for g in range(groups)]
    return np.stack(parts)


def case(seed: int) -> Case:
    """Any layer: each seed gives one, always the same."""
    rng = np.random.default_rng([2024, seed])

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    groups = draw(1, 4) if draw(0, 2) == 0 else 1
    inputs, outputs = draw(1, 5), draw(1, 20)
    ranks = [draw(0, 9) if draw(0, 3) == 0 else draw(0, 4) for _ in range(inputs)]
    if seed % 30 == 0:  # more rows and outputs than are computed at one time
        groups, inputs, outputs = draw(1, 2), 50, draw(40, 70)
        ranks = [draw(0, 8) for _ in range(inputs)]
    if not any(ranks):
        ranks[0] = draw(1, 9)
    kh, kw = draw(1, 7), draw(1, 7)
    strides, dilations = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 3))
    top, left, bottom, right = (draw(0, 3) if draw(0, 1) else draw(0, 12) for _ in range(4))
    if draw(0, 1):  # the output as wide as the input
        strides, span = (1, 1), dilations[1] * (kw - 1)
        left = span // 2 if draw(0, 2) else draw(0, span)
        right = span - left
    g = ConvGeometry(
        groups * outputs, groups * inputs, kh, kw, strides, (top, left, bottom, right), dilations, groups
    )
    smallest = [
        max(1, d * (k - 1) + 1 - p)
        for d, k, p in zip(dilations, (kh, kw), (top + bottom, left + right), strict=True)
    ]
    kind = draw(0, 5)
    extra = (0, 0) if kind == 0 else (draw(0, 3), draw(200, 500)) if kind == 1 else (draw(0, 20), draw(0, 40))
    if kind == 2:
        extra = (draw(60, 150), draw(0, 2))
    factorization = separable(g, rows_of(ranks, groups, rng)[:, rng.permutation(sum(ranks))], rng)
    h, w = smallest[0] + extra[0], smallest[1] + extra[1]
    n = draw(1, 3)
    x = rng.standard_normal((n, g.n_i, h, w), np.float32)
    slope = rng.standard_normal(g.n_o, np.float32) if draw(0, 1) else None
    residual = rng.standard_normal((n, g.n_o, *g.output_size(h, w)), np.float32) if draw(0, 1) else None
    low = [-np.inf, 0.0, float(rng.normal())][draw(0, 2)]
    high = [np.inf, 6.0, (low if np.isfinite(low) else 0.0) + 1][draw(0, 2)]
    return Case(factorization, x, slope, (low, high), residual)


def use_level(level: str) -> bool:
    """Let the operator use an instruction set; False if this processor does not have it."""
    return bool(ctypes.CDLL(str(kernels.library_path())).netdecouple_use_level(level.encode()))


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Use an instruction set for a while; the test is skipped where the processor does not have it."""
    before = kernels.level()
    if not use_level(level):
        pytest.skip(f"this processor has no {level}")
    assert kernels.level() == level
    yield
    use_level(before)


def check() -> Iterator[tuple[int, float]]:
    """Run the operator on every case and yield its number and relative error."""
    for seed in range(COUNT):
        one = case(seed)
        y = kernels.DecoupledConv(one.factorization, one.slope, one.limits)(one.x, one.residual)
        expected, scale = one.expected()
        assert y.shape == expected.shape
        error = np.abs(y - expected).max(initial=0) / scale
        yield seed, float("inf") if np.isnan(error) else float(error)
