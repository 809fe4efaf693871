"""SD: spatial decomposition, kh×1 to r channels, then 1×kw.

Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014
(arXiv 1405.3866), scheme 2: the kernel, unfolded to (n_i·kh) × (n_o·kw), has low rank. The closed form
takes the inputs' metric as a product of one over (channel, row) and one over columns; conjugate
gradients on the first stage and least squares for the second then work in the metric itself.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.families import TINY, Array, Family, Problem, root, solve, with_best_bias

ROUNDS = 3  # of first stage, second stage
STEPS = 4  # of conjugate gradients on the first stage
SETTLED = 5e-3  # a round whose first half gains less than this share of the error is the last


class SpatialDecomposition(Family):
    """Size: channels per group between the two stages."""

    name = "sd"

    def __init__(self, rounds: int | None = None) -> None:
        self._rounds = ROUNDS if rounds is None else rounds

    def exact(self, geometry: ConvGeometry) -> int:
        groups = geometry.groups
        return min(geometry.n_i // groups * geometry.kh, geometry.n_o // groups * geometry.kw)

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        g, middle = geometry, size * geometry.groups
        (top, left, bottom, right), (sh, sw), (dh, dw) = g.pads, g.strides, g.dilations
        rows = ConvGeometry(middle, g.n_i, g.kh, 1, (sh, 1), (top, 0, bottom, 0), (dh, 1), g.groups)
        columns = ConvGeometry(g.n_o, middle, 1, g.kw, (1, sw), (0, left, 0, right), (1, dw), g.groups)
        return Structure.of(g, rows, columns)

    def curve(self, problem: Problem) -> Array:
        """One Cholesky factorization of the Gram matrix of all terms solves every size at once."""
        g, moments = problem.geometry, problem.moments
        explained = np.zeros(self.exact(g) + 1)
        for i in range(g.groups):
            terms, energy = _rows(problem, i, self.exact(g))  # (r, n, kh), (r,)
            if problem.white:  # terms are orthogonal, and each explains its own energy
                explained[1:] += np.cumsum(energy)
                continue
            seen = _second_inputs(g, moments.gram[i], terms)  # (d, r, kw)
            gram = np.tensordot(terms, seen.reshape(-1, g.kh, g.kw, len(terms) * g.kw), ((1, 2), (0, 1)))
            gram = gram.reshape(len(terms) * g.kw, -1)
            cross = problem.target[i] @ seen.reshape(len(seen), -1)
            factor = root(gram)
            gains = scipy.linalg.solve_triangular(factor, cross.T, lower=True, check_finite=False)
            explained[1:] += np.cumsum(np.square(gains).sum(axis=1).reshape(-1, g.kw).sum(axis=1))
        return np.maximum(1 - explained / problem.power, 0.0)

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        pairs = [_alternate(problem, i, size, self._rounds) for i in range(problem.geometry.groups)]
        first, second = (np.stack(part) for part in zip(*pairs, strict=True))
        rows, columns = self.structure(problem.geometry, size).stages
        return with_best_bias(
            problem,
            (
                ConvStage(rows, first.reshape(rows.weight_shape)),
                ConvStage(columns, second.reshape(columns.weight_shape)),
            ),
        )


def _unfolded(target: Array, g: ConvGeometry) -> Array:
    """Kernel (m, n·kh·kw) as (n·kh) × (m·kw)."""
    kernel = target.reshape(len(target), -1, g.kh, g.kw)
    return kernel.transpose(1, 2, 0, 3).reshape(kernel.shape[1] * g.kh, -1)


def _factors(gram: Array, g: ConvGeometry) -> tuple[Array, Array]:
    """Cholesky factors of G ≈ A ⊗ B: A over (channel, row), B over columns."""
    blocks = gram.reshape(-1, g.kw, len(gram) // g.kw, g.kw)
    rows = np.einsum("iaja->ij", blocks) / g.kw
    columns = np.einsum("iaib->ab", blocks)
    return root(rows), root(columns / (np.trace(columns) / g.kw + TINY))


def _rows(problem: Problem, group: int, size: int) -> tuple[Array, Array]:
    """The first stage (r, n, kh) from the weighted SVD, strongest first, and squared singular values (r,)."""
    terms, energy = problem.once(f"sd {group}", lambda: _all_rows(problem, group))
    return terms[:size].reshape(size, -1, problem.geometry.kh), energy[:size]


def _all_rows(problem: Problem, group: int) -> tuple[Array, Array]:
    g = problem.geometry
    along, across = _factors(problem.moments.gram[group], g)
    unfolded = along.T @ _unfolded(problem.target[group], g)
    weighted = (unfolded.reshape(len(unfolded), -1, g.kw) @ across).reshape(unfolded.shape)
    left, values, _ = np.linalg.svd(weighted, full_matrices=False)  # SciPy's stops other threads
    left = np.asfortranarray(left)
    terms = scipy.linalg.solve_triangular(along, left, lower=True, trans="T", check_finite=False)
    return np.ascontiguousarray(terms.T), np.square(values)


def _second_inputs(g: ConvGeometry, gram: Array, first: Array) -> Array:
    """Covariance of the patches with what the second stage reads: (d, r, kw)."""
    seen = np.tensordot(gram.reshape(len(gram), -1, g.kh, g.kw), first, ((1, 2), (1, 2)))  # (d, kw, r)
    return seen.swapaxes(1, 2)


def _alternate(problem: Problem, group: int, size: int, rounds: int) -> tuple[Array, Array]:
    """First stage (r, n, kh) and second (m, r, kw): each in turn the best for the other."""
    g = problem.geometry
    gram, target = problem.moments.gram[group], problem.target[group]
    first, _ = _rows(problem, group, size)
    if problem.white:  # the truncated SVD, which nothing can better
        kernel = target.reshape(len(target), -1, g.kh, g.kw)
        return _balanced(first, np.tensordot(kernel, first, ((1, 2), (1, 2))).swapaxes(1, 2))
    second = _second(g, gram, target, first)
    preconditioner = _factors(gram, g)[0]
    for _ in range(rounds):
        first, gain = _improved(g, gram, target, first, second, preconditioner)
        first, second = _balanced(first, second)
        second = _second(g, gram, target, first)
        if gain < SETTLED:
            break
    return _balanced(first, second)


def _second(g: ConvGeometry, gram: Array, target: Array, first: Array) -> Array:
    """Least squares for the second stage: (m, r, kw)."""
    seen = _second_inputs(g, gram, first)
    inner = np.tensordot(first, seen.reshape(-1, g.kh, g.kw, len(first) * g.kw), ((1, 2), (0, 1)))
    fitted: Array = solve(inner.reshape(len(first) * g.kw, -1), target @ seen.reshape(len(seen), -1))
    return fitted.reshape(len(target), len(first), g.kw)


def _balanced(first: Array, second: Array) -> tuple[Array, Array]:
    """The same kernel with orthonormal second stages: an error of the first is then one of the output."""
    size = len(first)
    stacked = second.swapaxes(1, 2).reshape(-1, size)  # (m·kw, r)
    basis, upper = np.linalg.qr(stacked)
    columns = basis.reshape(len(second), -1, basis.shape[1]).swapaxes(1, 2)
    return (upper @ first.reshape(size, -1)).reshape(-1, *first.shape[1:]), columns


def _improved(
    g: ConvGeometry, gram: Array, target: Array, first: Array, second: Array, factor: Array
) -> tuple[Array, float]:
    """Conjugate gradients on the first stage, and the share of the error they remove; it never rises."""

    def composed(stage: Array) -> Array:  # (r, n, kh) → (m, d)
        return np.tensordot(second, stage, (1, 0)).transpose(0, 2, 3, 1).reshape(len(second), -1)

    def pulled(kernel: Array) -> Array:  # (m, d), in the metric → (r, n, kh): the adjoint of composing
        return np.tensordot(second, kernel.reshape(len(kernel), -1, g.kh, g.kw), ((0, 2), (0, 3)))

    def conditioned(gradient: Array) -> Array:
        flat = gradient.reshape(len(gradient), -1).T
        turned: Array = scipy.linalg.cho_solve((factor, True), flat, check_finite=False)
        return turned.T.reshape(gradient.shape)

    missing = target - composed(first)
    weighted = missing @ gram
    error, gained = float(np.vdot(missing, weighted)), 0.0
    left = pulled(weighted)
    step = conditioned(left)
    size = float(np.vdot(left, step))
    for _ in range(STEPS):
        curved = pulled(composed(step) @ gram)
        bend = float(np.vdot(step, curved))
        if not bend > 0 or not size > 0:
            break
        gain = size * (size / bend)  # its square may overflow
        if gain < SETTLED / STEPS * error:
            break
        gained += gain
        first = first + size / bend * step
        left = left - size / bend * curved
        better = conditioned(left)
        size, before = float(np.vdot(left, better)), size
        step = better + size / before * step
    return first, gained / max(error, TINY)
