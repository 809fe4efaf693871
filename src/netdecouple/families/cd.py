"""CD: channel decomposition, k×k to r channels, then 1×1 back to n_o.

Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015
(arXiv 1505.06798), section 3.1: the outputs lie near a subspace of r dimensions. In the moments of the
layer this is reduced-rank regression, solved in closed form. On a 1×1 convolution or a fully connected
layer it is plain low rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from netdecouple.convolution import ConvGeometry, Factorization, IntArray, Structure
from netdecouple.families.base import Family, register
from netdecouple.families.linalg import Array
from netdecouple.families.problem import Problem, once


@register
class ChannelDecomposition(Family):
    """Size: channels per group between the two stages."""

    name = "cd"
    label = "channel"
    description = "k×k to fewer channels, then 1×1; of 1×1 low rank"
    size_unit = "channels between them"
    source = "Zhang et al. 2015"
    order = 10
    joins_last = True
    for_linear = True

    def applies_to(self, geometry: ConvGeometry) -> bool:
        return True

    def wide_ok(self, geometry: ConvGeometry) -> bool:
        return geometry.is_pointwise

    def exact(self, geometry: ConvGeometry) -> int:
        return min(geometry.n_o // geometry.groups, geometry.unknowns)

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        g, middle = geometry, size * geometry.groups
        wide = ConvGeometry(g.n_o, middle, 1, 1, groups=g.groups)
        return Structure.of(g, replace(g, n_o=middle), wide)

    def curve(self, problem: Problem) -> Array:
        energy = _components(problem)[0][:, : self.exact(problem.geometry)].sum(axis=0)
        return np.maximum(1 - np.cumsum(np.concatenate([[0.0], energy])) / problem.power, 0.0)

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        u = _components(problem)[1][:, :, :size]  # (groups, m, r)
        u = np.pad(u, ((0, 0), (0, 0), (0, size - u.shape[2])))  # no energy is left for more
        v = u.swapaxes(1, 2) @ problem.target  # V = Uᵀ W*
        return problem.assembled(self.structure(problem.geometry, size), v, u)


@once
def _components(problem: Problem) -> tuple[Array, Array]:
    """Compute the principal components of W* x: energies (groups, n), falling, and axes in columns.

    There are as many as outputs m, or as unknowns d if these are fewer: W* x is in the columns of W* = Q R.
    """
    cross, target = problem.moments.cross, problem.target
    basis = None
    if target.shape[1] > target.shape[2]:
        basis, target = np.linalg.qr(target)
        cross = basis.swapaxes(1, 2) @ cross
    energy, axes = np.linalg.eigh(cross @ target.swapaxes(1, 2))  # W* G W*ᵀ, in which W* G = C
    axes = axes if basis is None else basis @ axes
    return np.maximum(energy[:, ::-1], 0.0), axes[:, :, ::-1]
