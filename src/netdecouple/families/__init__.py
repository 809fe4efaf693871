"""Families of decompositions, one per file, all with one interface.

A family turns a `Problem` (one layer, and the moments of what it sees and should produce) into a
`Factorization`. A family never sees a network, a framework or an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import scipy.linalg
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.moments import Moments

Array = NDArray[np.floating]
TINY = np.finfo(float).tiny
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One convolution to approximate: min over Ŵ of Σ |y − Ŵx − b|² on the samples behind ``moments``."""

    geometry: ConvGeometry
    weight: Array  # (groups, m, d) float64, m = n_o / groups, d = n_i / groups · kh · kw
    moments: Moments
    white: bool = False  # the inputs are uncorrelated and alike: the metric is the identity
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: str, work: Callable[[], T]) -> T:
        """Do some work on this problem once, however many sizes ask for it."""
        if name not in self._known:
            self._known[name] = work()
        known: T = self._known[name]
        return known

    @classmethod
    def of(cls, geometry: ConvGeometry, weight: Array, moments: Moments) -> Problem:
        """Pose the problem for a kernel (n_o, n_i / groups, kh, kw)."""
        return cls(geometry, _matrix(geometry, weight), moments)

    @classmethod
    def data_free(cls, geometry: ConvGeometry, weight: Array, bias: Array) -> Problem:
        """Take the inputs to be white, which makes every fit the data-free one and keeps the bias (n_o,)."""
        matrix = _matrix(geometry, weight)
        groups, m, d = matrix.shape
        moments = replace(
            Moments.empty(groups, 0, m),
            count=1,
            mean_x=np.zeros((groups, d)),
            mean_y=np.asarray(bias, np.float64).reshape(groups, m),
            gram=np.broadcast_to(_identity(d), (groups, d, d)),
            cross=matrix,
            power=np.square(matrix).sum(axis=2),
        )
        return cls(geometry, matrix, moments, white=True)

    def regularized(self, ridge: float) -> Problem:
        """Add white pseudo-samples on which the layer does what it always did.

        ``ridge`` is their total variance relative to the samples' own. It pulls every solution
        towards the original weight, and the metric towards the data-free one (DESIGN §4).
        """
        cross = self.moments.cross
        gram = self.moments.gram.copy()
        size = gram.shape[1]
        strength = ridge * np.trace(gram, axis1=1, axis2=2) / size + TINY
        gram[:, np.arange(size), np.arange(size)] += strength[:, None]
        cross = cross + strength[:, None, None] * self.weight
        power = self.moments.power + strength[:, None] * np.square(self.weight).sum(axis=2)
        moments = replace(self.moments, gram=gram, cross=cross, power=power)
        return replace(self, moments=moments, white=False)

    @cached_property
    def target(self) -> Array:
        """W* = C G⁻¹ (groups, m, d), written as W + (C − W G) G⁻¹ so that a singular G keeps W."""
        target = self.weight.copy()
        if self.white:
            return target
        for i, (gram, cross) in enumerate(zip(self.moments.gram, self.moments.cross, strict=True)):
            excess = cross - self.weight[i] @ gram
            # nothing to solve where the target is what the layer does anyway, but for float32's rounding
            if np.abs(excess).max(initial=0.0) > 1e-6 * np.abs(cross).max(initial=0.0):
                target[i] += solve(gram, excess)
        return target

    @property
    def power(self) -> float:
        """Σ |y − μy|² over the samples, against which errors are relative; never zero."""
        return max(float(self.moments.power.sum()), TINY)

    def error(self, factorization: Factorization) -> float:
        """Σ |y − ŷ|² over the samples, for a factorization with the best bias."""
        fitted = factorization.dense().reshape(self.weight.shape)
        if self.white:
            return float(np.square(self.weight - fitted).sum())
        return self.moments.error(fitted, self.moments.bias(fitted)) * max(self.moments.count, 1)

    def of_stage(self, before: Sequence[ConvStage], stage: ConvStage, last: bool) -> Problem:
        """Pose the problem of one stage of a chain: its inputs are what the stages ``before`` make.

        The ``last`` stage is to produce y itself; one in the middle is to go on producing what it does,
        wherever the rest of the chain looks at it.
        """
        g, own = self.geometry, stage.geometry
        moments, kernel = (self.moments, (g.kh, g.kw)) if not before else self._behind(before)
        count = moments.gram.shape[1] // (kernel[0] * kernel[1])  # channels per group
        read = np.arange(count * g.groups) if stage.channels is None else stage.channels
        read = read.reshape(g.groups, -1) % count
        taps = np.arange(count * kernel[0] * kernel[1]).reshape(count, *kernel)
        picks = [
            taps[read, a : a + own.kh, b : b + own.kw].reshape(g.groups, -1)
            for a, b in np.ndindex(kernel[0] - own.kh + 1, kernel[1] - own.kw + 1)
        ]
        weight = _matrix(own, stage.weight)
        repeats = stage.channels is not None and np.unique(stage.channels).size < stage.channels.size
        if self.white and not before and not repeats:  # some of them are white as well
            if last:
                weight = np.take_along_axis(moments.cross, picks[0][:, None, :], axis=2)
            return Problem.data_free(own, weight, moments.mean_y if last else np.zeros(weight.shape[:2]))
        seen = [_picked(moments, pick) for pick in picks]
        if last:
            return Problem(own, weight, seen[0])
        mean = replace(
            seen[0],
            gram=np.mean([m.gram for m in seen], axis=0),
            mean_x=np.mean([m.mean_x for m in seen], axis=0),
        )
        return Problem(own, weight, mean.with_linear_target(weight, np.zeros(weight.shape[:2])))

    def _behind(self, stages: Sequence[ConvStage]) -> tuple[Moments, tuple[int, int]]:
        """Moments of what ``stages`` make of the patches, and the kernel (kh, kw) that is left after them."""
        g = self.geometry
        kh, kw = (1 + sum(getattr(s.geometry, side) - 1 for s in stages) for side in ("kh", "kw"))
        kernel = (g.kh - kh + 1, g.kw - kw + 1)
        made = ConvGeometry(stages[-1].geometry.n_o, g.n_i, kh, kw, dilations=g.dilations, groups=g.groups)
        dense = Factorization(made, tuple(stages)).dense()  # (c, n_i / groups, kh, kw)
        dense = dense.reshape(g.groups, -1, *dense.shape[1:])
        maps = np.zeros((*dense.shape[:2], *kernel, g.n_i // g.groups, g.kh, g.kw))
        for a, b in np.ndindex(*kernel):
            maps[:, :, a, b, :, a : a + kh, b : b + kw] = dense
        maps = maps.reshape(g.groups, -1, self.moments.gram.shape[1])
        return self.moments.mapped(maps, self.white), kernel


def _identity(d: int) -> Array:
    """A read-only identity of d × d numbers that takes the memory of 2 d."""
    impulse = np.zeros(2 * d - 1)
    impulse[d - 1] = 1
    return sliding_window_view(impulse, d)[::-1]


class Family(ABC):
    """A way to factorize a layer. One number, its size, says how far: 0 is nothing, ``exact`` is all."""

    name: ClassVar[str]
    joins_last = False  # the last convolution and the 1×1 behind it can be fitted together, by this family

    @abstractmethod
    def exact(self, geometry: ConvGeometry) -> int:
        """The size at which the factorization is the layer."""

    @abstractmethod
    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        """The stages of this size; which channels they read is up to the fit."""

    @abstractmethod
    def curve(self, problem: Problem) -> Array:
        """Error left at every size 0 … exact, relative to the variance of the targets; cheap, not exact."""

    def grain(self, geometry: ConvGeometry) -> int:
        """Sizes are multiples of this."""
        return 1

    def repeats(self, geometry: ConvGeometry) -> int:
        """How often the first stage may read a channel that it selects; 0 if it selects none."""
        return 0

    def energies(self, problem: Problem) -> Array:
        """Share of the energy that is kept, by size (or by T, where sizes count terms): 1, 2, …"""
        return 1 - self.curve(problem)[1:]

    def scaled(self, geometry: ConvGeometry, number: int) -> int:
        """The size that people mean by a number: T terms per channel, r ranks, c channels."""
        return number

    def channels(self, problem: Problem, sizes: Sequence[int]) -> list[IntArray | None]:
        """What the first stage would read at several sizes; None is all channels."""
        return [None] * len(sizes)

    @abstractmethod
    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        """Fit the stages; ``channels`` are those that the first of them reads, where they are known."""


def solve(gram: Array, right: Array) -> Array:
    """Solve X gram = right (·, d) for a symmetric gram (d, d) that may be singular up to rounding."""
    gram = gram.copy()
    gram.flat[:: len(gram) + 1] += 1e-10 * np.trace(gram) / len(gram) + TINY**0.5
    # scipy.linalg.solve does the same, but lets no other thread run meanwhile, not even one that sees Ctrl-C
    factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
    return np.asfortranarray(scipy.linalg.cho_solve(factor, right.T, check_finite=False).T)


def with_best_bias(problem: Problem, stages: Sequence[ConvStage]) -> Factorization:
    """Finish a chain with the bias that leaves no mean error."""
    chain = Factorization(problem.geometry, tuple(stages))
    dense = chain.dense().reshape(problem.weight.shape)
    return replace(chain, bias=problem.moments.bias(dense).reshape(-1))


def root(gram: Array) -> Array:
    """Cholesky factor L of a gram (…, d, d) = L Lᵀ that may be singular up to rounding."""
    size = np.trace(gram, axis1=-2, axis2=-1)
    # where nothing ever varies there is no metric; any will do, it weighs nothing
    floor = 1e-10 * size / gram.shape[-1] + 1e-14 * np.max(size, initial=0.0) + TINY**0.5
    return np.linalg.cholesky(gram + floor[..., None, None] * np.eye(gram.shape[-1]))


def _picked(moments: Moments, taps: IntArray) -> Moments:
    """Moments of some of the patches' entries: taps (groups, d')."""
    everything = moments.gram.shape[1]
    if taps.shape[1] == everything and np.all(taps == np.arange(everything)):
        return moments
    groups = np.arange(len(taps))[:, None]
    return replace(
        moments,
        mean_x=moments.mean_x[groups, taps],
        gram=moments.gram[groups[..., None], taps[:, :, None], taps[:, None, :]],
        cross=np.take_along_axis(moments.cross, taps[:, None, :], axis=2),
    )


def _matrix(geometry: ConvGeometry, weight: Array) -> Array:
    return np.asarray(weight, np.float64).reshape(geometry.groups, geometry.n_o // geometry.groups, -1)
