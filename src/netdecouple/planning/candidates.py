"""The candidates of each layer, with their costs and predicted errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from netdecouple.convolution import ConvGeometry, Factorization, Structure
from netdecouple.errors import BudgetError
from netdecouple.families import Problem
from netdecouple.families.base import groups, reference, registered
from netdecouple.families.chain import Step, Trial, method, methods, pareto, sizes_for
from netdecouple.families.linalg import TINY, Array
from netdecouple.fitting.ridge import best_ridge, held_out_error
from netdecouple.moments import Moments
from netdecouple.network import Layer
from netdecouple.planning.cost import Macs, Parameters, parse_share

FLOOR = 1e-9  # errors below are rounding
LEVELS = 28  # of a single family
FEWEST = 0.04  # of the layer's MACs: the smallest candidate, not too far from the least probe
INNER, OUTER = 10, 6  # levels of the innermost family of a combination, and of every other
PROBES = (0.5, 0.2, 0.07)  # of the layer's MACs: where errors and losses are measured, not predicted
HOPELESS = 1.3  # times the least error at the same MACs: not worth timing or combining further
LARGE = 1500  # unknowns per output beyond which only quick methods are tried, if there are any


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with concrete sizes, for one layer."""

    method: str
    steps: tuple[Step, ...]
    structure: Structure
    relative_error: float  # to the variance of the layer's output, predicted for held-out inputs
    loss: float = 0.0  # predicted divergence of the network's outputs if only this layer changes
    objective: float = 0.0  # the same with a margin (`sensitivity.MARGIN`): what the choice minimises

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(step.size for step in self.steps)


@dataclass(frozen=True)
class Probe:
    """A fitted candidate: its kernel, to be run in the network, and its measured error."""

    weight: NDArray[np.float32]  # (n_o, n_i / groups, kh, kw)
    bias: NDArray[np.float32]  # (n_o,)
    relative_error: float  # to the variance of the layer's output, on held-out inputs


@dataclass(frozen=True, kw_only=True)
class LayerCandidates:
    """The candidates and probes of one layer."""

    layer: str
    candidates: tuple[Candidate, ...] = ()
    probes: tuple[Probe, ...] = ()
    data_free: bool = False  # errors are in the metric of the weights
    ridge: float = 0.0  # of a wide layer, where choosing it again would take long and change next to nothing


