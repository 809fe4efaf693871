"""What could be done to each layer, and what each choice costs and loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netdecouple.convolution import Factorization, Structure
from netdecouple.errors import BudgetError
from netdecouple.families import TINY, Array, Problem
from netdecouple.families.chain import ORDER, Step, Trial, method, methods, sizes_for, worthwhile
from netdecouple.fitting.ridge import best_ridge, held_back_error
from netdecouple.moments import Moments
from netdecouple.network import Layer
from netdecouple.planning.cost import Macs, Parameters, parse_share

FLOOR = 1e-9  # errors below are rounding
LEVELS = 28  # of a single family
FEWEST = 0.04  # of the layer's own MACs: the smallest candidate, lest losses be far from what was probed
INNER, OUTER = 10, 6  # levels of the innermost family of a combination, and of every other
PROBES = (0.5, 0.2, 0.07)  # of the layer's own MACs: where errors and losses are measured, not predicted
HOPELESS = 1.3  # times the least error at the same MACs: not worth timing or combining further
LARGE = 1500  # unknowns per output beyond which only some methods are tried, those that pay soonest
FOR_LARGE = ("sd", "nd-dp", "sd+nd-dp")


@dataclass(frozen=True)
class Candidate:
    """A method with concrete sizes, for one layer."""

    method: str
    steps: tuple[Step, ...]
    structure: Structure
    error: float  # relative to the variance of the layer's output, predicted for held-back inputs

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(step.size for step in self.steps)


@dataclass(frozen=True)
class Probe:
    """A candidate that was really fitted: its kernel, to be tried in the network, and its error."""

    weight: NDArray[np.float32]  # (n_o, n_i / groups, kh, kw)
    bias: NDArray[np.float32]  # (n_o,)
    error: float  # relative to the variance of the layer's output, on held-back inputs


@dataclass(frozen=True)
class LayerCandidates:
    """Everything worth considering for one layer."""

    layer: str
    candidates: tuple[Candidate, ...]
    probes: tuple[Probe, ...]
    data_free: bool = False  # weighed in the metric of the weights
    ridge: float = 0.0  # of a wide layer, where to choose it anew would take long and change next to nothing


@dataclass(frozen=True)
class Rule:
    """One method for every layer, as far as a number says, instead of planning to a budget.

    ``kind`` is "size" (T of ND; ranks or channels of all else), "energy" (the least size that carries this
    share of the energy) or "share" (of the layer's own MACs).
    """

    method: str
    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read "nd-dp:T=4", "cd:rank=32", "nd:energy=0.8", "sd:2x" or "cd+nd:40%".

        Raises:
            BudgetError: it is none of these.
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
                f"--method {text!r}: write a method and how far, like nd-dp:T=4, cd:rank=32, cp:channels=32, "
                f"nd:energy=0.8, sd:2x or cd+nd:40% ({error})"
            ) from error
        if len(chosen.families) > 1:
            raise BudgetError(f"--method {text!r}: combinations take a share of the MACs, like {name}:2x")
        if not (value >= 1 and value == int(value) if kind == "size" else 0 < value <= 1):
            raise BudgetError(f"--method {text!r}: {number} is no {key}")
        return cls(chosen.name, kind, value)

    @property
    def is_uniform(self) -> bool:
        """Whether ND gives every channel the same number of terms, as T and energy thresholds mean it."""
        return self.kind != "share"

    def __str__(self) -> str:
        value = f"{100 * self.value:.4g}% MACs" if self.kind == "share" else f"{self.kind} {self.value:g}"
        return f"{self.method}, {value} in every layer"


def parse_families(text: str) -> tuple[str, ...]:
    """Read "nd,sd,cd,cp", "paper", "all", or methods in full: the methods that may be used.

    Raises:
        BudgetError: one of them is unknown, or there is none.
    """
    try:
        return methods([part.strip() for part in text.split(",")])
    except ValueError as error:
        raise BudgetError(
            f"--families {text!r}: {error}; write nd,sd,cd,cp, paper, all, or methods like sd+nd-dp"
        ) from error


def smallest(layer: Layer) -> list[Candidate]:
    """The layer at size 1 of every family that is of use to it."""
    if layer.geometry is None:
        return []
    found = []
    for name in ORDER:
        if not _is_pointless(layer, name):
            steps = (Step(1),)
            found.append(Candidate(name, steps, method(name).structure(layer.geometry, steps), 1.0))
    return found


def least_cost(layer: Layer, cost: Macs | Parameters) -> int:
    """The least a layer can be brought to by a single family, if that is less than it costs."""
    return min([cost.dense(layer), *(cost.decoupled(layer, c) for c in smallest(layer))])


def candidates(
    layer: Layer,
    problem: Problem,
    held_back: Moments | None,
    methods: Sequence[str],
    uniform: bool,
    probes: int,
    rule: Rule | None = None,
) -> LayerCandidates:
    """Weigh what ``methods`` can make of a layer, or the one thing that a rule makes of it.

    Every method foresees its errors for many sizes in one pass; a few are fitted in full, and what those
    show on ``held_back`` moments corrects the rest. Without these (data-free) all is in the metric of
    the weights.
    """
    wanted = suitable(layer, methods, rule)
    if not wanted:
        return LayerCandidates(layer.name, (), ())
    ridge, fitting = 0.0, problem
    if held_back is not None:
        rough = _rough_fit(layer, suitable(layer, methods) or wanted, uniform)
        ridge, fitting = best_ridge(problem, held_back, rough)
    uniform = uniform or (rule is not None and rule.is_uniform)
    trials = _explore(layer, fitting, wanted, uniform) if rule is None else _ruled(layer, fitting, rule)
    tried = _to_fit(layer, trials, probes)
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in trials}  # foreseen, fitted
    shown = []
    rounds = 0 if held_back is None else 1  # in the metric of the weights there is nothing to descend
    for name, trial, in_network in tried:
        fitted, _ = method(name, uniform, rounds=rounds).fit(fitting, trial.steps)
        if held_back is None:
            error = fitting.error(fitted) / fitting.power
        else:
            error = held_back_error(problem, held_back, fitted) / max(held_back.variance, TINY)
        errors[name].append((max(trial.error / fitting.power, FLOOR), max(error, FLOOR)))
        if in_network:
            weight, bias = fitted.dense().astype(np.float32), np.asarray(fitted.bias, np.float32)
            shown.append(Probe(weight, bias, max(error, FLOOR)))
    found = [
        Candidate(name, t.steps, t.structure(problem.geometry), error)
        for name, of_method in trials.items()
        for t, error in zip(of_method, _corrected(of_method, fitting.power, errors[name]), strict=True)
    ]
    ridge = ridge if problem.geometry.unknowns > LARGE else 0.0
    return LayerCandidates(layer.name, tuple(found), tuple(shown), held_back is None, ridge)


def _explore(layer: Layer, problem: Problem, methods: Sequence[str], uniform: bool) -> dict[str, list[Trial]]:
    """The trials of every method, short chains first; hopeless ones are left out as early as can be seen."""
    g = problem.geometry
    large, rounding = problem.geometry.unknowns > LARGE, FLOOR * problem.power
    quick = ("cd",) if g.is_pointwise else FOR_LARGE
    found: dict[str, list[Trial]] = {}
    for name in methods:
        chain = name.split("+")
        slow = large and name not in quick and not set(quick).isdisjoint(methods)
        if slow or not _has_promising_parts(name, methods, found):
            continue
        levels = tuple(np.geomspace(0.97, FEWEST, LEVELS if len(chain) == 1 else INNER))
        outer = tuple(np.geomspace(0.8, 0.1, OUTER // 2 if large or len(chain) > 2 else OUTER))
        trials = method(name, uniform, rounds=0).trials(problem, layer.size, levels, outer)
        # where a layer makes nothing, all sizes are as good, and the smallest is all that is left
        found[name] = [t for t in trials if t.macs >= FEWEST * _macs(layer)] or trials[:1]
        envelope = worthwhile(t for of_method in found.values() for t in of_method)
        for other in found:
            found[other] = [
                t for t in found[other] if t.error <= HOPELESS * max(_least(envelope, t.macs), rounding)
            ]
    return {name: trials for name, trials in found.items() if trials}


def suitable(layer: Layer, methods: Sequence[str], rule: Rule | None = None) -> list[str]:
    """Those methods that have something to offer to a layer; a rule's, wherever that can be followed."""
    if rule is not None:
        return [rule.method] if not layer.methods or rule.method in layer.methods else []
    return [m for m in methods if not _is_pointless(layer, m)]


def _is_pointless(layer: Layer, name: str) -> bool:
    """Whether a method has nothing to offer to such a layer."""
    g = layer.geometry
    assert g is not None
    if layer.methods and name not in layer.methods:
        return True
    if g.is_pointwise:
        return name not in ("cd", "cp")
    return "sd" in name.split("+") and 1 in (g.kh, g.kw)


def _has_promising_parts(name: str, methods: Sequence[str], found: Mapping[str, Sequence[Trial]]) -> bool:
    """Whether the combinations of one family less, as far as they were tried, are anywhere near the best."""
    chain = name.split("+")
    parts = ["+".join(chain[:i] + chain[i + 1 :]) for i in range(len(chain))] if len(chain) > 1 else []
    tried = [part for part in parts if part in methods]
    return len(tried) < 2 or sum(bool(found.get(part)) for part in tried) > 1


def _macs(layer: Layer) -> int:
    """MACs of the layer on one map, as those of trials are counted."""
    assert layer.geometry is not None
    return layer.geometry.macs(*layer.size)


def _least(envelope: Sequence[Trial], macs: int) -> float:
    """The least error to be had at so many MACs."""
    return min((t.error for t in envelope if t.macs <= macs), default=np.inf)


def _ruled(layer: Layer, problem: Problem, rule: Rule) -> dict[str, list[Trial]]:
    """The one trial a rule asks for; none where it would not make the layer cheaper."""
    chosen = method(rule.method, rule.is_uniform, rounds=1)
    if rule.kind == "share":
        levels = tuple(np.geomspace(0.97, FEWEST, LEVELS))
        trials = chosen.trials(problem, layer.size, levels, levels[:: LEVELS // OUTER])
        trials = [t for t in trials if t.macs <= rule.value * _macs(layer)]
    else:
        trials = chosen.of_size(problem, layer.size, rule.kind, rule.value)
    best = min(trials, key=lambda t: t.error, default=None)
    return {rule.method: [best]} if best and best.macs < _macs(layer) else {}


def _rough_fit(layer: Layer, methods: Sequence[str], uniform: bool) -> Callable[[Problem], Factorization]:
    """The closed form of one family at a middling size, to choose a ridge by."""
    first = next((m for m in methods if m == "nd-dp"), methods[0]).split("+")[0]
    family = method(first, uniform, rounds=0).families[0]

    def fit(problem: Problem) -> Factorization:
        g = problem.geometry
        (size,) = sizes_for(family, g, layer.size, PROBES[1:2]) or [family.grain(g)]
        return family.fit(problem, size)

    return fit


def _to_fit(
    layer: Layer, trials: Mapping[str, Sequence[Trial]], probes: int
) -> list[tuple[str, Trial, bool]]:
    """What is fitted in full: a few of the best of all, to be tried in the network, and one per method."""
    named = {id(t): (name, t) for name, of_method in trials.items() for t in of_method}
    envelope = worthwhile(t for of_method in trials.values() for t in of_method)
    shares = PROBES if probes >= len(PROBES) else PROBES[1:2]
    picks = {id(_nearest(envelope, share * _macs(layer))): True for share in shares if envelope}
    seen = {named[pick][0] for pick in picks}
    for name, of_method in trials.items():
        if name not in seen:
            picks[id(_nearest(of_method, PROBES[1] * _macs(layer)))] = False
    return [(*named[pick], in_network) for pick, in_network in picks.items()]


def _nearest(trials: Sequence[Trial], macs: float) -> Trial:
    return min(trials, key=lambda t: abs(t.macs - macs))


def _corrected(trials: Sequence[Trial], power: float, fitted: Sequence[tuple[float, float]]) -> Array:
    """Errors as fitting would show them: what was foreseen, corrected linearly in its logarithm."""
    foreseen = np.log(np.maximum([t.error / power for t in trials], FLOOR))
    known = np.log(sorted(fitted))
    errors: Array = np.exp(foreseen + np.interp(foreseen, known[:, 0], known[:, 1] - known[:, 0]))
    return errors
