"""Chains of families: each family is applied to the stages that the one before it makes.

A `Method` names its families outermost first: "cd+sd+nd-dp" decomposes a layer's channels, then the k×k stage
of that in space, then both stages of that into separable ones. Every stage with a kernel is a problem of its
own. The targets of a stage in the middle are its present outputs, in the metric of its inputs; the targets of
the last stage are those of the layer, given what the stages before it really compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.families.base import PAPER, REGISTRY, Family, FitOptions, groups, registered
from netdecouple.families.linalg import comparable
from netdecouple.families.problem import Problem


@dataclass(frozen=True)
class Step:
    """One family applied once: its size, and the channels its first stage reads (None: all, or open)."""

    size: int
    channels: IntArray | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a method can make of a layer, its exact costs and its predicted error."""

    steps: tuple[Step, ...] = ()
    stages: tuple[tuple[ConvGeometry, IntArray | None], ...] = ()
    macs: int = 0
    squared_error: float = 0.0  # Σ |y − ŷ|² over the samples

    def structure(self, geometry: ConvGeometry) -> Structure:
        stages, channels = zip(*self.stages, strict=True)
        return Structure(geometry, stages, channels)


@dataclass(frozen=True)
class Method:
    """A chain of families, outermost first, each applied to the stages that the one before it makes."""

    families: tuple[Family, ...]

    @property
    def name(self) -> str:
        return "+".join(family.name for family in self.families)

    def is_possible(self, is_linear: bool, upsamples: bool) -> bool:
        """Return whether the method makes sense for such a layer; of both kinds no chain does."""
        if not (is_linear or upsamples):
            return True
        first, *rest = self.families
        return not rest and (first.for_linear if is_linear else first.for_upsampling)

    def applies_to(self, geometry: ConvGeometry) -> bool:
        """Return whether the method has something to offer; a chain needs a kernel in its stages."""
        if len(self.families) > 1 and geometry.is_pointwise:
            return False
        return all(family.applies_to(geometry) for family in self.families)

    def wide_ok(self, geometry: ConvGeometry) -> bool:
        """Return whether all families stay quick where thousands of weights stand behind each output."""
        return all(family.wide_ok(geometry) for family in self.families)

    def _inner(self, index: int, stage: ConvGeometry) -> Method | None:
        """Return what is applied to a stage: nothing to a 1×1, no pruning of another stage's outputs."""
        inner = tuple(f for f in self.families[1:] if index == 0 or not f.prunes_inputs)
        return Method(inner) if inner and not stage.is_pointwise else None

    def structure(self, geometry: ConvGeometry, steps: Iterable[Step]) -> Structure:
        """Return the stages of some steps, in the order of `fit`; raise ValueError if they do not fit."""
        remaining = iter(steps)
        structure = Structure.of(geometry, *self._stages(geometry, remaining))
        if next(remaining, None) is not None:
            raise ValueError("there are more sizes than applications of a family")
        return structure

    def _stages(self, geometry: ConvGeometry, steps: Iterator[Step]) -> Iterator[ConvGeometry]:
        family, step = self.families[0], next(steps, Step(0))
        _check(family, geometry, step)
        for index, stage in enumerate(family.structure(geometry, step.size).stages):
            inner = self._inner(index, stage)
            yield from inner._stages(stage, steps) if inner else [stage]

    def exact(self, geometry: ConvGeometry) -> tuple[int, ...]:
        """Return the sizes at which nothing is lost."""
        sizes = [self.families[0].exact(geometry)]
        for index, stage in enumerate(self.families[0].structure(geometry, *sizes).stages):
            if inner := self._inner(index, stage):
                sizes += inner.exact(stage)
        return tuple(sizes)

    def fit(self, problem: Problem, steps: Iterable[Step]) -> tuple[Factorization, tuple[Step, ...]]:
        """Fit all stages; the steps come back with the channels that were selected where none were given."""
        remaining = iter(steps)
        family, step = self.families[0], next(remaining)
        outer = family.fit(problem, step.size, step.channels)
        taken: tuple[Step, ...] = (Step(step.size, outer.stages[0].channels),)
        if len(self.families) == 1:
            return outer, taken
        stages: tuple[ConvStage, ...] = ()
        for index, stage in enumerate(outer.stages):
            part = problem.of_stage(stages, stage, last=index == len(outer.stages) - 1)
            if inner := self._inner(index, stage.geometry):
                fitted, inner_steps = inner.fit(part, remaining)
                stages += _reading(stage.channels, fitted.stages)
                taken += inner_steps
            else:
                stages += (replace(stage, weight=part.target.reshape(stage.weight.shape)),)
        if family.joins_last and stages[-2].geometry.groups == problem.geometry.groups:
            stages = _rejoined(family, problem, stages, step.size)
        return problem.with_best_bias(stages), taken

    def trials(
        self, problem: Problem, size: tuple[int, int], shares: Sequence[float], outer: Sequence[float] = ()
    ) -> list[Trial]:
        """Predict the Pareto front, most expensive first: no trial costs as little and loses less.

        Args:
            problem: the layer.
            size: height and width of its input.
            shares: of the MACs of what the innermost family is applied to; sizes are chosen to meet them.
            outer: the same for all other families; empty: the same shares.
        """
        family, g = self.families[0], problem.geometry
        if len(self.families) == 1:
            return pareto(_predicted(family, problem, size, sizes_for(family, g, size, shares)))
        trials: list[Trial] = []
        for s in sizes_for(family, g, size, outer or shares):
            whole = family.fit(problem, s)
            step = Step(s, whole.stages[0].channels)
            parts = [[Trial(steps=(step,), squared_error=problem.squared_error(whole))]]
            stage_size = size
            for index, stage in enumerate(whole.stages):
                if inner := self._inner(index, stage.geometry):
                    part = problem.of_stage(whole.stages[:index], stage, last=False)
                    inner_trials = inner.trials(part, stage_size, shares, outer)
                    parts.append([_selecting(stage.channels, trial) for trial in inner_trials])
                else:
                    macs = stage.geometry.macs(*stage_size)
                    parts.append([Trial(stages=((stage.geometry, stage.channels),), macs=macs)])
                stage_size = stage.geometry.output_size(*stage_size)
            trials += [_joined(choice) for choice in product(*parts)]
        return pareto(trial for trial in trials if trial.macs < g.macs(*size))

    def of_size(self, problem: Problem, size: tuple[int, int], kind: str, value: float) -> list[Trial]:
        """Predict one size of a single family: T or rank ``value``, or the least with that much "energy"."""
        (family,) = self.families
        if kind == "energy":
            energies = family.energies(problem)
            number = int(np.argmax(energies >= min(value, energies[-1]) - 1e-9)) + 1
        else:
            number = int(value)
        chosen = min(family.size_of(problem.geometry, number), family.exact(problem.geometry))
        return list(_predicted(family, problem, size, [chosen]))


