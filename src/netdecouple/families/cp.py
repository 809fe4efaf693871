"""CP: channel pruning, some input channels dropped and the rest refitted by least squares.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017 (arXiv 1707.06168),
section 3.1. Instead of their LASSO, channels are dropped step by step, first those whose loss is least once
the others are refitted. The inverse of the Gram matrix gives that loss exactly (Hassibi and Stork 1993, for
blocks of weights). Needs moments only, no labels and no samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from netdecouple.convolution import ConvGeometry, Factorization, IntArray, Structure
from netdecouple.families.base import Family, register
from netdecouple.families.linalg import TINY, Array, comparable, solve
from netdecouple.families.problem import Problem, once

PER_STEP = 0.03  # of the remaining channels are dropped in one step


@register
class ChannelPruning(Family):
    """Size: input channels per group that are kept."""

    name = "cp"
    label = "pruning"
    description = "k×k on some of its input channels"
    size_unit = "channels kept"
    source = "He et al. 2017"
    order = 30
    prunes_inputs = True
    for_upsampling = True

    def applies_to(self, geometry: ConvGeometry) -> bool:
        return True

    def exact(self, geometry: ConvGeometry) -> int:
        return geometry.n_i // geometry.groups

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        return Structure.of(geometry, replace(geometry, n_i=size * geometry.groups))

    def repeats(self, geometry: ConvGeometry) -> int:
        return 1

    def curve(self, problem: Problem) -> Array:
        losses = np.sum([losses for _, losses in _eliminations(problem)], axis=0)
        unexplained = 0.0
        if not problem.white:  # the fit with all channels explains tr W* G W*ᵀ
            explained = np.einsum("gmd,gmd->", problem.target @ problem.moments.gram, problem.target)
            unexplained = 1 - float(explained) / problem.power
        added = np.concatenate([[0.0], np.cumsum(losses)]) / problem.power  # by number of dropped channels
        return np.maximum(unexplained + added[::-1], 0.0)

    def channels(self, problem: Problem, sizes: Sequence[int]) -> list[IntArray | None]:
        return [_kept(problem, size) for size in sizes]

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        g, count = problem.geometry, self.exact(problem.geometry)
        if channels is None:
            channels = _kept(problem, size)
        weights = []
        for i, taps in enumerate(_taps(channels.reshape(g.groups, -1) % count, g.kh * g.kw)):
            weight = problem.target[i][:, taps]
            weights.append(weight if problem.white else weight + _compensation(problem, i, taps))
        selected = None if size == count else channels
        return problem.assembled(self.structure(g, size), np.stack(weights), channels=selected)


def _kept(problem: Problem, size: int) -> IntArray:
    """Return the channels that are dropped last, in their own order: (size · groups,)."""
    orders = [order for order, _ in _eliminations(problem)]
    return np.concatenate([np.sort(o[len(o) - size :]) + i * len(o) for i, o in enumerate(orders)])


def _taps(channels: IntArray, k: int) -> IntArray:
    """Return the positions of whole channels (…, c) in a patch with k taps per channel: (…, c · k).

    >>> _taps(np.array([0, 2]), 3)
    array([0, 1, 2, 6, 7, 8])
    """
    return (channels[..., None] * k + np.arange(k)).reshape(*channels.shape[:-1], -1)


def _compensation(problem: Problem, group: int, kept: IntArray) -> Array:
    """Compute by how much the kept taps make up for the dropped ones: W*_d G_dk G_kk⁻¹ (m, kept)."""
    gram, target = problem.moments.gram[group], problem.target[group]
    dropped = np.setdiff1d(np.arange(len(gram)), kept)
    return solve(gram[np.ix_(kept, kept)], target[:, dropped] @ gram[np.ix_(dropped, kept)])


@once
def _eliminations(problem: Problem) -> list[tuple[IntArray, Array]]:
    return [_elimination(problem, i) for i in range(problem.geometry.groups)]


def _elimination(problem: Problem, group: int) -> tuple[IntArray, Array]:
    """Order channels from first to last dropped, with the squared error that each adds: (n,), (n,).

    With H = G⁻¹, dropping the taps q adds tr W_q (H_qq)⁻¹ W_qᵀ and changes the other weights by
    −W_q (H_qq)⁻¹ H_q (Hassibi and Stork 1993, eq. 5).
    """
    k = problem.geometry.kh * problem.geometry.kw
    gram, weight = problem.moments.gram[group], problem.target[group]
    if problem.white:  # no channel can make up for another
        norms = np.square(weight).reshape(len(weight), -1, k).sum(axis=(0, 2))
        weakest = np.argsort(comparable(norms), kind="stable")
        return weakest, norms[weakest]
    gram = gram + (1e-10 * np.trace(gram) / len(gram) + TINY**0.5) * np.eye(len(gram))
    h = np.linalg.inv(gram)
    remaining = np.arange(len(gram) // k)
    order: list[IntArray] = []
    losses: list[Array] = []
    while n := len(remaining):
        blocks = np.einsum("iaib->iab", h.reshape(n, k, n, k))
        by_channel = weight.reshape(len(weight), n, k).transpose(1, 2, 0)  # (n, k², m)
        costs = np.einsum("nkm,nkm->n", by_channel, np.linalg.solve(blocks, by_channel))
        dropped = np.argsort(comparable(costs), kind="stable")[: max(1, int(PER_STEP * n))]
        q = _taps(dropped, k)
        rest = np.delete(np.arange(len(h)), q)
        of_q, others = h[q], h.take(rest, axis=0)
        w_q = weight[:, q]
        solved = np.linalg.solve(of_q[:, q], np.hstack([of_q[:, rest], w_q.T]))
        share = solved[:, : len(rest)]  # (H_qq)⁻¹ H_q
        # dropped together they cost more than each alone; the surplus is spread evenly
        together = float(np.vdot(solved[:, len(rest) :], w_q.T))
        order.append(remaining[dropped])
        losses.append(np.full(len(dropped), together / len(dropped)))
        weight = weight[:, rest] - w_q @ share
        h = others.take(rest, axis=1) - others[:, q] @ share
        remaining = np.delete(remaining, dropped)
    return np.concatenate(order), np.concatenate(losses)
