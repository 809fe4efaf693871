"""The problem that a family solves: one convolution to approximate, in the metric of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, TypeVar

import numpy as np

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.families.linalg import TINY, Array, identity, solve
from netdecouple.moments import Moments

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One convolution to approximate: min over Ŵ, b of Σ |y − Ŵx − b|² over the samples of ``moments``."""

    geometry: ConvGeometry
    weight: Array  # (groups, m, d) float64, m = n_o / groups, d = n_i / groups · kh · kw
    moments: Moments
    white: bool = False  # the inputs are uncorrelated and of equal variance: the metric is the identity
    _cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # of `once`

    @classmethod
    def of(cls, geometry: ConvGeometry, weight: Array, moments: Moments) -> Problem:
        """Pose the problem for a kernel (n_o, n_i / groups, kh, kw)."""
        return cls(geometry, _matrix(geometry, weight), moments)

    @classmethod
    def data_free(cls, geometry: ConvGeometry, weight: Array, bias: Array) -> Problem:
        """Pose the problem for white inputs: every fit is the data-free one and keeps the bias (n_o,).

        >>> g = ConvGeometry(2, 1, 1, 1)
        >>> problem = Problem.data_free(g, np.array([[[[3.0]]], [[[4.0]]]]), np.zeros(2))
        >>> problem.power  # Σ W²
        25.0
        """
        matrix = _matrix(geometry, weight)
        groups, m, d = matrix.shape
        moments = Moments(
            count=1,
            mean_x=np.zeros((groups, d)),
            mean_y=np.asarray(bias, np.float64).reshape(groups, m),
            gram=np.broadcast_to(identity(d), (groups, d, d)),
            cross=matrix,
            power=np.square(matrix).sum(axis=2),
        )
        return cls(geometry, matrix, moments, white=True)

    def regularized(self, ridge: float) -> Problem:
        """Add white pseudo-samples with the original layer's outputs as their targets.

        ``ridge`` is their total variance relative to that of the samples. It pulls every solution towards
        the original weight, and the metric towards the data-free one (DESIGN §4).
        """
        gram = self.moments.gram.copy()
        d = gram.shape[1]
        strength = ridge * np.trace(gram, axis1=1, axis2=2) / d + TINY  # λ of every group
        gram[:, np.arange(d), np.arange(d)] += strength[:, None]  # G + λI
        cross = self.moments.cross + strength[:, None, None] * self.weight  # C + λW
        power = self.moments.power + strength[:, None] * np.square(self.weight).sum(axis=2)
        moments = replace(self.moments, gram=gram, cross=cross, power=power)
        return replace(self, moments=moments, white=False)

    @cached_property
    def target(self) -> Array:
        """W* = C G⁻¹ (groups, m, d), computed as W + (C − W G) G⁻¹ so that a singular G keeps W."""
        target = self.weight.copy()
        if self.white:
            return target
        for i, (gram, cross) in enumerate(zip(self.moments.gram, self.moments.cross, strict=True)):
            excess = cross - self.weight[i] @ gram
            # nothing to solve where W* and W differ by no more than float32 rounds
            if np.abs(excess).max(initial=0.0) > 1e-6 * np.abs(cross).max(initial=0.0):
                target[i] += solve(gram, excess)
        return target

    @property
    def power(self) -> float:
        """Σ |y − μy|² over the samples, never zero: a relative error is a squared error divided by this."""
        return max(float(self.moments.power.sum()), TINY)

    def squared_error(self, factorization: Factorization) -> float:
        """Compute Σ |y − ŷ|² over the samples for a factorization with the best bias."""
        fitted = factorization.dense().reshape(self.weight.shape)
        if self.white:
            return float(np.square(self.weight - fitted).sum())
        mean = self.moments.mean_squared_error(fitted, self.moments.bias(fitted))
        return mean * (self.moments.count or 1)

    def relative_error(self, factorization: Factorization) -> float:
        """Compute the squared error relative to the variance of the targets."""
        return self.squared_error(factorization) / self.power

    def with_best_bias(self, stages: Sequence[ConvStage]) -> Factorization:
        """Complete a chain of stages by the bias that leaves no mean error: b = μy − Ŵ μx."""
        chain = Factorization(self.geometry, tuple(stages))
        dense = chain.dense().reshape(self.weight.shape)
        return replace(chain, bias=self.moments.bias(dense).reshape(-1))

    def assembled(
        self, structure: Structure, *weights: Array, channels: IntArray | None = None
    ) -> Factorization:
        """Make the stages of a structure, the first one with ``channels``, and add the best bias."""
        stages = zip(structure.stages, weights, (channels, *structure.channels[1:]), strict=True)
        return self.with_best_bias([ConvStage(g, w.reshape(g.weight_shape), c) for g, w, c in stages])

    def of_stage(self, before: Sequence[ConvStage], stage: ConvStage, last: bool) -> Problem:
        """Pose the problem of one stage of a chain, with the outputs of the stages ``before`` as its inputs.

        The targets of the ``last`` stage are y itself. Those of any other are its present outputs, at all
        positions that the rest of the chain reads.
        """
        g, inner = self.geometry, stage.geometry
        moments, kernel = (self.moments, (g.kh, g.kw)) if not before else self._behind(before)
        count = moments.gram.shape[1] // (kernel[0] * kernel[1])  # channels per group
        channels = np.arange(count * g.groups) if stage.channels is None else stage.channels
        channels = channels.reshape(g.groups, -1) % count
        taps = np.arange(count * kernel[0] * kernel[1]).reshape(count, *kernel)
        windows = [  # the entries of a patch that the stage reads, for each of its positions
            taps[channels, a : a + inner.kh, b : b + inner.kw].reshape(g.groups, -1)
            for a, b in np.ndindex(kernel[0] - inner.kh + 1, kernel[1] - inner.kw + 1)
        ]
        weight = _matrix(inner, stage.weight)
        repeats = stage.channels is not None and np.unique(stage.channels).size < stage.channels.size
        if self.white and not before and not repeats:  # a selection of white inputs is white
            if last:
                weight = np.take_along_axis(moments.cross, windows[0][:, None, :], axis=2)
            return Problem.data_free(inner, weight, moments.mean_y if last else np.zeros(weight.shape[:2]))
        by_window = [_selected(moments, window) for window in windows]
        if last:
            return Problem(inner, weight, by_window[0])
        mean = replace(
            by_window[0],
            gram=np.mean([m.gram for m in by_window], axis=0),
            mean_x=np.mean([m.mean_x for m in by_window], axis=0),
        )
        return Problem(inner, weight, mean.with_linear_target(weight, np.zeros(weight.shape[:2])))

    def _behind(self, stages: Sequence[ConvStage]) -> tuple[Moments, tuple[int, int]]:
        """Compute the moments of the outputs of ``stages``, and the kernel (kh, kw) that reads them."""
        g = self.geometry
        kh, kw = (1 + sum(getattr(s.geometry, side) - 1 for s in stages) for side in ("kh", "kw"))
        kernel = (g.kh - kh + 1, g.kw - kw + 1)
        front = ConvGeometry(stages[-1].geometry.n_o, g.n_i, kh, kw, dilations=g.dilations, groups=g.groups)
        dense = Factorization(front, tuple(stages)).dense()  # (c, n_i / groups, kh, kw)
        dense = dense.reshape(g.groups, -1, *dense.shape[1:])
        maps = np.zeros((*dense.shape[:2], *kernel, g.n_i // g.groups, g.kh, g.kw))
        for a, b in np.ndindex(*kernel):
            maps[:, :, a, b, :, a : a + kh, b : b + kw] = dense
        maps = maps.reshape(g.groups, -1, self.moments.gram.shape[1])
        return self.moments.mapped(maps, self.white), kernel


def once(compute: Callable[[Problem], T]) -> Callable[[Problem], T]:
    """Compute a function of a problem once for each, however many sizes ask for it; a decorator."""
    key = f"{compute.__module__}.{compute.__qualname__}"

    @wraps(compute)
    def cached(problem: Problem) -> T:
        if key not in problem._cache:
            problem._cache[key] = compute(problem)
        value: T = problem._cache[key]
        return value

    return cached


def _selected(moments: Moments, entries: IntArray) -> Moments:
    """Reduce moments to some entries of the patches: (groups, d')."""
    d = moments.gram.shape[1]
    if entries.shape[1] == d and np.all(entries == np.arange(d)):
        return moments
    groups = np.arange(len(entries))[:, None]
    return replace(
        moments,
        mean_x=moments.mean_x[groups, entries],
        gram=moments.gram[groups[..., None], entries[:, :, None], entries[:, None, :]],
        cross=np.take_along_axis(moments.cross, entries[:, None, :], axis=2),
    )


def _matrix(geometry: ConvGeometry, weight: Array) -> Array:
    return np.asarray(weight, np.float64).reshape(geometry.groups, geometry.n_o // geometry.groups, -1)