def method(name: str, uniform: bool = False, rounds: int | None = None) -> Method:
    """Build the method of a name like "cd+nd-dp".

    >>> method("cd+nd").name
    'cd+nd-dp'

    Args:
        name: families joined by "+", outermost first; a group's word means its first form.
        uniform, rounds: as in `FitOptions`.

    Raises:
        ValueError: an unknown family, or an order in which they cannot be applied.
    """
    options = FitOptions(uniform, rounds)
    families = tuple(_named(part)(options) for part in name.split("+"))
    orders = [family.order for family in families]
    if orders != sorted(set(orders)):
        order = ", ".join(" or ".join(family.name for family in forms) for forms in groups().values())
        raise ValueError(f"{name!r}: combine each family once, in the order {order}")
    return Method(families)


def _named(name: str) -> type[Family]:
    family = REGISTRY.get(name) or next((f for f in groups().get(name, ()) if f.in_combinations), None)
    if family is None:
        raise ValueError(f"there is no family {name!r}; there are {', '.join(f.name for f in registered())}")
    return family


def methods(names: Iterable[str]) -> tuple[str, ...]:
    """List every combination of some families, and the methods that are named in full; short chains first.

    "all" is all families; "paper" is what Guo et al. (section 4.4) report.

    >>> methods(["sd", "nd"])
    ('sd', 'nd-dp', 'nd-pd', 'sd+nd-dp')

    Raises:
        ValueError: as in `method`.
    """
    chosen: set[str] = set()
    listed: list[str] = []
    for name in names:
        if name == "all":
            chosen |= groups().keys()
        elif name == "paper":
            listed += PAPER
        elif name in groups():
            chosen.add(name)
        else:
            listed.append(method(name).name)
    families = [f for f in registered() if (f.group or f.name) in chosen]
    parts = [f for f in families if f.in_combinations]
    chains = [c for size in range(1, len(parts) + 1) for c in combinations(parts, size)]
    listed += ["+".join(f.name for f in c) for c in chains if len({f.order for f in c}) == len(c)]
    listed += [f.name for f in families if not f.in_combinations]
    return tuple(sorted(dict.fromkeys(listed), key=lambda n: n.count("+")))


