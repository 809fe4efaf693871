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
            first, energy = _first_stage(problem, i, self.exact(g))  # (r, n·kh), (r,)
            if problem.white:  # terms are orthogonal, and each explains its own energy
                explained[1:] += np.cumsum(energy)
                continue
            inner = _inner(first, _products(g, moments.gram[i], first))
            cross = _cross(g, moments.cross[i], first)
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
    """First stage (r, n·kh) of the weighted SVD, strongest terms first, and squared singular values (r,)."""
    terms, energy = _all_terms(problem)[group]
    return terms[:size], energy[:size]


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


def _products(g: ConvGeometry, gram: Array, first: Array) -> Array:
    """Covariance of the inputs of the second stage, at each of its kw taps, with the patches: (r, kw, d)."""
    return (first @ gram.reshape(len(gram) // g.kw, -1)).reshape(len(first), g.kw, -1)


def _inner(first: Array, products: Array) -> Array:
    """Covariance of the inputs of the second stage with each other: (r·kw, r·kw)."""
    r, kw, _ = products.shape
    columns = products.reshape(r * kw, -1, kw)
    inner = np.stack([first @ columns[:, :, tap].T for tap in range(kw)], axis=1)  # (r, kw, r·kw)
    return inner.reshape(r * kw, -1)


def _cross(g: ConvGeometry, cross: Array, first: Array) -> Array:
    """Covariance of the targets with the inputs of the second stage: (m, r·kw)."""
    by_tap = np.tensordot(cross.reshape(len(cross), -1, g.kw), first, (1, 1))  # (m, kw, r)
    return by_tap.swapaxes(1, 2).reshape(len(cross), -1)


def _alternate(problem: Problem, group: int, size: int, rounds: int) -> tuple[Array, Array]:
    """Fit the first stage (r, n·kh) and the second (m, r, kw) in turn, each the best for the other.

    The metric enters through `_products` of the first stage alone, and one product of that kind per step of
    conjugate gradients: far fewer operations than with whole kernels where r is less than m.
    """
    g, moments = problem.geometry, problem.moments
    gram, cross = moments.gram[group], moments.cross[group]
    first, _ = _first_stage(problem, group, size)
    if problem.white:  # the truncated SVD, which is optimal
        return _balanced(first, _cross(g, problem.target[group], first).reshape(len(cross), -1, g.kw))[:2]
    power = float(np.vdot(problem.target[group], cross))
    products = _products(g, gram, first)
    second, explained = _second_stage(g, cross, first, products)
    preconditioner = _factors(gram, g)[0]
    for _ in range(rounds):
        error = max(power - explained, TINY)
        first, products, gain = _conjugate_gradients(
            problem, group, first, products, second, preconditioner, error
        )
        first, second, change = _balanced(first, second)
        products = np.tensordot(change, products, 1)
        second, explained = _second_stage(g, cross, first, products)
        if gain < SETTLED:
            break
    return _balanced(first, second)[:2]


def _second_stage(g: ConvGeometry, cross: Array, first: Array, products: Array) -> tuple[Array, float]:
    """Solve least squares for the second stage (m, r, kw); and how much of the targets it explains."""
    right = _cross(g, cross, first)
    second = solve(_inner(first, products), right)
    return second.reshape(len(cross), len(first), g.kw), float(np.vdot(second, right))


def _balanced(first: Array, second: Array) -> tuple[Array, Array, Array]:
    """The same kernel with orthonormal second stages: an error of the first is then one of the output.

    The third result (r, r) is what the first stage has been multiplied with.
    """
    size = len(first)
    stacked = second.swapaxes(1, 2).reshape(-1, size)  # (m·kw, r)
    q, r = np.linalg.qr(stacked)
    return r @ first, q.reshape(len(second), -1, q.shape[1]).swapaxes(1, 2), r


def _conjugate_gradients(
    problem: Problem, group: int, x: Array, products: Array, second: Array, factor: Array, error: float
) -> tuple[Array, Array, float]:
    """Improve the first stage x (r, n·kh) by preconditioned conjugate gradients, the second stage fixed.

    Solves Sᵀ(S x G) = Sᵀ(C), in which S composes x with the second stage to a kernel (m, d), G is the Gram
    matrix, and C = W* G the covariance of targets and patches. Returns x, its `_products`, and the share of
    the ``error`` that the steps remove; the error never rises.
    """
    g, gram, cross = problem.geometry, problem.moments.gram[group], problem.moments.cross[group]
    # Sᵀ S: every pair of inputs of the second stage, by what its weights have in common
    flat = second.reshape(len(second), -1)
    overlap = (flat.T @ flat).reshape(len(x), g.kw, -1)  # (r, kw, r·kw)

    def applied(products: Array) -> Array:  # Sᵀ(S x G) from the products of x: (r, n·kh)
        columns = products.reshape(overlap.shape[2], -1, g.kw)
        total: Array = np.sum([overlap[:, tap] @ columns[:, :, tap] for tap in range(g.kw)], axis=0)
        return total

    def precondition(r: Array) -> Array:  # M⁻¹ r, M = A of G ≈ A ⊗ B
        z: Array = scipy.linalg.cho_solve((factor, True), r.T, check_finite=False).T
        return z

    wanted = np.tensordot(second, cross.reshape(len(cross), -1, g.kw), ((0, 2), (0, 2)))
    r = wanted - applied(products)
    gained = 0.0
    p = precondition(r)
    rz = float(np.vdot(r, p))  # rᵀ M⁻¹ r
    for _ in range(STEPS):
        p_products = _products(g, gram, p)
        ap = applied(p_products)
        p_ap = float(np.vdot(p, ap))
        if not p_ap > 0 or not rz > 0:
            break
        alpha = rz / p_ap
        gain = rz * alpha  # not rz² / pᵀAp, as rz² may overflow
        if gain < SETTLED / STEPS * error:
            break
        gained += gain
        x = x + alpha * p
        products = products + alpha * p_products
        r = r - alpha * ap
        z = precondition(r)
        rz, previous = float(np.vdot(r, z)), rz
        p = z + (rz / previous) * p
    return x, products, gained / error
