"""ND: network decoupling, depthwise → pointwise (DP) and pointwise → depthwise (PD).

Guo et al., "Network Decoupling: From Regular to Depthwise Separable Convolutions", BMVC 2018
(arXiv 1808.05517), section 3. DP: every slice of a kernel (the weight of one input channel, n_o × k²)
is a sum of T rank-one terms; each is one depthwise filter followed by one column of a pointwise
convolution. PD: the slices are the weights of one output channel, n_i × k²; each term is a row of a
pointwise convolution followed by one depthwise filter.

The lossless theorem: a slice is a matrix, so its singular value decomposition is exact with
K = min(k², n_o) terms (DP) or min(k², n_i) terms (PD), and the kernel is the sum of all of them.

DP has three fits, one code: data-free (white inputs: truncated SVD of every slice, the paper's), and
data-aware with a common rank or with a rank per channel (DESIGN §4): block coordinate descent over
the input channels in the metric of the layer's own inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from netdecouple.convolution import ConvGeometry, Factorization, IntArray, Structure
from netdecouple.families.base import Family, FitOptions, register
from netdecouple.families.linalg import TINY, Array, comparable, root, solve
from netdecouple.families.problem import Problem, once

SWEEPS = 5  # of block coordinate descent, in the DP form
ROUNDS = 2  # of filters, rows, in the PD form
ALTERNATED = 1500  # unknowns per output up to which the rows of the PD form are refitted too
SETTLED = 5e-3  # a sweep that gains less than this share of the error is the last
BLOCK = 16  # channels whose share of the residual is computed in one matrix product


@register
class DepthwisePointwise(Family):
    """ND in the DP form. Size: terms per group, shared among its channels.

    With ``options.uniform`` every channel has the same number of terms: sizes are multiples of a group's
    channels. ``options.rounds`` are sweeps of block coordinate descent; 0 is the closed form alone, which is
    the best that there is for white inputs.
    """

    name = "nd-dp"
    label = "depthwise → pointwise"
    description = "k×k depthwise, then 1×1"
    size_unit = "terms, shared among the input channels"
    source = "Guo et al. 2018"
    order = 40
    group = "nd"
    spreads_terms = True
    is_reference = True

    def wide_ok(self, geometry: ConvGeometry) -> bool:
        return True

    def exact(self, geometry: ConvGeometry) -> int:
        return full_rank(geometry) * geometry.n_i // geometry.groups

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        g, terms = geometry, size * geometry.groups
        depthwise = ConvGeometry(terms, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, terms)
        return Structure.of(g, depthwise, ConvGeometry(g.n_o, terms, 1, 1, groups=g.groups))

    def curve(self, problem: Problem) -> Array:
        terms = spectrum(problem)
        order = terms.order(self.options.uniform)
        return error_curve(problem, terms, order)[: self.exact(problem.geometry) + 1]

    def grain(self, geometry: ConvGeometry) -> int:
        return geometry.weight_shape[1] if self.options.uniform else 1

    def size_of(self, geometry: ConvGeometry, number: int) -> int:
        return number * geometry.n_i // geometry.groups

    def energies(self, problem: Problem) -> Array:
        """The share of each slice's squared singular values in its first T, averaged over non-zero slices."""
        return mean_energy(spectrum(problem).energy)[: full_rank(problem.geometry)]

    def repeats(self, geometry: ConvGeometry) -> int:
        return geometry.kh * geometry.kw

    def channels(self, problem: Problem, sizes: Sequence[int]) -> list[IntArray | None]:
        terms, every_channel = spectrum(problem), np.arange(problem.geometry.n_i)
        return [every_channel.repeat(terms.ranks(size, self.options.uniform)) for size in sizes]

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        rounds = self.options.rounds
        if channels is None:
            ranks = spectrum(problem).ranks(size, self.options.uniform)
        else:
            ranks = np.bincount(channels, minlength=problem.geometry.n_i)
        return fit(problem, ranks, sweeps=SWEEPS if rounds is None else rounds)


