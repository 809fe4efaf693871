"""SD: spatial decomposition, kh×1 to r channels, then 1×kw.

Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC 2014
(arXiv 1405.3866), scheme 2: the kernel, unfolded to (n_i·kh) × (n_o·kw), has low rank. The closed form
takes the inputs' metric as a product of one over (channel, row) and one over columns; conjugate
gradients on the first stage and least squares for the second then work in the metric itself.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from netdecouple.convolution import ConvGeometry, Factorization, IntArray, Structure
from netdecouple.families.base import Family, register
from netdecouple.families.linalg import TINY, Array, root, solve
from netdecouple.families.problem import Problem, once

ROUNDS = 3  # of first stage, second stage
STEPS = 4  # of conjugate gradients on the first stage
SETTLED = 5e-3  # a round whose first half gains less than this share of the error is the last


@register
class SpatialDecomposition(Family):
    """Size: channels per group between the two stages."""

    name = "sd"
    label = "spatial"
    description = "k×1, then 1×k"
    size_unit = "channels between them"
    source = "Jaderberg et al. 2014"
    order = 20

    def applies_to(self, geometry: ConvGeometry) -> bool:
        return 1 not in (geometry.kh, geometry.kw)

    def wide_ok(self, geometry: ConvGeometry) -> bool:
        return True

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
            first, energy = _first_stage(problem, i, self.exact(g))  # (r, n, kh), (r,)
            if problem.white:  # terms are orthogonal, and each explains its own energy
                explained[1:] += np.cumsum(energy)
                continue
            half, inner = _inputs(g, moments.gram[i], first)
            cross = problem.target[i] @ half
            gains = scipy.linalg.solve_triangular(root(inner), cross.T, lower=True, check_finite=False)
            explained[1:] += np.cumsum(np.square(gains).sum(axis=1).reshape(-1, g.kw).sum(axis=1))
        return np.maximum(1 - explained / problem.power, 0.0)

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        rounds = ROUNDS if self.options.rounds is None else self.options.rounds
        pairs = [_alternate(problem, i, size, rounds) for i in range(problem.geometry.groups)]
        weights = (np.stack(part) for part in zip(*pairs, strict=True))
        return problem.assembled(self.structure(problem.geometry, size), *weights)


def _factors(gram: Array, g: ConvGeometry) -> tuple[Array, Array]:
    """Compute the Cholesky factors of G ≈ A ⊗ B: A over (channel, row), B over columns."""
    blocks = gram.reshape(-1, g.kw, len(gram) // g.kw, g.kw)
    rows = np.einsum("iaja->ij", blocks) / g.kw
    columns = np.einsum("iaib->ab", blocks)
    return root(rows), root(columns / (np.trace(columns) / g.kw + TINY))


def _first_stage(problem: Problem, group: int, size: int) -> tuple[Array, Array]:
    """First stage (r, n, kh) of the weighted SVD, strongest terms first, and squared singular values (r,)."""
    terms, energy = _all_terms(problem)[group]
    return terms[:size].reshape(size, -1, problem.geometry.kh), energy[:size]


@once
def _all_terms(problem: Problem) -> list[tuple[Array, Array]]:
    return [_weighted_svd(problem, i) for i in range(problem.geometry.groups)]


def _weighted_svd(problem: Problem, group: int) -> tuple[Array, Array]:
    g, target = problem.geometry, problem.target[group]
    root_a, root_b = _factors(problem.moments.gram[group], g)
    kernel = target.reshape(len(target), -1, g.kh, g.kw)
    unfolded = kernel.transpose(1, 2, 0, 3).reshape(kernel.shape[1] * g.kh, -1)  # (n·kh, m·kw)
    weighted = root_a.T @ unfolded
    weighted = (weighted.reshape(len(weighted), -1, g.kw) @ root_b).reshape(weighted.shape)
    u, values, _ = np.linalg.svd(weighted, full_matrices=False)  # SciPy's keeps the GIL
    terms = scipy.linalg.solve_triangular(
        root_a, np.asfortranarray(u), lower=True, trans="T", check_finite=False
    )
    return np.ascontiguousarray(terms.T), np.square(values)


def _inputs(g: ConvGeometry, gram: Array, first: Array) -> tuple[Array, Array]:
    """Covariance of the patches with the inputs of the second stage (d, r·kw), and of these (r·kw, r·kw)."""
    cross = np.tensordot(gram.reshape(len(gram), -1, g.kh, g.kw), first, ((1, 2), (1, 2)))  # (d, kw, r)
    cross = cross.swapaxes(1, 2)  # (d, r, kw)
    inner = np.tensordot(first, cross.reshape(-1, g.kh, g.kw, len(first) * g.kw), ((1, 2), (0, 1)))
    return cross.reshape(len(cross), -1), inner.reshape(len(first) * g.kw, -1)


def _alternate(problem: Problem, group: int, size: int, rounds: int) -> tuple[Array, Array]:
    """Fit the first stage (r, n, kh) and the second (m, r, kw) in turn, each the best for the other."""
    g = problem.geometry
    gram, target = problem.moments.gram[group], problem.target[group]
    first, _ = _first_stage(problem, group, size)
    if problem.white:  # the truncated SVD, which is optimal
        kernel = target.reshape(len(target), -1, g.kh, g.kw)
        return _balanced(first, np.tensordot(kernel, first, ((1, 2), (1, 2))).swapaxes(1, 2))
    second = _second_stage(g, gram, target, first)
    preconditioner = _factors(gram, g)[0]
    for _ in range(rounds):
        first, gain = _conjugate_gradients(g, gram, target, first, second, preconditioner)
        first, second = _balanced(first, second)
        second = _second_stage(g, gram, target, first)
        if gain < SETTLED:
            break
    return _balanced(first, second)


def _second_stage(g: ConvGeometry, gram: Array, target: Array, first: Array) -> Array:
    """Solve least squares for the second stage: (m, r, kw)."""
    half, inner = _inputs(g, gram, first)
    return solve(inner, target @ half).reshape(len(target), len(first), g.kw)


def _balanced(first: Array, second: Array) -> tuple[Array, Array]:
    """The same kernel with orthonormal second stages: an error of the first is then one of the output."""
    size = len(first)
    stacked = second.swapaxes(1, 2).reshape(-1, size)  # (m·kw, r)
    q, r = np.linalg.qr(stacked)
    columns = q.reshape(len(second), -1, q.shape[1]).swapaxes(1, 2)
    return (r @ first.reshape(size, -1)).reshape(-1, *first.shape[1:]), columns


def _conjugate_gradients(
    g: ConvGeometry, gram: Array, target: Array, x: Array, second: Array, factor: Array
) -> tuple[Array, float]:
    """Improve the first stage x (r, n, kh) by preconditioned conjugate gradients, the second stage fixed.

    Solves SᵀS x = Sᵀ W* in the metric G, in which S composes x with the second stage to a kernel (m, d).
    Returns x and the share of the error that the steps remove; the error never rises.
    """

    def compose(x: Array) -> Array:  # S: (r, n, kh) → (m, d)
        return np.tensordot(second, x, (1, 0)).transpose(0, 2, 3, 1).reshape(len(second), -1)

    def adjoint(kernel: Array) -> Array:  # Sᵀ: (m, d), already multiplied by G → (r, n, kh)
        return np.tensordot(second, kernel.reshape(len(kernel), -1, g.kh, g.kw), ((0, 2), (0, 3)))

    def precondition(r: Array) -> Array:  # M⁻¹ r, M = A of G ≈ A ⊗ B
        flat = r.reshape(len(r), -1).T
        z: Array = scipy.linalg.cho_solve((factor, True), flat, check_finite=False)
        return z.T.reshape(r.shape)

    missing = target - compose(x)
    weighted = missing @ gram
    error, gained = float(np.vdot(missing, weighted)), 0.0
    r = adjoint(weighted)
    p = precondition(r)
    rz = float(np.vdot(r, p))  # rᵀ M⁻¹ r
    for _ in range(STEPS):
        ap = adjoint(compose(p) @ gram)
        p_ap = float(np.vdot(p, ap))
        if not p_ap > 0 or not rz > 0:
            break
        gain = rz * (rz / p_ap)  # not rz² / pᵀAp, as rz² may overflow
        if gain < SETTLED / STEPS * error:
            break
        gained += gain
        alpha = rz / p_ap
        x = x + alpha * p
        r = r - alpha * ap
        z = precondition(r)
        rz, previous = float(np.vdot(r, z)), rz
        beta = rz / previous
        p = z + beta * p
    return x, gained / max(error, TINY)
