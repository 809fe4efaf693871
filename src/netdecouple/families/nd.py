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

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.families import TINY, Array, Family, Problem, root, solve, with_best_bias
from netdecouple.families.ties import comparable

SWEEPS = 5
ROUNDS = 2  # of filters, rows, in the PD form
ALTERNATED = 1500  # unknowns per output up to which the rows of the PD form are refitted too
SETTLED = 5e-3  # a sweep that gains less than this share of the error is the last
BLOCK = 16  # channels whose share of the residual is computed in one matrix product


class DepthwisePointwise(Family):
    """ND in the DP form. Size: terms per group, shared among its channels.

    Args:
        uniform: every channel has the same number of terms; sizes are multiples of a group's channels.
        sweeps: of block coordinate descent; 0 is the closed form alone, and all there is to do data-free.
    """

    name = "nd-dp"

    def __init__(self, uniform: bool = False, sweeps: int | None = None) -> None:
        self._uniform = uniform
        self._sweeps = SWEEPS if sweeps is None else sweeps

    def exact(self, geometry: ConvGeometry) -> int:
        return full_rank(geometry) * geometry.n_i // geometry.groups

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        g, terms = geometry, size * geometry.groups
        depthwise = ConvGeometry(terms, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, terms)
        return Structure.of(g, depthwise, ConvGeometry(g.n_o, terms, 1, 1, groups=g.groups))

    def curve(self, problem: Problem) -> Array:
        terms = spectrum(problem)
        order = terms.uniform_order() if self._uniform else terms.order()
        return error_curve(problem, terms, order)[: self.exact(problem.geometry) + 1]

    def grain(self, geometry: ConvGeometry) -> int:
        return geometry.weight_shape[1] if self._uniform else 1

    def repeats(self, geometry: ConvGeometry) -> int:
        return geometry.kh * geometry.kw

    def energies(self, problem: Problem) -> Array:
        """The share of each slice's squared singular values in its first T, averaged over non-zero slices."""
        return mean_energy(spectrum(problem).energy)[: full_rank(problem.geometry)]

    def scaled(self, geometry: ConvGeometry, number: int) -> int:
        return number * geometry.n_i // geometry.groups

    def channels(self, problem: Problem, sizes: Sequence[int]) -> list[IntArray | None]:
        terms, everyone = spectrum(problem), np.arange(problem.geometry.n_i)
        return [everyone.repeat(self._ranks(terms, size)) for size in sizes]

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        start = spectrum(problem)
        if channels is None:
            ranks = self._ranks(start, size)
        else:
            ranks = np.bincount(channels, minlength=problem.geometry.n_i)
        return fit(problem, ranks, start, self._sweeps)

    def _ranks(self, terms: Spectrum, size: int) -> IntArray:
        return (
            terms.common_ranks(size // terms.energy.shape[1]) if self._uniform else terms.pooled_ranks(size)
        )


class PointwiseDepthwise(Family):
    """ND in the PD form. Size: terms T of every output channel.

    The closed form takes the metric as a product of one over channels and one over taps (DESIGN §4);
    depthwise filters and pointwise rows are then refitted in turn, each exactly: an output channel's
    terms are nobody else's. In large layers rows take too long, and only the filters are refitted.
    """

    name = "nd-pd"

    def __init__(self, rounds: int | None = None) -> None:
        self._rounds = ROUNDS if rounds is None else rounds

    def exact(self, geometry: ConvGeometry) -> int:
        return min(geometry.kh * geometry.kw, geometry.n_i // geometry.groups)

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        g, terms = geometry, size * geometry.n_o
        pointwise = ConvGeometry(terms, g.n_i, 1, 1, groups=g.groups)
        return Structure.of(
            g, pointwise, ConvGeometry(g.n_o, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, g.n_o)
        )

    def energies(self, problem: Problem) -> Array:
        """As in the DP form; a slice is the weight of one output channel."""
        return mean_energy(np.square(np.concatenate([values for _, values, _ in _pd_terms(problem)])))

    def curve(self, problem: Problem) -> Array:
        closed = PointwiseDepthwise(rounds=0)
        errors = [1.0]
        for size in range(1, self.exact(problem.geometry) + 1):
            fitted = closed.fit(problem, size)
            errors.append(problem.error(fitted) / problem.power)
        return np.minimum.accumulate(errors)

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        rows, filters = [], []
        parts = zip(problem.moments.gram, problem.target, _pd_terms(problem), strict=True)
        for gram, target, (points, values, taps) in parts:
            points, taps = points[:, :size].copy(), values[:, :size, None] * taps[:, :size]
            small = target.shape[1] <= ALTERNATED
            if self._rounds > (0 if small else 1):
                _refit(gram, target @ gram, points, taps, self._rounds if small else 0)
            rows.append(points)
            filters.append(taps)
        pointwise, depthwise = self.structure(problem.geometry, size).stages
        return with_best_bias(
            problem,
            (
                ConvStage(pointwise, np.concatenate(rows).reshape(pointwise.weight_shape)),
                ConvStage(depthwise, np.concatenate(filters).reshape(depthwise.weight_shape)),
            ),
        )


def _pd_terms(problem: Problem) -> list[tuple[Array, Array, Array]]:
    """For every group the terms of its slices: rows (m, K, n), singular values (m, K), filters (m, K, k²)."""
    n = problem.geometry.weight_shape[1]
    return problem.once(
        "nd-pd",
        lambda: [
            _weighted_svd(gram, target.reshape(len(target), n, -1))
            for gram, target in zip(problem.moments.gram, problem.target, strict=True)
        ],
    )


def _weighted_svd(gram: Array, slices: Array) -> tuple[Array, Array, Array]:
    """Rows (m, K, n), singular values (m, K) and filters (m, K, k²) of slices (m, n, k²), G ≈ A ⊗ B."""
    m, n, k = slices.shape
    blocks = gram.reshape(n, k, n, k)
    along, across = root(np.einsum("iaja->ij", blocks)), root(np.einsum("iaib->ab", blocks))
    left, values, right = np.linalg.svd(along.T @ slices @ across, full_matrices=False)
    flat = left.transpose(0, 2, 1).reshape(-1, n)  # (m·K, n)
    rows = scipy.linalg.solve_triangular(along, flat.T, lower=True, trans="T", check_finite=False).T
    return rows.reshape(m, -1, n), values, right @ np.linalg.inv(across)


def _refit(gram: Array, pulled: Array, rows: Array, filters: Array, rounds: int) -> None:
    """Refit rows (m, T, n) and filters (m, T, k²) in turn, in place, filters last; pulled = W* G (m, d)."""
    n = rows.shape[2]
    # every output reads the whole metric: it is turned once, and read for several together
    by_channel = np.ascontiguousarray(gram.reshape(-1, n, filters.shape[2]).swapaxes(0, 1)).reshape(n, -1)
    for start in range(0, len(rows), BLOCK):
        some = slice(start, start + BLOCK)
        for _ in range(rounds):
            filters[some] = _refit_filters(by_channel, pulled[some], rows[some])
            rows[some] = [_refit_rows(gram, *own) for own in zip(pulled[some], filters[some], strict=True)]
        filters[some] = _refit_filters(by_channel, pulled[some], rows[some])


def _refit_filters(by_channel: Array, pulled: Array, rows: Array) -> Array:
    """Least squares for some outputs' filters (m, T, k²), rows (m, T, n) fixed; pulled = W* G (m, d).

    ``by_channel`` (n, d·k²) is G with the channels of its second index first.
    """
    m, terms, n = rows.shape
    k = pulled.shape[1] // n
    seen = (rows.reshape(m * terms, n) @ by_channel).reshape(m, terms, n, k, k)
    # (m, T, n) · (m, n, k², T·k²): what each term's taps share with every other's
    inner = rows @ seen.transpose(0, 2, 3, 1, 4).reshape(m, n, -1)
    right = rows @ pulled.reshape(m, n, k)
    solved = (solve(a.reshape(terms * k, -1), b.reshape(1, -1)) for a, b in zip(inner, right, strict=True))
    return np.stack([filters.reshape(terms, k) for filters in solved])


def _refit_rows(gram: Array, pulled: Array, filters: Array) -> Array:
    """Least squares for one output's pointwise rows (T, n), filters (T, k²) fixed."""
    terms, k = filters.shape
    n = len(gram) // k
    seen = gram.reshape(-1, n, k) @ filters.T  # (d, n, T)
    inner = np.tensordot(filters, seen.reshape(n, k, n * terms), (1, 1))  # (T, n, n·T)
    inner = inner.reshape(terms, n, n, terms).swapaxes(2, 3).reshape(terms * n, -1)
    right = (filters @ pulled.reshape(n, k).T).reshape(1, -1)
    return solve(inner, right).reshape(terms, n)


def full_rank(geometry: ConvGeometry) -> int:
    """K of the DP form: the number of terms per channel at which the expansion is exact."""
    return min(geometry.kh * geometry.kw, geometry.n_o // geometry.groups)


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
        return np.argsort(-comparable(self.energy.reshape(len(self.energy), -1)), axis=1, kind="stable")

    def uniform_order(self) -> IntArray:
        """The first term of every channel, then the second, …: (groups, n · k²)."""
        groups, n, depth = self.energy.shape
        order = np.arange(n * depth).reshape(n, depth).T.ravel()
        return np.broadcast_to(order, (groups, n * depth))


def spectrum(problem: Problem) -> Spectrum:
    """Singular values and vectors of every slice in the metric of its own channel's patches."""
    return problem.once("nd-dp", lambda: _spectrum(problem))


def _spectrum(problem: Problem) -> Spectrum:
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


def mean_energy(energy: Array) -> Array:
    """Cumulative shares of energies (…, K), averaged over the slices that have any: (K,)."""
    slices = energy.reshape(-1, energy.shape[-1])
    slices = slices[slices.sum(axis=1) > 0]
    shares = np.cumsum(slices, axis=1) / slices.sum(axis=1, keepdims=True)
    return shares.mean(axis=0) if len(slices) else np.ones(energy.shape[-1])


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
        if problem.white:  # terms are orthogonal, and each explains its own energy
            explained[1:] += np.cumsum(terms.energy[i].reshape(-1)[order[i]])
            continue
        gram, cross = _in_terms(terms.filters[i], moments.gram[i], moments.cross[i])
        gram, cross = gram[np.ix_(order[i], order[i])], cross[:, order[i]]
        gram.flat[:: len(gram) + 1] += 1e-12 * np.trace(gram) / len(gram) + TINY**0.5
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
        if problem.white:  # the truncated SVD of every slice, which nothing can better
            points = _depthwise(aim, kept, per_group[i])
        else:
            points = _refit_pointwise(metric, aim, kept, per_group[i])
            kept, points = _descend(metric, aim, kept, points, per_group[i], sweeps)
        filters.append(kept)
        columns.append(points)
    return _assemble(problem, ranks, np.concatenate(filters), np.concatenate(columns))


def _assemble(problem: Problem, ranks: IntArray, filters: Array, columns: Array) -> Factorization:
    """Put filters (R, k²) and pointwise columns (n_o, R / groups) together as two stages and a bias."""
    g = problem.geometry
    depthwise, pointwise = DepthwisePointwise().structure(g, len(filters) // g.groups).stages
    stages = (
        ConvStage(depthwise, filters.reshape(depthwise.weight_shape), np.arange(g.n_i).repeat(ranks)),
        ConvStage(pointwise, columns.reshape(pointwise.weight_shape)),
    )
    return with_best_bias(problem, stages)


def _channel_factors(problem: Problem) -> Array:
    """Cholesky factors of the diagonal blocks G_ii: (groups, n, k², k²), lower."""
    k = problem.geometry.kh * problem.geometry.kw
    return np.stack([_block_factors(gram, k) for gram in problem.moments.gram])


def _block_factors(gram: Array, k: int) -> Array:
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
    return solve(gram, target @ seen)


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