@dataclass(frozen=True)
class Rule:
    """One method of one size, energy or share for every layer, instead of a plan for a budget.

    ``kind`` is "size" (T of ND; ranks or channels of the other families), "energy" (the least size that keeps
    this share of the energy) or "share" (of the layer's MACs).
    """

    method: str
    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read "nd-dp:T=4", "cd:rank=32", "nd:energy=0.8", "sd:2x" or "cd+nd:40%".

        Raises:
            BudgetError: the text is none of these.
        """
        name, _, rest = text.partition(":")
        try:
            chosen = method(name)
            key, equals, number = rest.partition("=")
            if not equals:
                return cls(chosen.name, "share", parse_share(rest))
            value = float(number)
            kind = {"T": "size", "rank": "size", "channels": "size", "energy": "energy"}[key]
        except (ValueError, KeyError, BudgetError) as error:
            raise BudgetError(
                f"rule={text!r}: write a method and its size, energy or share of the MACs, like nd-dp:T=4, "
                f"cd:rank=32, cp:channels=32, nd:energy=0.8, sd:2x or cd+nd:40% ({error})"
            ) from error
        if len(chosen.families) > 1:
            raise BudgetError(f"rule={text!r}: combinations take a share of the MACs, like {name}:2x")
        if not (value >= 1 and value == int(value) if kind == "size" else 0 < value <= 1):
            raise BudgetError(f"rule={text!r}: {number} is no {key}")
        return cls(chosen.name, kind, value)

    @property
    def is_uniform(self) -> bool:
        """Whether every channel has the same number of terms, as sizes and energies mean it."""
        return self.kind != "share"

    def __str__(self) -> str:
        value = f"{100 * self.value:.4g}% MACs" if self.kind == "share" else f"{self.kind} {self.value:g}"
        return f"{self.method}, {value} in every layer"


def parse_families(text: str) -> tuple[str, ...]:
    """Read "nd,sd,cd,cp", "paper", "all", or methods in full, as in `families.chain.methods`.

    Raises:
        BudgetError: a name is unknown or empty.
    """
    try:
        return methods([part.strip() for part in text.split(",")])
    except ValueError as error:
        raise BudgetError(
            f"families={text!r}: {error}; write {','.join(groups())}, paper, all, or methods like sd+nd-dp"
        ) from error


def least_cost(layer: Layer, cost: Macs | Parameters) -> int:
    """Return the least cost of a layer, as it is or changed by a single family at size 1."""
    costs = [cost.dense(layer)]
    if layer.geometry is not None:
        steps = (Step(1),)
        for name in applicable(layer):
            structure = method(name).structure(layer.geometry, steps)
            smallest = Candidate(method=name, steps=steps, structure=structure, relative_error=1.0)
            costs.append(cost.decoupled(layer, smallest))
    return min(costs)


def candidates(
    layer: Layer,
    problem: Problem,
    held_out: Moments | None,
    methods: Sequence[str],
    uniform: bool,
    probes: int,
    rule: Rule | None = None,
    large: int = LARGE,
) -> LayerCandidates:
    """Evaluate the candidates of ``methods`` for a layer, or the one candidate of a rule.

    Every method predicts its errors for many sizes in one pass. A few candidates are fitted, and their
    measured errors correct the other predictions. Without ``held_out`` moments (data-free) errors are in the
    metric of the weights. So many ``probes`` are made; for layers with more than ``large`` unknowns per
    output only quick methods are tried, if there are any.
    """
    names = suitable(layer, methods, rule)
    if not names:
        return LayerCandidates(layer=layer.name)
    ridge, fitting = 0.0, problem
    if held_out is not None:
        rough = _rough_fit(problem.geometry, layer.size, suitable(layer, methods) or names, uniform)
        ridge, fitting = best_ridge(problem, held_out, rough)
    is_large, dense = problem.geometry.unknowns > large, problem.geometry.macs(*layer.size)
    if rule is None:
        trials = _explore(layer, fitting, names, uniform, is_large)
    else:
        uniform = uniform or rule.is_uniform
        trials = _ruled(layer, fitting, rule)
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in trials}  # predicted, measured
    fitted_probes = []
    rounds = 0 if held_out is None else 1  # in the metric of the weights the closed form is optimal
    for name, trial, in_network in _to_fit(dense, trials, probes):
        fitted, _ = method(name, uniform, rounds=rounds).fit(fitting, trial.steps)
        if held_out is None:
            error = fitting.relative_error(fitted)
        else:
            error = held_out_error(problem, held_out, fitted) / max(held_out.variance, TINY)
        errors[name].append((max(trial.squared_error / fitting.power, FLOOR), max(error, FLOOR)))
        if in_network:
            weight, bias = fitted.dense().astype(np.float32), np.asarray(fitted.bias, np.float32)
            fitted_probes.append(Probe(weight, bias, max(error, FLOOR)))
    predicted = [
        Candidate(method=name, steps=t.steps, structure=t.structure(problem.geometry), relative_error=error)
        for name, of_method in trials.items()
        for t, error in zip(of_method, _corrected(of_method, fitting.power, errors[name]), strict=True)
    ]
    return LayerCandidates(
        layer=layer.name,
        candidates=tuple(predicted),
        probes=tuple(fitted_probes),
        data_free=held_out is None,
        ridge=ridge if is_large else 0.0,
    )


def _explore(
    layer: Layer, problem: Problem, methods: Sequence[str], uniform: bool, large: bool
) -> dict[str, list[Trial]]:
    """Return the trials of every method, short chains first, without the hopeless ones."""
    if large:
        methods = [name for name in methods if method(name).wide_ok(problem.geometry)] or methods
    by_method: dict[str, list[Trial]] = {}
    rounding, dense = FLOOR * problem.power, problem.geometry.macs(*layer.size)
    for name in methods:
        if not _has_promising_parts(name, methods, by_method):
            continue
        length = name.count("+") + 1
        levels = tuple(np.geomspace(0.97, FEWEST, LEVELS if length == 1 else INNER))
        outer = tuple(np.geomspace(0.8, 0.1, OUTER // 2 if large or length > 2 else OUTER))
        trials = method(name, uniform, rounds=0).trials(problem, layer.size, levels, outer)
        # where all weights are zero, all sizes have the same error, and only the smallest is left
        by_method[name] = [t for t in trials if t.macs >= FEWEST * dense] or trials[:1]
        envelope = pareto(t for of_method in by_method.values() for t in of_method)
        for other, of_method in by_method.items():
            least = {t.macs: max(_least(envelope, t.macs), rounding) for t in of_method}
            by_method[other] = [t for t in of_method if t.squared_error <= HOPELESS * least[t.macs]]
    return {name: trials for name, trials in by_method.items() if trials}


def suitable(layer: Layer, methods: Sequence[str], rule: Rule | None = None) -> list[str]:
    """Return the methods that have something to offer to a layer; the rule's wherever it makes sense."""
    assert layer.geometry is not None
    chosen = map(method, methods if rule is None else [rule.method])
    possible = [m for m in chosen if m.is_possible(layer.is_linear, layer.upsamples)]
    return [m.name for m in possible if rule is not None or m.applies_to(layer.geometry)]