@register
class PointwiseDepthwise(Family):
    """ND in the PD form. Size: terms T of every output channel.

    The closed form takes the metric as a product of one over channels and one over taps (DESIGN §4);
    depthwise filters and pointwise rows are then refitted in turn, each exactly: output channels share no
    terms. In large layers rows take too long, and only the filters are refitted.
    """

    name = "nd-pd"
    label = "pointwise → depthwise"
    description = "1×1, then k×k depthwise"
    size_unit = "terms per output channel"
    source = "Guo et al. 2018"
    order = 40
    group = "nd"
    in_combinations = False
    for_upsampling = True

    def exact(self, geometry: ConvGeometry) -> int:
        return min(geometry.kh * geometry.kw, geometry.n_i // geometry.groups)

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        g, terms = geometry, size * geometry.n_o
        pointwise = ConvGeometry(terms, g.n_i, 1, 1, groups=g.groups)
        depthwise = ConvGeometry(g.n_o, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, g.n_o)
        return Structure.of(g, pointwise, depthwise)

    def energies(self, problem: Problem) -> Array:
        """As in the DP form; a slice is the weight of one output channel."""
        return mean_energy(np.square(np.concatenate([values for _, values, _ in _pd_terms(problem)])))

    def curve(self, problem: Problem) -> Array:
        closed = PointwiseDepthwise(FitOptions(rounds=0))
        sizes = range(1, self.exact(problem.geometry) + 1)
        errors = [1.0, *(problem.relative_error(closed.fit(problem, size)) for size in sizes)]
        return np.minimum.accumulate(errors)

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        rounds = ROUNDS if self.options.rounds is None else self.options.rounds
        rows, filters = [], []
        parts = zip(problem.moments.gram, problem.target, _pd_terms(problem), strict=True)
        for gram, target, (points, values, taps) in parts:
            points, taps = points[:, :size].copy(), values[:, :size, None] * taps[:, :size]
            small = target.shape[1] <= ALTERNATED
            if rounds > (0 if small else 1):
                _refit(gram, target @ gram, points, taps, rounds if small else 0)
            rows.append(points)
            filters.append(taps)
        weights = (np.concatenate(rows), np.concatenate(filters))
        return problem.assembled(self.structure(problem.geometry, size), *weights)


@once
def _pd_terms(problem: Problem) -> list[tuple[Array, Array, Array]]:
    """For every group the terms of its slices: rows (m, K, n), singular values (m, K), filters (m, K, k²)."""
    n = problem.geometry.weight_shape[1]
    parts = zip(problem.moments.gram, problem.target, strict=True)
    return [_weighted_svd(gram, target.reshape(len(target), n, -1)) for gram, target in parts]


def _weighted_svd(gram: Array, slices: Array) -> tuple[Array, Array, Array]:
    """Rows (m, K, n), singular values (m, K) and filters (m, K, k²) of slices (m, n, k²), G ≈ A ⊗ B."""
    m, n, k = slices.shape
    blocks = gram.reshape(n, k, n, k)
    root_a, root_b = root(np.einsum("iaja->ij", blocks)), root(np.einsum("iaib->ab", blocks))
    u, values, vt = np.linalg.svd(root_a.T @ slices @ root_b, full_matrices=False)
    flat = u.transpose(0, 2, 1).reshape(-1, n)  # (m·K, n)
    rows = scipy.linalg.solve_triangular(root_a, flat.T, lower=True, trans="T", check_finite=False).T
    return rows.reshape(m, -1, n), values, vt @ np.linalg.inv(root_b)


def _refit(gram: Array, cross: Array, rows: Array, filters: Array, rounds: int) -> None:
    """Refit rows (m, T, n) and filters (m, T, k²) in turn, in place, filters last; cross = W* G (m, d)."""
    n = rows.shape[2]
    # every output needs the whole metric: it is transposed once, and used for several outputs together
    by_channel = np.ascontiguousarray(gram.reshape(-1, n, filters.shape[2]).swapaxes(0, 1)).reshape(n, -1)
    for start in range(0, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        for _ in range(rounds):
            filters[block] = _refit_filters(by_channel, cross[block], rows[block])
            rows[block] = [_refit_rows(gram, c, f) for c, f in zip(cross[block], filters[block], strict=True)]
        filters[block] = _refit_filters(by_channel, cross[block], rows[block])


def _refit_filters(by_channel: Array, cross: Array, rows: Array) -> Array:
    """Least squares for some outputs' filters (m, T, k²), rows (m, T, n) fixed; cross = W* G (m, d).

    ``by_channel`` (n, d·k²) is G with the channels of its second index first.
    """
    m, terms, n = rows.shape
    k = cross.shape[1] // n
    half = (rows.reshape(m * terms, n) @ by_channel).reshape(m, terms, n, k, k)
    # (m, T, n) · (m, n, k², T·k²): the Gram matrix of all terms' taps
    inner = rows @ half.transpose(0, 2, 3, 1, 4).reshape(m, n, -1)
    right = rows @ cross.reshape(m, n, k)
    solved = (solve(a.reshape(terms * k, -1), b.reshape(1, -1)) for a, b in zip(inner, right, strict=True))
    return np.stack([filters.reshape(terms, k) for filters in solved])


def _refit_rows(gram: Array, cross: Array, filters: Array) -> Array:
    """Least squares for one output's pointwise rows (T, n), filters (T, k²) fixed; cross = w* G (d,)."""
    terms, k = filters.shape
    n = len(gram) // k
    half = gram.reshape(-1, n, k) @ filters.T  # (d, n, T)
    inner = np.tensordot(filters, half.reshape(n, k, n * terms), (1, 1))  # (T, n, n·T)
    inner = inner.reshape(terms, n, n, terms).swapaxes(2, 3).reshape(terms * n, -1)
    right = (filters @ cross.reshape(n, k).T).reshape(1, -1)
    return solve(inner, right).reshape(terms, n)


def full_rank(geometry: ConvGeometry) -> int:
    """Return K of the DP form: the number of terms per channel at which the expansion is exact.

    >>> full_rank(ConvGeometry(64, 16, 3, 3))
    9
    """
    return min(geometry.kh * geometry.kw, geometry.n_o // geometry.groups)


@dataclass(frozen=True)
class Spectrum:
    """The terms of every slice, strongest first, in the metric of the layer's inputs.

    ``energy`` (groups, n, k²) are squared singular values, ``filters`` (groups, n, k², k²) the
    depthwise filter of each term in its rows; n = n_i / groups.
    """

    energy: Array
    filters: Array

    def order(self, uniform: bool = False) -> IntArray:
        """All terms of each group, strongest first, as channel · k² + term: (groups, n · k²).

        If ``uniform``, the first term of every channel, then the second, …
        """
        groups, n, depth = self.energy.shape
        if uniform:
            return np.broadcast_to(np.arange(n * depth).reshape(n, depth).T.ravel(), (groups, n * depth))
        return np.argsort(-comparable(self.energy.reshape(groups, -1)), axis=1, kind="stable")

    def ranks(self, terms: int, uniform: bool = False) -> IntArray:
        """Share ``terms`` per group among its channels in this order: ranks (n_i,), 0 included."""
        _, n, depth = self.energy.shape
        firsts = self.order(uniform)[:, :terms]
        return np.concatenate([np.bincount(o // depth, minlength=n) for o in firsts]).astype(np.int64)


@once
def spectrum(problem: Problem) -> Spectrum:
    """Singular values and vectors of every slice in the metric of its own channel's patches."""
    g = problem.geometry
    k = g.kh * g.kw
    target = problem.target
    factor = np.stack([_block_factors(gram, k) for gram in problem.moments.gram])  # G_ii = L Lᵀ
    groups, m, d = target.shape
    slices = target.reshape(groups, m, d // k, k).swapaxes(1, 2) @ factor  # (groups, n, m, k²)
    energy, vectors = np.linalg.eigh(slices.swapaxes(2, 3) @ slices)
    vectors = vectors[..., ::-1]
    filters = np.linalg.solve(factor.swapaxes(2, 3), vectors).swapaxes(2, 3)
    return Spectrum(np.maximum(energy[..., ::-1], 0.0), filters)


def mean_energy(energy: Array) -> Array:
    """Compute the cumulative shares of energies (…, K), averaged over the slices that have any: (K,).

    >>> mean_energy(np.array([[3.0, 1.0], [0.0, 0.0]]))
    array([0.75, 1.  ])
    """
    slices = energy.reshape(-1, energy.shape[-1])
    slices = slices[slices.sum(axis=1) > 0]
    shares = np.cumsum(slices, axis=1) / slices.sum(axis=1, keepdims=True)
    return shares.mean(axis=0) if len(slices) else np.ones(energy.shape[-1])


def error_curve(problem: Problem, terms: Spectrum, order: IntArray) -> Array:
    """Error left with the first R terms of ``order`` and the best pointwise stage, for every R at once.

    One Cholesky factorization of the terms' Gram matrix, in the order in which they are taken up,
    solves the nested least-squares problems of all R. Returns (n · k² + 1,), relative to the
    variance of the targets, summed over groups.
    """
    moments = problem.moments
    explained = np.zeros(order.shape[1] + 1)
    for i in range(problem.geometry.groups):
        if problem.white:  # terms are orthogonal, and each explains its own energy
            explained[1:] += np.cumsum(terms.energy[i].reshape(-1)[order[i]])
            continue
        gram, cross = _in_terms(terms.filters[i], moments.gram[i], moments.cross[i])
        gram, cross = gram[np.ix_(order[i], order[i])], cross[:, order[i]]
        gram.flat[:: len(gram) + 1] += 1e-12 * np.trace(gram) / len(gram) + TINY**0.5
        factor = scipy.linalg.cholesky(gram, lower=True, overwrite_a=True, check_finite=False)
        gains = scipy.linalg.solve_triangular(factor, cross.T, lower=True, check_finite=False)
        explained[1:] += np.cumsum(np.square(gains).sum(axis=1))
    power = max(float(moments.power.sum()), float(explained[-1]), TINY)
    return np.maximum(power - explained, 0.0) / power


def fit(problem: Problem, ranks: IntArray, sweeps: int = SWEEPS, block: int = BLOCK) -> Factorization:
    """Fit depthwise and pointwise stages with ``ranks`` (n_i,) terms per input channel.

    Terms start from the spectra of the slices; the pointwise stage is refitted to all of them together;
    block coordinate descent then improves both. The error never rises on the way. ``block`` channels share
    a matrix product, which changes rounding alone. Every group needs as many terms (ValueError).
    """
    g = problem.geometry
    per_group = ranks.reshape(g.groups, -1)
    if len(set(per_group.sum(axis=1))) != 1:
        raise ValueError("every group needs the same number of terms")
    start = spectrum(problem).filters
    filters, columns = [], []  # D (R, k²) and P (m, R) of every group
    for i in range(g.groups):
        gram, target = problem.moments.gram[i], problem.target[i]
        d = np.concatenate([f[:r] for f, r in zip(start[i], per_group[i], strict=True)])
        if problem.white:  # the truncated SVD of every slice, which is optimal
            p = _depthwise(target, d, per_group[i])
        else:
            p = _refit_pointwise(gram, target, d, per_group[i])
            d, p = _descend(gram, target, d, p, per_group[i], sweeps, block)
        filters.append(d)
        columns.append(p)
    structure = DepthwisePointwise().structure(g, int(per_group[0].sum()))
    weights = (np.concatenate(filters), np.concatenate(columns))
    return problem.assembled(structure, *weights, channels=np.arange(g.n_i).repeat(ranks))


def _block_factors(gram: Array, k: int) -> Array:
    """Compute the lower Cholesky factors of the diagonal blocks G_ii: (n, k, k)."""
    n = len(gram) // k
    return root(np.ascontiguousarray(np.einsum("aiaj->aij", gram.reshape(n, k, n, k))))


def _in_terms(filters: Array, gram: Array, cross: Array) -> tuple[Array, Array]:
    """Change the basis of G and C from taps to terms; filters (n, k², k²) hold a term per row."""
    n, k, _ = filters.shape
    d = n * k
    half = (filters @ gram.reshape(n, k, d)).reshape(d, d)
    gram = (filters @ np.ascontiguousarray(half.T).reshape(n, k, d)).reshape(d, d)
    cross = (filters @ np.ascontiguousarray(cross.T).reshape(n, k, -1)).reshape(d, -1).T
    return gram, cross


def _blocks(ranks: IntArray, k: int) -> Iterator[tuple[slice, slice]]:
    """Yield, for every channel with terms, the positions of its taps and of its terms.

    >>> [(int(taps.start), int(terms.start)) for taps, terms in _blocks(np.array([2, 0, 1]), 9)]
    [(0, 0), (18, 2)]
    """
    ends = np.cumsum(ranks)
    for i in np.flatnonzero(ranks):
        yield slice(i * k, i * k + k), slice(ends[i] - ranks[i], ends[i])


def _depthwise(matrix: Array, filters: Array, ranks: IntArray) -> Array:
    """Apply the depthwise stage to a matrix with one column per tap: (·, d) → (·, R)."""
    out = np.empty((len(matrix), len(filters)))
    for taps, terms in _blocks(ranks, filters.shape[1]):
        out[:, terms] = matrix[:, taps] @ filters[terms].T
    return out


def _refit_pointwise(gram: Array, target: Array, filters: Array, ranks: IntArray) -> Array:
    """Solve least squares for all pointwise columns together: W* G Dᵀ (D G Dᵀ)⁻¹, (m, R)."""
    half = _depthwise(gram, filters, ranks)  # G Dᵀ
    inner = _depthwise(np.ascontiguousarray(half.T), filters, ranks)  # D G Dᵀ
    return solve(inner, target @ half)


def _descend(
    gram: Array, target: Array, filters: Array, points: Array, ranks: IntArray, sweeps: int, block: int
) -> tuple[Array, Array]:
    """Block coordinate descent over input channels; each step is exact (DESIGN §4, DP fit).

    With the other channels fixed, the free optimum of channel i is W*_i + (Σ_{j≠i} E_j G_ji) G_ii⁻¹ with
    E = W* − Ŵ, and its best rank-T part in the metric G_ii = L Lᵀ comes from the eigenvectors of BᵀB,
    B = that optimum times L.
    """
    k = filters.shape[1]
    factors = _block_factors(gram, k)
    inverses = np.linalg.inv(factors)
    ends = np.cumsum(ranks)
    residual = target.copy()  # E = W* − Ŵ
    for taps, terms in _blocks(ranks, k):
        residual[:, taps] -= points[:, terms] @ filters[terms]
    filters, points = filters.copy(), points.copy()
    error = np.einsum("md,md->", residual @ gram, residual)  # tr E G Eᵀ
    for _ in range(sweeps):
        for first in range(0, len(ranks), block):
            last = min(first + block, len(ranks))
            columns = slice(first * k, last * k)
            product = residual @ gram[:, columns]  # E G before this block's steps
            change = np.zeros_like(product)  # of E by this block's steps
            for i in range(first, last):
                if not ranks[i]:
                    continue
                taps, terms = slice(i * k, i * k + k), slice(ends[i] - ranks[i], ends[i])
                local = slice(taps.start - columns.start, taps.stop - columns.start)  # taps, within the block
                before = residual[:, taps]
                # Σ_{j≠i} E_j G_ji
                pull = product[:, local] + change[:, : local.start] @ gram[columns, taps][: local.start]
                pull -= before @ gram[taps, taps]
                b = target[:, taps] @ factors[i] + pull @ inverses[i].T  # (·) G_ii⁻¹ L = (·) L⁻ᵀ
                v = np.linalg.eigh(b.T @ b)[1][:, : -ranks[i] - 1 : -1]
                points[:, terms] = b @ v
                filters[terms] = v.T @ inverses[i]
                after = target[:, taps] - points[:, terms] @ filters[terms]
                change[:, local] = after - before
                residual[:, taps] = after
        previous, error = error, np.einsum("md,md->", residual @ gram, residual)
        if previous - error <= SETTLED * previous:
            break
    return filters, points
