"""CP: channel pruning, some input channels dropped and the rest refitted by least squares.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017 (arXiv 1707.06168),
section 3.1. Instead of their LASSO, channels leave one after the other, those first without which the
refitted rest loses least: what each costs is known exactly from the inverse of the Gram matrix
(Hassibi and Stork 1993, for blocks of weights). No labels, no samples, only moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.families import TINY, Array, Family, Problem, solve, with_best_bias
from netdecouple.families.ties import comparable

AT_ONCE = 0.03  # of the channels that are left go in one step


class ChannelPruning(Family):
    """Size: input channels per group that are kept."""

    name = "cp"

    def exact(self, geometry: ConvGeometry) -> int:
        return geometry.n_i // geometry.groups

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        return Structure.of(geometry, replace(geometry, n_i=size * geometry.groups))

    def repeats(self, geometry: ConvGeometry) -> int:
        return 1

    def curve(self, problem: Problem) -> Array:
        losses = np.sum([losses for _, losses in _eliminations(problem)], axis=0)
        left = 0.0 if problem.white else 1 - _explained(problem) / problem.power
        added = np.concatenate([[0.0], np.cumsum(losses)]) / problem.power  # by channels gone
        return np.maximum(left + added[::-1], 0.0)

    def channels(self, problem: Problem, sizes: Sequence[int]) -> list[IntArray | None]:
        return [_kept(problem, size) for size in sizes]

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        g, count = problem.geometry, self.exact(problem.geometry)
        if channels is None:
            channels = _kept(problem, size)
        narrow = self.structure(g, size).stages[0]
        stage = ConvStage(narrow, np.zeros(narrow.weight_shape), channels)
        weights = []
        for i, taps in enumerate(_taps(channels.reshape(g.groups, -1) % count, g)):
            own = problem.target[i][:, taps]
            weights.append(own if problem.white else own + _made_up(problem, i, taps))
        stage = replace(
            stage,
            weight=np.stack(weights).reshape(narrow.weight_shape),
            channels=None if size == count else channels,
        )
        return with_best_bias(problem, (stage,))


def _kept(problem: Problem, size: int) -> IntArray:
    """The channels that go last, in their order: (size · groups,)."""
    orders = [order for order, _ in _eliminations(problem)]
    return np.concatenate([np.sort(o[len(o) - size :]) + i * len(o) for i, o in enumerate(orders)])


def _explained(problem: Problem) -> float:
    """What the unpruned fit explains of the targets' power."""
    return float(np.einsum("gmd,gmd->", problem.target @ problem.moments.gram, problem.target))


def _taps(channels: IntArray, g: ConvGeometry) -> IntArray:
    """Positions of whole channels (groups, c) in a patch: (groups, c · k²)."""
    size = g.kh * g.kw
    return (channels[..., None] * size + np.arange(size)).reshape(*channels.shape[:-1], -1)


def _made_up(problem: Problem, group: int, kept: IntArray) -> Array:
    """What the kept taps take over from the others: W*_d G_dk G_kk⁻¹ (m, kept)."""
    gram, target = problem.moments.gram[group], problem.target[group]
    dropped = np.setdiff1d(np.arange(len(gram)), kept)
    return solve(gram[np.ix_(kept, kept)], target[:, dropped] @ gram[np.ix_(dropped, kept)])


def _eliminations(problem: Problem) -> list[tuple[IntArray, Array]]:
    groups = range(problem.geometry.groups)
    return problem.once("cp", lambda: [_elimination(problem, i) for i in groups])


def _elimination(problem: Problem, group: int) -> tuple[IntArray, Array]:
    """The order in which channels go, first to last, and what each adds to the error: (n,), (n,)."""
    g = problem.geometry
    size = g.kh * g.kw
    gram, weight = problem.moments.gram[group], problem.target[group]
    if problem.white:  # nobody can take over from anybody
        norms = np.square(weight).reshape(len(weight), -1, size).sum(axis=(0, 2))
        weakest = np.argsort(comparable(norms), kind="stable")
        return weakest, norms[weakest]
    gram = gram + (1e-10 * np.trace(gram) / len(gram) + TINY**0.5) * np.eye(len(gram))
    inverse = np.linalg.inv(gram)
    left = np.arange(len(gram) // size)
    order: list[IntArray] = []
    losses: list[Array] = []
    while len(left):
        blocks = np.einsum("iaib->iab", inverse.reshape(len(left), size, len(left), size))
        own = weight.reshape(len(weight), len(left), size).transpose(1, 2, 0)  # (n, k², m)
        costs = np.einsum("nkm,nkm->n", own, np.linalg.solve(blocks, own))
        going = np.argsort(comparable(costs), kind="stable")[: max(1, int(AT_ONCE * len(left)))]
        taps = _taps(going, g)
        stay = np.setdiff1d(np.arange(len(inverse)), taps)
        share = np.linalg.solve(inverse[np.ix_(taps, taps)], inverse[taps])
        # together they cost more than each alone; the surplus is spread evenly
        moved = np.linalg.solve(inverse[np.ix_(taps, taps)], weight[:, taps].T)
        together = float(np.vdot(moved, weight[:, taps].T))
        order.append(left[going])
        losses.append(np.full(len(going), together / len(going)))
        weight = (weight - weight[:, taps] @ share)[:, stay]
        inverse = (inverse - inverse[:, taps] @ share)[np.ix_(stay, stay)]
        left = np.delete(left, going)
    return np.concatenate(order), np.concatenate(losses)
