"""What could be done to each layer, and what each choice costs and loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netdecouple.convolution import ConvGeometry, Factorization
from netdecouple.families import Problem, decoupling
from netdecouple.families.decoupling import Spectrum
from netdecouple.families.ridge import best_ridge, held_back_error
from netdecouple.moments import Moments

LEVELS = 28
FEWEST = 0.04  # of the layer's own MACs: the smallest candidate
PROBES = (0.5, 0.2, 0.07)  # of the layer's own MACs: where errors and losses are measured, not predicted


@dataclass(frozen=True)
class Probe:
    """A candidate that was really fitted: its kernel, to be tried in the network, and its error."""

    terms: int
    weight: NDArray[np.float32]  # (n_o, n_i / groups, kh, kw)
    bias: NDArray[np.float32]  # (n_o,)
    error: float  # relative to the variance of the layer's output, on held-back inputs


@dataclass(frozen=True)
class LayerCandidates:
    """Every number of terms worth considering for one layer, with the error each leaves."""

    layer: str
    terms: tuple[int, ...]  # per group, falling
    errors: tuple[float, ...]  # relative, predicted for held-back inputs
    ranks: tuple[NDArray[np.uint8], ...]  # (n_i,): how the terms are shared among the channels
    probes: tuple[Probe, ...]


def term_levels(geometry: ConvGeometry, uniform: bool) -> tuple[int, ...]:
    """Numbers of terms per group that cost less than the layer, from many to few."""
    most = decoupling.break_even(geometry)
    if uniform:
        n = geometry.n_i // geometry.groups
        return tuple(n * t for t in range(most // n, 0, -1))
    shares = np.geomspace(0.97, FEWEST, LEVELS)
    dense = np.prod(geometry.weight_shape)
    levels = (shares * dense / decoupling.macs_per_term(geometry)).astype(int)
    return tuple(sorted({int(r) for r in levels if 1 <= r <= most}, reverse=True))


def ranks_of(spectrum: Spectrum, terms: int, uniform: bool) -> NDArray[np.int64]:
    """Ranks per input channel (n_i,) for ``terms`` per group."""
    return (
        spectrum.common_ranks(terms // spectrum.energy.shape[1]) if uniform else spectrum.pooled_ranks(terms)
    )


def _all_ranks(spectrum: Spectrum, levels: Sequence[int], uniform: bool) -> tuple[NDArray[np.uint8], ...]:
    return tuple(ranks_of(spectrum, terms, uniform).astype(np.uint8) for terms in levels)


def data_free_candidates(layer: str, problem: Problem, uniform: bool) -> LayerCandidates:
    """Candidates by truncated SVD of the weights alone; errors are relative to the weights' energy."""
    spectrum = decoupling.spectrum(problem)
    levels = term_levels(problem.geometry, uniform)
    order = _uniform_order(spectrum) if uniform else spectrum.order()
    curve = decoupling.error_curve(problem, spectrum, order)
    probes = []
    for terms in _probed(problem.geometry, levels, 1):
        fitted = decoupling.fit(problem, ranks_of(spectrum, terms, uniform), spectrum, sweeps=0)
        probes.append(_probe(terms, fitted, float(curve[terms])))
    ranks = _all_ranks(spectrum, levels, uniform)
    return LayerCandidates(layer, levels, tuple(float(curve[t]) for t in levels), ranks, tuple(probes))


def candidates(
    layer: str, problem: Problem, held_back: Moments, uniform: bool, probes: int
) -> LayerCandidates:
    """Candidates from the layer's moments; errors as they are on held-back inputs.

    The curve of fitted errors gives every number of terms in one pass; a few of them are fitted in
    full, and what those show on held-back inputs corrects the rest.
    """
    geometry = problem.geometry
    levels = term_levels(geometry, uniform)
    if not levels:
        return LayerCandidates(layer, (), (), (), ())
    probed = _probed(geometry, levels, probes)
    middle = probed[len(probed) // 2]

    def quick(p: Problem) -> Factorization:
        start = decoupling.spectrum(p)
        return decoupling.fit(p, ranks_of(start, middle, uniform), start, sweeps=0)

    regular = problem.regularized(best_ridge(problem, held_back, quick))
    spectrum = decoupling.spectrum(regular)
    order = _uniform_order(spectrum) if uniform else spectrum.order()
    curve = np.maximum(decoupling.error_curve(regular, spectrum, order), 1e-9)
    fitted = []
    for terms in probed:
        factorization = decoupling.fit(regular, ranks_of(spectrum, terms, uniform), spectrum, sweeps=1)
        error = held_back_error(problem, held_back, factorization) / max(
            held_back.variance, np.finfo(float).tiny
        )
        fitted.append(_probe(terms, factorization, max(error, 1e-9)))
    # correct the predicted curve by what the probes show, linearly in the logarithm of the error
    predicted = np.log([curve[p.terms] for p in fitted])
    shown = np.log([p.error for p in fitted])
    by_size = np.argsort(predicted)
    errors = np.exp(
        [
            np.log(curve[t]) + np.interp(np.log(curve[t]), predicted[by_size], (shown - predicted)[by_size])
            for t in levels
        ]
    )
    errors = np.maximum.accumulate(errors)
    ranks = _all_ranks(spectrum, levels, uniform)
    return LayerCandidates(layer, levels, tuple(float(e) for e in errors), ranks, tuple(fitted))


def _probe(terms: int, factorization: Factorization, error: float) -> Probe:
    return Probe(
        terms, factorization.dense().astype(np.float32), np.asarray(factorization.bias, np.float32), error
    )


def _probed(geometry: ConvGeometry, levels: tuple[int, ...], count: int) -> list[int]:
    dense = np.prod(geometry.weight_shape)
    shares = PROBES if count >= len(PROBES) else PROBES[1:2]
    wanted = [s * dense / decoupling.macs_per_term(geometry) for s in shares]
    nearest = [min(levels, key=lambda t: abs(t - w)) for w in wanted]
    return sorted(set(nearest), reverse=True)


def _uniform_order(spectrum: Spectrum) -> NDArray[np.int64]:
    """The first term of every channel, then the second, …: (groups, n · k²)."""
    groups, n, depth = spectrum.energy.shape
    order = np.arange(n * depth).reshape(n, depth).T.ravel()
    return np.broadcast_to(order, (groups, n * depth))
