"""Convolutions as arrays: geometry, one plain convolution, and an ordered chain of them.

Shapes follow ONNX: images are (n, c, h, w), kernels (n_o, n_i / groups, kh, kw), pads are
(top, left, bottom, right). A MAC is one multiply-add; bias is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse

Array = NDArray[np.floating]
IntArray = NDArray[np.int64]
# (row, column) of every tap, dilation counted, → its matrix (n_o, n_i), sparse where it is mostly zeros
Taps = dict[tuple[int, int], Any]
SPARSE = 20  # times fewer numbers than places, from which on products with a sparse matrix are faster


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution without its weights."""

    n_o: int
    n_i: int
    kh: int
    kw: int
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.n_o, self.n_i, self.kh, self.kw, self.groups, *self.strides, *self.dilations) < 1:
            raise ValueError(f"sizes, strides, dilations and groups must be positive: {self}")
        if self.n_o % self.groups or self.n_i % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.n_i} → {self.n_o} channels")

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.n_o, self.n_i // self.groups, self.kh, self.kw)

    @property
    def unknowns(self) -> int:
        """Weights behind one output.

        >>> ConvGeometry(64, 32, 3, 3).unknowns
        288
        """
        return self.n_i // self.groups * self.kh * self.kw

    @property
    def is_depthwise(self) -> bool:
        return self.groups == self.n_i

    @property
    def is_pointwise(self) -> bool:
        return self.kh == self.kw == 1

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the output for an h × w input.

        >>> ConvGeometry(64, 32, 3, 3, strides=(2, 2), pads=(1, 1, 1, 1)).output_size(32, 48)
        (16, 24)
        """
        top, left, bottom, right = self.pads
        return (
            (h + top + bottom - self.dilations[0] * (self.kh - 1) - 1) // self.strides[0] + 1,
            (w + left + right - self.dilations[1] * (self.kw - 1) - 1) // self.strides[1] + 1,
        )

    def macs(self, h: int, w: int) -> int:
        """MACs for one image of h × w input pixels.

        >>> ConvGeometry(64, 32, 3, 3, pads=(1, 1, 1, 1)).macs(10, 10)
        1843200
        """
        return math.prod((*self.weight_shape, *self.output_size(h, w)))

    def windows(self, x: Array) -> Array:
        """View every receptive field: (n, c, h, w) → (n, c, h_o, w_o, kh, kw).

        >>> ConvGeometry(1, 1, 1, 2).windows(np.array([[[[1, 2, 3]]]])).tolist()
        [[[[[[1, 2]], [[2, 3]]]]]]
        """
        top, left, bottom, right = self.pads
        if any(self.pads):
            x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        (sh, sw), (dh, dw) = self.strides, self.dilations
        span = (dh * (self.kh - 1) + 1, dw * (self.kw - 1) + 1)
        return sliding_window_view(x, span, axis=(2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]

    def patches(self, x: Array, positions: IntArray) -> Array:
        """Gather the receptive fields of some output positions, without unfolding the rest.

        ``positions`` (n, p) are flat output positions per image; the result is
        (n·p, groups, n_i / groups · kh · kw), in the order of a kernel's own axes.
        """
        windows = self.windows(x)
        n, p = positions.shape
        rows, cols = np.divmod(positions, windows.shape[3])
        picked = windows[np.arange(n)[:, None], :, rows, cols]  # (n, p, c, kh, kw)
        return picked.reshape(n * p, self.groups, -1)


@dataclass(frozen=True)
class ConvStage:
    """One plain convolution, optionally of a selection of its input's channels.

    ``channels`` (geometry.n_i,) lists the input channels it reads, in order and possibly more than
    once; None reads all of them as they come.
    """

    geometry: ConvGeometry
    weight: Array  # (n_o, n_i / groups, kh, kw)
    channels: IntArray | None = None

    def __post_init__(self) -> None:
        if self.weight.shape != self.geometry.weight_shape:
            raise ValueError(f"weight {self.weight.shape} does not fit {self.geometry.weight_shape}")

    @property
    def reads(self) -> IntArray:
        """The one input channel that each filter of a depthwise stage reads, (n_o,).

        >>> ConvStage(ConvGeometry(4, 2, 1, 1, groups=2), np.ones((4, 1, 1, 1))).reads.tolist()
        [0, 0, 1, 1]
        """
        return self.sources[:, 0]

    def is_separable_with(self, other: ConvStage) -> bool:
        """Whether this is a depthwise stage and ``other`` the pointwise one behind it: one fused operator."""
        g, pointwise = self.geometry, other.geometry
        plain = ConvGeometry(pointwise.n_o, pointwise.n_i, 1, 1, groups=pointwise.groups)
        return g.is_depthwise and other.channels is None and pointwise == plain

    def __call__(self, x: Array) -> Array:
        """Convolve (n, c, h, w) in NumPy: the reference for every runtime."""
        g = self.geometry
        if self.channels is not None:
            x = x[:, self.channels]
        windows = g.windows(x)
        n, _, h, w = windows.shape[:4]
        windows = windows.reshape(n, g.groups, -1, h, w, g.kh, g.kw)
        weight = self.weight.reshape(g.groups, -1, *self.weight.shape[1:])  # (groups, n_o/g, n_i/g, kh, kw)
        out: Array = np.einsum("ngchwij,gocij->ngohw", windows, weight, optimize=True)
        return out.reshape(n, g.n_o, h, w)

    def dense(self, n_i: int) -> Array:
        """Write the stage as one ungrouped, undilated kernel over all ``n_i`` channels of its input."""
        g = self.geometry
        kernel = np.zeros((g.n_o, n_i, g.dilations[0] * (g.kh - 1) + 1, g.dilations[1] * (g.kw - 1) + 1))
        taps = kernel[:, :, :: g.dilations[0], :: g.dilations[1]]
        np.add.at(taps, (np.arange(g.n_o)[:, None], self.sources), self.weight)
        return kernel

    def taps(self, n_i: int) -> Taps:
        """The kernel by its taps, matrices (n_o, n_i) over all channels of the input."""
        g, d = self.geometry, self.geometry.dilations
        return {(i * d[0], j * d[1]): self._tap(n_i, i, j) for i, j in np.ndindex(g.kh, g.kw)}

    def _tap(self, n_i: int, i: int, j: int) -> Any:
        g = self.geometry
        weight = self.weight[:, :, i, j].astype(np.float64)
        rows = np.arange(g.n_o)[:, None]
        if SPARSE * weight.shape[1] < n_i:
            rows = rows.repeat(weight.shape[1], axis=1)
            return csr_array((weight.ravel(), (rows.ravel(), self.sources.ravel())), (g.n_o, n_i))
        if g.groups == 1 and self.channels is None:
            return weight
        matrix = np.zeros((g.n_o, n_i))
        np.add.at(matrix, (rows, self.sources), weight)
        return matrix

    @property
    def sources(self) -> IntArray:
        """The input channels that each output reads: (n_o, n_i / groups)."""
        g = self.geometry
        channels = np.arange(g.n_i) if self.channels is None else self.channels
        return channels.reshape(g.groups, -1).repeat(g.n_o // g.groups, axis=0)


@dataclass(frozen=True)
class Structure:
    """A factorization without its weights: the stages, and the channels that each reads."""

    geometry: ConvGeometry
    stages: tuple[ConvGeometry, ...]
    channels: tuple[IntArray | None, ...]  # per stage, as in `ConvStage`

    @classmethod
    def of(cls, geometry: ConvGeometry, *stages: ConvGeometry) -> Structure:
        """A structure whose stages read all channels."""
        return cls(geometry, stages, (None,) * len(stages))

    def macs(self, h: int, w: int) -> int:
        """MACs of all stages for one image of h × w input pixels."""
        total = 0
        for stage in self.stages:
            total += stage.macs(h, w)
            h, w = stage.output_size(h, w)
        return total

    @property
    def parameters(self) -> int:
        """Number of weights, and of biases at the end.

        >>> conv = ConvGeometry(64, 32, 3, 3)
        >>> Structure.of(conv, ConvGeometry(32, 32, 3, 3, groups=32), ConvGeometry(64, 32, 1, 1)).parameters
        2400
        """
        return sum(math.prod(stage.weight_shape) for stage in self.stages) + self.geometry.n_o

    @property
    def reads_all(self) -> bool:
        """Whether no input channel is left out."""
        channels = self.channels[0]
        return channels is None or np.unique(channels).size == self.geometry.n_i


@dataclass(frozen=True)
class Factorization:
    """A chain of stages, and one bias at its end, that stands for one convolution of ``geometry``."""

    geometry: ConvGeometry
    stages: tuple[ConvStage, ...]
    bias: Array | None = None  # (n_o,)

    @classmethod
    def whole(cls, geometry: ConvGeometry, weight: Array, bias: Array | None = None) -> Factorization:
        """The convolution itself, as a chain of one stage.

        >>> triple = Factorization.whole(ConvGeometry(1, 1, 1, 1), np.full((1, 1, 1, 1), 3.0))
        >>> triple(np.ones((1, 1, 1, 1))).item()
        3.0
        """
        return cls(geometry, (ConvStage(geometry, weight),), bias)

    def __call__(self, x: Array) -> Array:
        """Run the chain on (n, n_i, h, w) in NumPy."""
        for stage in self.stages:
            x = stage(x)
        return x if self.bias is None else x + self.bias[:, None, None]

    def dense(self) -> Array:
        """Compose the stages back into the one kernel (n_o, n_i / groups, kh, kw) they stand for."""
        g = self.geometry
        first, *rest = self.stages
        taps, step, n = first.taps(g.n_i), first.geometry.strides, first.geometry.n_o
        for stage in rest:
            taps = _composed(taps, stage.taps(n), step)
            step = (step[0] * stage.geometry.strides[0], step[1] * stage.geometry.strides[1])
            n = stage.geometry.n_o
        kernel = np.zeros((g.groups, g.n_o // g.groups, g.n_i // g.groups, g.kh, g.kw))
        for (i, j), tap in taps.items():
            matrix = tap.toarray() if issparse(tap) else tap
            blocks = matrix.reshape(g.groups, kernel.shape[1], g.groups, -1)
            for group in range(g.groups):
                kernel[group, :, :, i // g.dilations[0], j // g.dilations[1]] = blocks[group, :, group]
        return kernel.reshape(g.weight_shape)

    @property
    def structure(self) -> Structure:
        """The stages without their weights."""
        stages = self.stages
        return Structure(self.geometry, tuple(s.geometry for s in stages), tuple(s.channels for s in stages))

    def macs(self, h: int, w: int) -> int:
        """MACs of all stages for one image of h × w input pixels."""
        return self.structure.macs(h, w)

    @property
    def is_separable(self) -> bool:
        """Whether this is a depthwise stage and then a pointwise one, as one fused operator computes them."""
        if len(self.stages) != 2 or not self.stages[0].is_separable_with(self.stages[1]):
            return False
        g, (first, last) = self.geometry, (stage.geometry for stage in self.stages)
        same = first == replace(g, n_o=first.n_o, n_i=first.n_i, groups=first.groups)
        return same and (last.n_o, last.groups) == (g.n_o, g.groups)

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum(s.weight.size for s in self.stages) + (0 if self.bias is None else self.bias.size)

    def astype(self, dtype: np.typing.DTypeLike) -> Factorization:
        """Cast weights and bias, with the largest weight of every filter near 1, except in the last stage.

        Fits do not determine which stage a factor goes to: where inputs hardly vary, the weights of one stage
        are huge and those of the next tiny, beyond the range of float32. Powers of two are moved from stage
        to stage, which rounds nothing.
        """
        weights = [stage.weight for stage in self.stages]
        for i, following in enumerate(self.stages[1:]):
            _, exponent = np.frexp(np.abs(weights[i]).max(axis=(1, 2, 3)))
            weights[i] = np.ldexp(weights[i], -exponent[:, None, None, None])
            weights[i + 1] = np.ldexp(weights[i + 1], exponent[following.sources][:, :, None, None])
        stages = (replace(s, weight=w.astype(dtype)) for s, w in zip(self.stages, weights, strict=True))
        bias = None if self.bias is None else self.bias.astype(dtype)
        return replace(self, stages=tuple(stages), bias=bias)


def spread(geometry: ConvGeometry, weight: Array, bias: Array | None) -> Factorization:
    """Write a convolution (n_o, n_i / groups, kh, kw) as a separable one: full rank, no arithmetic.

    Each depthwise filter picks one pixel, and the pointwise stage holds the weights.

    >>> weight = np.arange(8.0).reshape(1, 2, 2, 2)
    >>> separable = spread(ConvGeometry(1, 2, 2, 2), weight, None)
    >>> separable.is_separable, np.array_equal(separable.dense(), weight)
    (True, True)
    """
    g = geometry
    taps = g.kh * g.kw
    rows = g.n_i * taps
    depthwise = ConvGeometry(rows, rows, g.kh, g.kw, g.strides, g.pads, g.dilations, rows)
    pointwise = ConvGeometry(g.n_o, rows, 1, 1, groups=g.groups)
    picks = np.tile(np.eye(taps, dtype=weight.dtype).reshape(taps, 1, g.kh, g.kw), (g.n_i, 1, 1, 1))
    stages = (
        ConvStage(depthwise, picks, np.arange(g.n_i).repeat(taps)),
        ConvStage(pointwise, weight.reshape(pointwise.weight_shape)),
    )
    return Factorization(g, stages, bias)


def _composed(first: Taps, second: Taps, step: Sequence[int]) -> Taps:
    """Compose kernels by their taps: apply ``first`` with stride ``step``, then ``second``."""
    out: Taps = {}
    for (i, j), outer in second.items():
        for (y, x), inner in first.items():
            at = i * step[0] + y, j * step[1] + x
            product = outer @ inner
            out[at] = out[at] + product if at in out else product
    return out


def placeholder(structure: Structure, seed: int = 0) -> Factorization:
    """Make a factorization of some structure with random weights."""
    rng = np.random.default_rng(seed)
    stages = []
    for g, channels in zip(structure.stages, structure.channels, strict=True):
        weight = rng.standard_normal(g.weight_shape, np.float32) / np.float32(np.sqrt(g.unknowns))
        stages.append(ConvStage(g, weight, channels))
    return Factorization(structure.geometry, tuple(stages), np.zeros(structure.geometry.n_o, np.float32))
