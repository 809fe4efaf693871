"""First and second moments of a layer's patches x and targets y.

They are all that a linear least-squares problem needs of its samples: sums that are added up
batch by batch in float64 and merged across shards, in O(d²) memory whatever the number of samples
(DESIGN §4). ``x`` are patches (d = n_i / groups · kh · kw), ``y`` targets (m = n_o / groups).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

Array = NDArray[np.floating]
DEPENDENT = 1e-9  # the share of an entry's variance below which the rest is rounding


@dataclass
class Moments:
    """Count, means and centred sums of squares, for each group of a layer separately."""

    count: float  # of samples, or the sum of their weights
    mean_x: Array  # (groups, d)
    mean_y: Array  # (groups, m)
    gram: Array  # (groups, d, d)   Σ (x-μx)(x-μx)ᵀ
    cross: Array  # (groups, m, d)  Σ (y-μy)(x-μx)ᵀ
    power: Array  # (groups, m)     Σ (y-μy)²

    @classmethod
    def empty(cls, groups: int, d: int, m: int) -> Moments:
        """Make the moments of no samples.

        >>> Moments.empty(1, 3, 2).count
        0
        """
        shapes = (groups, d), (groups, m), (groups, d, d), (groups, m, d), (groups, m)
        return cls(0, *(np.zeros(shape) for shape in shapes))

    @classmethod
    def of(cls, x: Array, y: Array, weights: Array | None = None) -> Moments:
        """Compute the moments of samples x (n, groups, d) and y (n, groups, m), with weights (n,) or alike.

        >>> moments = Moments.of(np.array([[[1.0]], [[3.0]]]), np.array([[[0.0]], [[4.0]]]))
        >>> float(moments.gram.item()), float(moments.cross.item()), moments.variance
        (2.0, 4.0, 4.0)
        """
        x, y = np.array(x, np.float64), np.array(y, np.float64)  # copies, which are changed below
        count = len(x) if weights is None else float(weights.sum())
        mean_x, mean_y = (np.average(v, axis=0, weights=weights) for v in (x, y))
        x -= mean_x
        y -= mean_y
        if weights is not None:
            for v in (x, y):
                v *= np.sqrt(weights)[:, None, None]
        x, y = x.swapaxes(0, 1), y.swapaxes(0, 1)  # (groups, n, ·)
        gram = np.stack([g.T @ g for g in x])  # a plain AᵀA lets BLAS do half the work
        return cls(count, mean_x, mean_y, gram, y.swapaxes(1, 2) @ x, np.square(y).sum(axis=1))

    def add(self, x: Array, y: Array, weights: Array | None = None) -> None:
        """Add a batch of samples in place: x (n, groups, d), y (n, groups, m), with weights (n,) or alike."""
        self.absorb(Moments.of(x, y, weights))

    def absorb(self, other: Moments) -> None:
        """Add other samples' moments in place, by Chan, Golub and LeVeque's (1979) pairwise update.

        >>> x = np.array([1.0, 2.0, 6.0]).reshape(3, 1, 1)
        >>> first, rest = Moments.of(x[:1], x[:1]), Moments.of(x[1:], x[1:])
        >>> first.absorb(rest)
        >>> first.count, first.mean_x.item(), first.gram.item()
        (3, 3.0, 14.0)
        """
        if not other.count:
            return
        count = self.count + other.count
        share = other.count / count
        weight = self.count * share
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        self.gram[...] += other.gram
        self.cross[...] += other.cross
        if weight:
            self.gram[...] += weight * dx[:, :, None] * dx[:, None, :]
            self.cross[...] += weight * dy[:, :, None] * dx[:, None, :]
        self.power[...] += other.power + weight * dy**2
        self.mean_x[...] += share * dx
        self.mean_y[...] += share * dy
        self.count = count

    def with_linear_target(self, weight: Array, bias: Array) -> Moments:
        """Return moments of the same x with y = weight x + bias: weight (groups, m, d), bias (groups, m)."""
        cross = weight @ self.gram
        mean_y = np.einsum("gmd,gd->gm", weight, self.mean_x) + bias
        return replace(self, cross=cross, mean_y=mean_y, power=np.einsum("gmd,gmd->gm", cross, weight))

    def mapped(self, maps: Array, white: bool = False) -> Moments:
        """Return moments of x' = maps x, maps (groups, d', d), with the same targets.

        With ``white``, the Gram matrix is the identity, and the product with it is left out.
        """
        transposed = maps.swapaxes(1, 2)
        mean_x = np.einsum("gpd,gd->gp", maps, self.mean_x)
        gram = (maps if white else maps @ self.gram) @ transposed
        return replace(self, mean_x=mean_x, gram=gram, cross=self.cross @ transposed)

    def mean_squared_error(self, weight: Array, bias: Array) -> float:
        """Compute Σ |y - weight x - bias|² per sample, for weight (groups, m, d) and bias (groups, m)."""
        fitted = weight @ self.gram - 2 * self.cross
        offset = self.mean_y - bias - np.einsum("gmd,gd->gm", weight, self.mean_x)
        centred = self.power.sum() + np.einsum("gmd,gmd->", fitted, weight)
        # a sum of squares: what falls below zero is rounding
        return max(float(centred) / (self.count or 1), 0.0) + float(np.square(offset).sum())

    def bias(self, weight: Array) -> Array:
        """Return the best bias (groups, m) for a weight (groups, m, d): μy − Ŵ μx."""
        best: Array = self.mean_y - np.einsum("gmd,gd->gm", weight, self.mean_x)
        return best

    @property
    def dependent(self) -> int:
        """Number of entries of x, over all groups, that are constant or linear combinations of others.

        These samples do not determine their weights; the ridge does.
        """
        deviation = np.sqrt(np.diagonal(self.gram, axis1=1, axis2=2))  # (groups, d)
        scale = np.where(deviation > 0, deviation, 1.0)
        ranks = [
            lapack.dpstrf(gram / std / std[:, None], tol=DEPENDENT)[2]  # Cholesky with pivots
            for gram, std in zip(self.gram, scale, strict=True)
            if std.size and gram.any()
        ]
        return int(self.mean_x.size - sum(ranks))

    @property
    def variance(self) -> float:
        """tr Cov(y): mean squared deviation of the targets, over all groups.

        >>> Moments.of(np.zeros((2, 1, 3)), np.array([[[0.0, 1.0]], [[4.0, 1.0]]])).variance
        4.0
        """
        return float(self.power.sum()) / (self.count or 1)