def applicable(layer: Layer) -> list[str]:
    """Return the single families that have something to offer to a layer."""
    return suitable(layer, [family.name for family in registered()])


def _has_promising_parts(name: str, methods: Sequence[str], by_method: Mapping[str, Sequence[Trial]]) -> bool:
    """Return whether the combinations of one family less, where tried, have trials near the best."""
    chain = name.split("+")
    parts = ["+".join(chain[:i] + chain[i + 1 :]) for i in range(len(chain))] if len(chain) > 1 else []
    tried = [part for part in parts if part in methods]
    return len(tried) < 2 or sum(bool(by_method.get(part)) for part in tried) > 1


def _least(envelope: Sequence[Trial], macs: int) -> float:
    """Return the least squared error at no more than so many MACs."""
    return min((t.squared_error for t in envelope if t.macs <= macs), default=np.inf)


def _ruled(layer: Layer, problem: Problem, rule: Rule) -> dict[str, list[Trial]]:
    """Return the one trial that a rule asks for; none where it would not make the layer cheaper."""
    chosen, dense = method(rule.method, rule.is_uniform, rounds=1), problem.geometry.macs(*layer.size)
    if rule.kind == "share":
        levels = tuple(np.geomspace(0.97, FEWEST, LEVELS))
        trials = chosen.trials(problem, layer.size, levels, levels[:: LEVELS // OUTER])
        trials = [t for t in trials if t.macs <= rule.value * dense]
    else:
        trials = chosen.of_size(problem, layer.size, rule.kind, rule.value)
    best = min(trials, key=lambda t: t.squared_error, default=None)
    return {rule.method: [best]} if best and best.macs < dense else {}


def _rough_fit(
    g: ConvGeometry, size: tuple[int, int], methods: Sequence[str], uniform: bool
) -> Callable[[Problem], Factorization]:
    """Return the closed form of one family at a medium size, to choose a ridge by."""
    name = reference().name if reference().name in methods else methods[0]
    family = method(name, uniform, rounds=0).families[0]
    (medium,) = sizes_for(family, g, size, PROBES[1:2]) or [family.grain(g)]
    return partial(family.fit, size=medium)


def _to_fit(dense: int, trials: Mapping[str, Sequence[Trial]], probes: int) -> list[tuple[str, Trial, bool]]:
    """Choose the trials to fit: a few of the best of all, to be run in the network, and one per method."""
    named = {id(t): (name, t) for name, of_method in trials.items() for t in of_method}
    envelope = pareto(t for of_method in trials.values() for t in of_method)
    shares = PROBES if probes >= len(PROBES) else PROBES[1:2]
    picks = {id(_nearest(envelope, share * dense)): True for share in shares if envelope}
    covered = {named[pick][0] for pick in picks}
    for name, of_method in trials.items():
        if name not in covered:
            picks[id(_nearest(of_method, PROBES[1] * dense))] = False
    return [(*named[pick], in_network) for pick, in_network in picks.items()]


def _nearest(trials: Sequence[Trial], macs: float) -> Trial:
    return min(trials, key=lambda t: abs(t.macs - macs))


def _corrected(trials: Sequence[Trial], power: float, fitted: Sequence[tuple[float, float]]) -> Array:
    """Correct predicted relative errors by measured ones, linearly in the logarithm."""
    predicted = np.log(np.maximum([t.squared_error / power for t in trials], FLOOR))
    measured = np.log(sorted(fitted))
    errors: Array = np.exp(predicted + np.interp(predicted, measured[:, 0], measured[:, 1] - measured[:, 0]))
    return errors
