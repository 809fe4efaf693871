"""ND: network decoupling in the depthwise → pointwise (DP) form.

Guo et al., "Network Decoupling: From Regular to Depthwise Separable Convolutions", BMVC 2018
(arXiv 1808.05517), section 3: every slice of a kernel (the weight of one input channel, n_o × k²) is
a sum of T rank-one terms; each is one depthwise filter followed by one column of a pointwise
convolution. With T = K = min(k², n_o) terms the sum is exact.

Three fits, one code: data-free (white inputs: truncated SVD of every slice, the paper's), and
data-aware with a common rank or with a rank per channel (DESIGN §4): block coordinate descent over
the input channels in the metric of the layer's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.families import Problem

Array = NDArray[np.floating]
IntArray = NDArray[np.int64]

NAME = "nd-dp"
SWEEPS = 5
SETTLED = 5e-3  # a sweep that gains less than this share of the error is the last
BLOCK = 16  # channels whose share of the residual is computed in one matrix product


def full_rank(geometry: ConvGeometry) -> int:
    """K: the number of terms per channel at which the expansion is exact."""
    return min(geometry.kh * geometry.kw, geometry.n_o // geometry.groups)


def macs_per_term(geometry: ConvGeometry) -> int:
    """MACs per output pixel that one more term (of one channel of every group) costs."""
    return (geometry.kh * geometry.kw + geometry.n_o // geometry.groups) * geometry.groups


def break_even(geometry: ConvGeometry) -> int:
    """The largest number of terms per group that costs fewer MACs than the layer itself."""
    dense = int(np.prod(geometry.weight_shape))
    return min((dense - 1) // macs_per_term(geometry), full_rank(geometry) * geometry.n_i // geometry.groups)


@dataclass(frozen=True)
class Spectrum:
    """The terms of every slice, strongest first, in the metric of the layer's inputs.

    ``energy`` (groups, n, k²) are squared singular values, ``filters`` (groups, n, k², k²) the
    depthwise filter of each term in its rows; n = n_i / groups.
    """

    energy: Array
    filters: Array

    def common_ranks(self, rank: int) -> IntArray:
        """The same rank for every input channel: (n_i,)."""
        return np.full(self.energy.shape[0] * self.energy.shape[1], rank, np.int64)

    def pooled_ranks(self, terms: int) -> IntArray:
        """Share ``terms`` per group among its channels, strongest terms first: ranks (n_i,), 0 included."""
        _, n, depth = self.energy.shape
        order = self.order()[:, :terms]
        return np.concatenate([np.bincount(o // depth, minlength=n) for o in order]).astype(np.int64)

    def order(self) -> IntArray:
        """All terms of each group, strongest first, as channel · k² + term: (groups, n · k²)."""
        return np.argsort(-self.energy.reshape(len(self.energy), -1), axis=1, kind="stable")


def spectrum(problem: Problem) -> Spectrum:
    """Singular values and vectors of every slice in the metric of its own channel's patches."""
    g = problem.geometry
    k = g.kh * g.kw
    target = problem.target
    factor = _channel_factors(problem)  # G_ii = L Lᵀ
    groups, m, d = target.shape
    slices = target.reshape(groups, m, d // k, k).swapaxes(1, 2) @ factor  # (groups, n, m, k²)
    energy, vectors = np.linalg.eigh(slices.swapaxes(2, 3) @ slices)
    vectors = vectors[..., ::-1]
    filters = np.linalg.solve(factor.swapaxes(2, 3), vectors).swapaxes(2, 3)
    return Spectrum(np.maximum(energy[..., ::-1], 0.0), filters)


def energy_by_rank(problem: Problem) -> Array:
    """Share of the slices' energy in their first T terms, for T = 1 … K: the paper's principal components."""
    energy = spectrum(problem).energy.sum(axis=(0, 1))[: full_rank(problem.geometry)]
    return np.cumsum(energy) / max(float(energy.sum()), np.finfo(float).tiny)


def error_curve(problem: Problem, terms: Spectrum, order: IntArray | None = None) -> Array:
    """Error left with the first R terms of ``order`` and the best pointwise stage, for every R at once.

    One Cholesky factorization of the terms' Gram matrix, in the order in which they are taken up,
    solves the nested least-squares problems of all R. Returns (n · k² + 1,), relative to the
    variance of the targets, summed over groups.
    """
    moments = problem.moments
    order = terms.order() if order is None else order
    explained = np.zeros(order.shape[1] + 1)
    for i in range(problem.geometry.groups):
        gram, cross = _in_terms(terms.filters[i], moments.gram[i], moments.cross[i])
        gram, cross = gram[np.ix_(order[i], order[i])], cross[:, order[i]]
        gram.flat[:: len(gram) + 1] += 1e-12 * np.trace(gram) / len(gram)
        root = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
        gains = scipy.linalg.solve_triangular(root, cross.T, lower=True, check_finite=False)
        explained[1:] += np.cumsum(np.square(gains).sum(axis=1))
    power = max(float(moments.power.sum()), float(explained[-1]), np.finfo(float).tiny)
    return np.maximum(power - explained, 0.0) / power


def fit(
    problem: Problem, ranks: IntArray, start: Spectrum | None = None, sweeps: int = SWEEPS
) -> Factorization:
    """Fit depthwise and pointwise stages with ``ranks`` (n_i,) terms per input channel.

    Terms start from the slices' own spectra (``start``, if it is known already); the pointwise stage
    is refitted to all of them together; block coordinate descent then improves both. The error never
    rises on the way. Every group has the same number of terms in all.
    """
    g = problem.geometry
    per_group = ranks.reshape(g.groups, -1)
    if len(set(per_group.sum(axis=1))) != 1:
        raise ValueError("every group needs the same number of terms")
    start = start or spectrum(problem)
    filters, columns = [], []
    for i in range(g.groups):
        metric, aim = problem.moments.gram[i], problem.target[i]
        kept = _stack(start.filters[i], per_group[i])
        points = _refit_pointwise(metric, aim, kept, per_group[i])
        kept, points = _descend(metric, aim, kept, points, per_group[i], sweeps)
        filters.append(kept)
        columns.append(points)
    return _assemble(problem, ranks, np.concatenate(filters), np.concatenate(columns))


def _assemble(problem: Problem, ranks: IntArray, filters: Array, columns: Array) -> Factorization:
    """Put filters (R, k²) and pointwise columns (n_o, R / groups) together as two stages and a bias."""
    g = problem.geometry
    terms = len(filters)
    channels = np.repeat(np.arange(g.n_i), ranks)
    depthwise = ConvGeometry(terms, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, terms)
    pointwise = ConvGeometry(g.n_o, terms, 1, 1, groups=g.groups)
    stages = (
        ConvStage(depthwise, filters.reshape(terms, 1, g.kh, g.kw), channels),
        ConvStage(pointwise, columns.reshape(pointwise.weight_shape)),
    )
    dense = Factorization(g, stages).dense().reshape(problem.weight.shape)
    return Factorization(g, stages, problem.moments.bias(dense).reshape(-1))


def _channel_factors(problem: Problem) -> Array:
    """Cholesky factors of the diagonal blocks G_ii: (groups, n, k², k²), lower."""
    k = problem.geometry.kh * problem.geometry.kw
    return np.stack([_block_factors(gram, k) for gram in problem.moments.gram])


def _block_factors(gram: Array, k: int) -> Array:
    n = len(gram) // k
    blocks = np.ascontiguousarray(np.einsum("aiaj->aij", gram.reshape(n, k, n, k)))
    size = np.trace(blocks, axis1=1, axis2=2)
    # a dead channel has no metric of its own; any will do, it weighs nothing
    floor = 1e-10 * size / k + 1e-14 * size.max(initial=0.0) + np.finfo(float).tiny ** 0.5
    return np.linalg.cholesky(blocks + floor[:, None, None] * np.eye(k))


def _in_terms(filters: Array, gram: Array, cross: Array) -> tuple[Array, Array]:
    """Change the basis of G and C from taps to terms; filters (n, k², k²) hold a term per row."""
    n, k, _ = filters.shape
    d = n * k
    half = (filters @ gram.reshape(n, k, d)).reshape(d, d)
    gram = (filters @ np.ascontiguousarray(half.T).reshape(n, k, d)).reshape(d, d)
    cross = (filters @ np.ascontiguousarray(cross.T).reshape(n, k, -1)).reshape(d, -1).T
    return gram, cross


def _stack(filters: Array, ranks: IntArray) -> Array:
    """The first ranks[c] filters of every channel c: (R, k²)."""
    return np.concatenate([f[:r] for f, r in zip(filters, ranks, strict=True)])


def _blocks(ranks: IntArray, k: int) -> Iterator[tuple[slice, slice]]:
    """For every channel with terms: where its taps stand among all taps, and its terms among all terms."""
    ends = np.cumsum(ranks)
    for i in np.flatnonzero(ranks):
        yield slice(i * k, i * k + k), slice(ends[i] - ranks[i], ends[i])


def _depthwise(matrix: Array, filters: Array, ranks: IntArray) -> Array:
    """What the depthwise stage makes of a matrix with a column per tap: (·, d) → (·, R)."""
    seen = np.empty((len(matrix), len(filters)))
    for taps, terms in _blocks(ranks, filters.shape[1]):
        seen[:, terms] = matrix[:, taps] @ filters[terms].T
    return seen


def _refit_pointwise(metric: Array, target: Array, filters: Array, ranks: IntArray) -> Array:
    """Least squares for all pointwise columns together: (m, R)."""
    seen = _depthwise(metric, filters, ranks)
    gram = _depthwise(np.ascontiguousarray(seen.T), filters, ranks)
    gram.flat[:: len(gram) + 1] *= 1 + 1e-10
    gram.flat[:: len(gram) + 1] += np.finfo(float).tiny ** 0.5
    columns: Array = scipy.linalg.solve(gram, (target @ seen).T, assume_a="pos", check_finite=False).T
    return columns


def _descend(
    metric: Array, target: Array, filters: Array, points: Array, ranks: IntArray, sweeps: int
) -> tuple[Array, Array]:
    """Block coordinate descent over input channels; each step is exact (DESIGN §4, DP fit).

    With the other channels fixed, the free optimum of a block is
    W*_i + (Σ_{j≠i} (W*_j − Ŵ_j) G_ji) G_ii⁻¹, and its best rank-T part in the metric G_ii comes from
    the eigenvectors of LᵀBᵀBL.
    """
    k = filters.shape[1]
    factors = _block_factors(metric, k)
    inverses = np.linalg.inv(factors)
    ends = np.cumsum(ranks)
    rest = target.copy()  # W* − Ŵ
    for taps, terms in _blocks(ranks, k):
        rest[:, taps] -= points[:, terms] @ filters[terms]
    filters, points = filters.copy(), points.copy()
    error = np.einsum("md,md->", rest @ metric, rest)
    for _ in range(sweeps):
        for first in range(0, len(ranks), BLOCK):
            block = slice(first * k, min(first + BLOCK, len(ranks)) * k)
            seen = rest @ metric[:, block]
            moved = np.zeros_like(seen)  # what the block's own steps have changed in `rest` since
            for i in range(first, min(first + BLOCK, len(ranks))):
                if not ranks[i]:
                    continue
                taps, terms = slice(i * k, i * k + k), slice(ends[i] - ranks[i], ends[i])
                here = slice(taps.start - block.start, taps.stop - block.start)
                own = rest[:, taps]
                others = seen[:, here] + moved[:, : here.start] @ metric[block, taps][: here.start]
                others -= own @ metric[taps, taps]
                # free optimum times L; (·) G_ii⁻¹ L = (·) L⁻ᵀ
                scaled = target[:, taps] @ factors[i] + others @ inverses[i].T
                vectors = np.linalg.eigh(scaled.T @ scaled)[1][:, : -ranks[i] - 1 : -1]
                points[:, terms] = scaled @ vectors
                filters[terms] = vectors.T @ inverses[i]
                left = target[:, taps] - points[:, terms] @ filters[terms]
                moved[:, here] = left - own
                rest[:, taps] = left
        before, error = error, np.einsum("md,md->", rest @ metric, rest)
        if before - error <= SETTLED * before:
            break
    return filters, points