def _check(family: Family, g: ConvGeometry, step: Step) -> None:
    """Raise ValueError for a size out of range, and for channels of a wrong number, order or index."""
    if not 1 <= step.size <= family.exact(g):
        raise ValueError(f"{family.name} of size {step.size}, it can have 1 to {family.exact(g)}")
    if step.channels is None:
        return
    most, count = family.repeats(g), g.n_i // g.groups
    fits = len(step.channels) == step.size * g.groups and bool(np.all(np.diff(step.channels) >= 0))
    groups = step.channels.reshape(g.groups, -1) // count if fits else np.zeros((g.groups, 0))
    fits = fits and bool(np.all(groups == np.arange(g.groups)[:, None]))
    if not fits or np.bincount(step.channels).max() > most:
        raise ValueError(f"the channels of {family.name} do not fit {g.n_i} channels and size {step.size}")


def _selected(outer: IntArray | None, inner: IntArray | None) -> IntArray | None:
    """Compose two selections of channels: the inner one selects among what the outer one has selected.

    >>> _selected(np.array([2, 5, 7]), np.array([0, 0, 2]))
    array([2, 2, 7])
    """
    if outer is None:
        return inner
    return outer if inner is None else outer[inner]


def _reading(channels: IntArray | None, stages: tuple[ConvStage, ...]) -> tuple[ConvStage, ...]:
    """Let a chain that was fitted to a selection of channels select them itself."""
    return (replace(stages[0], channels=_selected(channels, stages[0].channels)), *stages[1:])


def _rejoined(
    family: Family, problem: Problem, stages: tuple[ConvStage, ...], size: int
) -> tuple[ConvStage, ...]:
    """Fit the last convolution and the 1×1 behind it again, together, to the targets of the layer."""
    *before, conv, wide = stages
    joint = replace(conv.geometry, n_o=wide.geometry.n_o)
    weight = Factorization(joint, (replace(conv, channels=None), wide)).dense()
    part = problem.of_stage(before, ConvStage(joint, weight, conv.channels), last=True)
    return (*before, *_reading(conv.channels, family.fit(part, size).stages))


def _predicted(
    family: Family, problem: Problem, size: tuple[int, int], sizes: Sequence[int]
) -> Iterator[Trial]:
    """Predict what one family makes of a layer at several sizes."""
    squared_errors = family.curve(problem) * problem.power
    for s, channels in zip(sizes, family.channels(problem, sizes), strict=True):
        structure = family.structure(problem.geometry, s)
        yield Trial(
            steps=(Step(s, channels),),
            stages=tuple(zip(structure.stages, (channels, *structure.channels[1:]), strict=True)),
            macs=structure.macs(*size),
            squared_error=float(squared_errors[s]),
        )


def sizes_for(family: Family, g: ConvGeometry, size: tuple[int, int], shares: Sequence[float]) -> list[int]:
    """Return the sizes whose MACs come closest to some shares of the layer's, from below; largest first."""
    one, dense = family.structure(g, 1).macs(*size), g.macs(*size)
    exact = family.exact(g)
    grain = family.grain(g)
    sizes = {min(int(share * dense / one), exact) // grain * grain for share in shares}
    return sorted({s for s in sizes if s >= 1 and family.structure(g, s).macs(*size) < dense}, reverse=True)


def _selecting(channels: IntArray | None, trial: Trial) -> Trial:
    """Let the first stage of a trial select among what the stage above it has selected."""
    (geometry, inner), *rest = trial.stages
    return replace(trial, stages=((geometry, _selected(channels, inner)), *rest))


def _joined(trials: Sequence[Trial]) -> Trial:
    return Trial(
        steps=tuple(step for t in trials for step in t.steps),
        stages=tuple(stage for t in trials for stage in t.stages),
        macs=sum(t.macs for t in trials),
        squared_error=sum(t.squared_error for t in trials),
    )


def pareto(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that lose less than every other that costs no more, most expensive first."""
    candidates = list(trials)
    losses = comparable(np.array([t.squared_error for t in candidates]))
    kept: list[int] = []
    for i in sorted(range(len(candidates)), key=lambda i: (candidates[i].macs, losses[i])):
        if not kept or losses[i] < losses[kept[-1]]:
            kept.append(i)
    return [candidates[i] for i in reversed(kept)]
