"""Families of decompositions, one per file, all with one interface.

A family turns a `Problem` (one layer, and the moments of what it sees and should produce) into a
`Factorization`. A family never sees a network, a framework or an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from netdecouple.convolution import ConvGeometry
from netdecouple.moments import Moments

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Problem:
    """One convolution to approximate: min over Ŵ of Σ |y − Ŵx − b|² on the samples behind ``moments``."""

    geometry: ConvGeometry
    weight: Array  # (groups, m, d) float64, m = n_o / groups, d = n_i / groups · kh · kw
    moments: Moments

    @classmethod
    def of(cls, geometry: ConvGeometry, weight: Array, moments: Moments) -> Problem:
        """Pose the problem for a kernel (n_o, n_i / groups, kh, kw)."""
        return cls(geometry, _matrix(geometry, weight), moments)

    @classmethod
    def data_free(cls, geometry: ConvGeometry, weight: Array, bias: Array) -> Problem:
        """Take the inputs to be white, which makes every fit the data-free one and keeps the bias (n_o,)."""
        matrix = _matrix(geometry, weight)
        groups, m, d = matrix.shape
        white = Moments.empty(groups, d, m)
        white = replace(white, count=1, gram=np.broadcast_to(np.eye(d), (groups, d, d)))
        return cls(
            geometry,
            matrix,
            white.with_linear_target(matrix, np.asarray(bias, np.float64).reshape(groups, m)),
        )

    def regularized(self, ridge: float) -> Problem:
        """Add white pseudo-samples on which the layer does what it always did.

        ``ridge`` is their total variance relative to the samples' own. It pulls every solution
        towards the original weight, and the metric towards the data-free one (DESIGN §4).
        """
        cross = self.moments.cross
        gram = self.moments.gram.copy()
        size = gram.shape[1]
        strength = ridge * np.trace(gram, axis1=1, axis2=2) / size + np.finfo(float).tiny
        gram[:, np.arange(size), np.arange(size)] += strength[:, None]
        cross = cross + strength[:, None, None] * self.weight
        power = self.moments.power + strength[:, None] * np.square(self.weight).sum(axis=2)
        return replace(self, moments=replace(self.moments, gram=gram, cross=cross, power=power))

    @cached_property
    def target(self) -> Array:
        """W* = C G⁻¹ (groups, m, d), written as W + (C − W G) G⁻¹ so that a singular G keeps W."""
        target = self.weight.copy()
        for i, (gram, cross) in enumerate(zip(self.moments.gram, self.moments.cross, strict=True)):
            excess = cross - self.weight[i] @ gram
            # nothing to solve where the target is what the layer does anyway
            if np.abs(excess).max(initial=0.0) > 1e-9 * np.abs(cross).max(initial=0.0):
                target[i] += scipy.linalg.solve(gram, excess.T, assume_a="pos", check_finite=False).T
        return target


def _matrix(geometry: ConvGeometry, weight: Array) -> Array:
    return np.asarray(weight, np.float64).reshape(geometry.groups, geometry.n_o // geometry.groups, -1)
