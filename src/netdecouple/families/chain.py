"""One family applied to the stages of another, by one mechanism for every combination.

A `Method` is a chain of families, outermost first: "cd+sd+nd-dp" decomposes a layer's channels, then the
k×k stage of that in space, then both stages of that into separable ones. Every stage with a kernel is a
problem of its own: one in the middle goes on making what it made, in the metric of its inputs; the last
one answers for the layer's output, given whatever the stages before it really make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.families import Family, Problem, with_best_bias
from netdecouple.families.cd import ChannelDecomposition
from netdecouple.families.cp import ChannelPruning
from netdecouple.families.nd import DepthwisePointwise, PointwiseDepthwise
from netdecouple.families.sd import SpatialDecomposition
from netdecouple.families.ties import comparable

# outermost first: the order in which families can follow each other
ORDER = ("cd", "sd", "cp", "nd-dp", "nd-pd")


@dataclass(frozen=True)
class Step:
    """One family applied once: how far, and which channels its first stage reads (None: all, or unknown)."""

    size: int
    channels: IntArray | None = None


@dataclass(frozen=True)
class Trial:
    """What a method would make of a layer, and about what that would cost and lose."""

    steps: tuple[Step, ...]
    stages: tuple[tuple[ConvGeometry, IntArray | None], ...]
    macs: int
    error: float  # Σ |y − ŷ|² over the samples

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

    def structure(self, geometry: ConvGeometry, steps: Iterable[Step]) -> Structure:
        """The stages of some steps: one per application of a family, in the order of `fit`.

        Raises:
            ValueError: the steps do not fit the layer.
        """
        left = iter(steps)
        structure = Structure.of(geometry, *_stages(self.families, geometry, left))
        if next(left, None) is not None:
            raise ValueError("there are more sizes than applications of a family")
        return structure

    def exact(self, geometry: ConvGeometry) -> tuple[int, ...]:
        """The sizes at which nothing is lost."""
        return tuple(_exact(self.families, geometry))

    def fit(self, problem: Problem, steps: Iterable[Step]) -> tuple[Factorization, tuple[Step, ...]]:
        """Fit all stages; the steps come back with the channels that were chosen where none were given."""
        made: list[Step] = []
        fitted = _fit(self.families, problem, iter(steps), made)
        return fitted, tuple(made)

    def trials(
        self, problem: Problem, size: tuple[int, int], shares: Sequence[float], outer: Sequence[float] = ()
    ) -> list[Trial]:
        """Foresee what is worth trying, from much to little: no other costs less and loses less.

        Args:
            problem: the layer.
            size: height and width of its input.
            shares: of the MACs of what the innermost family is applied to; its sizes are made for them.
            outer: the same for all other families.
        """
        return _trials(self.families, problem, size, shares, outer or shares)

    def of_size(self, problem: Problem, size: tuple[int, int], kind: str, value: float) -> list[Trial]:
        """Foresee one size of a single family: T or rank ``value``, or the least with that much "energy"."""
        (family,) = self.families
        if kind == "energy":
            curve = family.energies(problem)
            chosen = int(np.argmax(curve >= min(value, curve[-1]) - 1e-9)) + 1
        else:
            chosen = int(value)
        chosen = min(family.scaled(problem.geometry, chosen), family.exact(problem.geometry))
        return list(_foreseen(family, problem, size, [chosen]))


def method(name: str, uniform: bool = False, rounds: int | None = None) -> Method:
    """The method of a name like "cd+nd-dp".

    Args:
        name: families joined by "+", outermost first; "nd" means "nd-dp".
        uniform: ND gives every channel the same number of terms.
        rounds: of refinement after the closed forms; None for as many as pay.

    Raises:
        ValueError: an unknown family, or an order in which they cannot be applied.
    """
    names = tuple("nd-dp" if n == "nd" else n for n in name.split("+"))
    for n in names:
        if n not in ORDER:
            raise ValueError(f"there is no family {n!r}; there are {', '.join(ORDER)}")
    places = [ORDER.index(n) for n in names]
    if places != sorted(set(places)) or {"nd-dp", "nd-pd"} <= set(names):
        raise ValueError(f"{name!r}: combine each family once, in the order cd, sd, cp, and one form of nd")
    members: dict[str, Family] = {
        "cd": ChannelDecomposition(),
        "sd": SpatialDecomposition(rounds),
        "cp": ChannelPruning(),
        "nd-dp": DepthwisePointwise(uniform, rounds),
        "nd-pd": PointwiseDepthwise(rounds),
    }
    return Method(tuple(members[n] for n in names))


def methods(names: Iterable[str]) -> tuple[str, ...]:
    """Every combination of some families, and the methods that are named in full; short chains first.

    "nd", "sd", "cd" and "cp" are families, "all" is all four of them and "paper" those of their
    combinations that Guo et al. (section 4.4) report.

    Raises:
        ValueError: as in `method`.
    """
    families, found = [], []
    for name in names:
        if name == "all":
            families += ["cd", "sd", "cp", "nd"]
        elif name == "paper":
            found += [n for n in methods(["all"]) if "sd+cp" not in n or "cd" in n]
        elif name in ("cd", "sd", "cp", "nd"):
            families.append(name)
        else:
            found.append(method(name).name)
    parts = [n for n in ORDER if n in families or (n == "nd-dp" and "nd" in families)]
    found += ["+".join(c) for size in range(1, 5) for c in combinations(parts, size)]
    found += ["nd-pd"] if "nd" in families else []
    return tuple(sorted(dict.fromkeys(found), key=lambda n: n.count("+")))


def _inner(families: tuple[Family, ...], index: int, stage: ConvGeometry) -> tuple[Family, ...]:
    """What is applied to stage ``index``: nothing to a 1×1, and no pruning of channels only just made."""
    if stage.is_pointwise:
        return ()
    return tuple(f for f in families[1:] if index == 0 or not isinstance(f, ChannelPruning))


def _stages(
    families: tuple[Family, ...], geometry: ConvGeometry, steps: Iterator[Step]
) -> Iterator[ConvGeometry]:
    step = next(steps, Step(0))
    _check(families[0], geometry, step)
    for index, stage in enumerate(families[0].structure(geometry, step.size).stages):
        inner = _inner(families, index, stage)
        yield from _stages(inner, stage, steps) if inner else [stage]


def _check(family: Family, g: ConvGeometry, step: Step) -> None:
    """Refuse a size that the family cannot have, or channels that are not as many or not there."""
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


def _exact(families: tuple[Family, ...], geometry: ConvGeometry) -> Iterator[int]:
    size = families[0].exact(geometry)
    yield size
    for index, stage in enumerate(families[0].structure(geometry, size).stages):
        if inner := _inner(families, index, stage):
            yield from _exact(inner, stage)


def _fit(
    families: tuple[Family, ...], problem: Problem, steps: Iterator[Step], made: list[Step]
) -> Factorization:
    family, step = families[0], next(steps)
    whole = family.fit(problem, step.size, step.channels)
    made.append(Step(step.size, whole.stages[0].channels))
    if len(families) == 1:
        return whole
    done: tuple[ConvStage, ...] = ()
    for index, stage in enumerate(whole.stages):
        last = index == len(whole.stages) - 1
        own = problem.of_stage(done, stage, last)
        if inner := _inner(families, index, stage.geometry):
            done += _read_from(stage.channels, _fit(inner, own, steps, made).stages)
        else:
            done += (replace(stage, weight=own.target.reshape(stage.weight.shape)),)
    if family.joins_last and done[-2].geometry.groups == problem.geometry.groups:
        done = _rejoined(family, problem, done, step.size)
    return with_best_bias(problem, done)


def _read_from(channels: IntArray | None, stages: tuple[ConvStage, ...]) -> tuple[ConvStage, ...]:
    """Let a chain that was made for a selection of channels select them itself."""
    if channels is None:
        return stages
    own = stages[0].channels
    return (replace(stages[0], channels=channels if own is None else channels[own]), *stages[1:])


def _rejoined(
    family: Family, problem: Problem, stages: tuple[ConvStage, ...], size: int
) -> tuple[ConvStage, ...]:
    """Factorize the last convolution and the 1×1 behind it anew, together: both answer for the output."""
    *before, conv, wide = stages
    joint = replace(conv.geometry, n_o=wide.geometry.n_o)
    weight = Factorization(joint, (replace(conv, channels=None), wide)).dense()
    own = problem.of_stage(before, ConvStage(joint, weight, conv.channels), True)
    fitted = family.fit(own, size).stages
    return (*before, *_read_from(conv.channels, fitted))


def _trials(
    families: tuple[Family, ...],
    problem: Problem,
    size: tuple[int, int],
    shares: Sequence[float],
    outer: Sequence[float],
) -> list[Trial]:
    family, g = families[0], problem.geometry
    sizes = sizes_for(family, g, size, shares if len(families) == 1 else outer)
    if len(families) == 1:
        return worthwhile(_foreseen(family, problem, size, sizes))
    found: list[Trial] = []
    for s in sizes:
        whole = family.fit(problem, s)
        parts = [[Trial((Step(s, whole.stages[0].channels),), (), 0, problem.error(whole))]]
        here = size
        for index, stage in enumerate(whole.stages):
            if inner := _inner(families, index, stage.geometry):
                own = problem.of_stage(whole.stages[:index], stage, False)
                parts.append(
                    [_seen_through(stage.channels, t) for t in _trials(inner, own, here, shares, outer)]
                )
            else:
                parts.append(
                    [Trial((), ((stage.geometry, stage.channels),), stage.geometry.macs(*here), 0.0)]
                )
            here = stage.geometry.output_size(*here)
        found += [_joined(pick) for pick in product(*parts)]
    return worthwhile(t for t in found if t.macs < g.macs(*size))


def _foreseen(
    family: Family, problem: Problem, size: tuple[int, int], sizes: Sequence[int]
) -> Iterator[Trial]:
    """What one family makes of a layer at several sizes."""
    curve = family.curve(problem) * problem.power
    for s, read in zip(sizes, family.channels(problem, sizes), strict=True):
        structure = family.structure(problem.geometry, s)
        stages = tuple(zip(structure.stages, (read, *structure.channels[1:]), strict=True))
        yield Trial((Step(s, read),), stages, structure.macs(*size), float(curve[s]))


def sizes_for(family: Family, g: ConvGeometry, size: tuple[int, int], shares: Sequence[float]) -> list[int]:
    """The sizes whose MACs come closest to some shares of the layer's, from below."""
    one, dense = family.structure(g, 1).macs(*size), g.macs(*size)
    exact = family.exact(g)
    grain = family.grain(g)
    found = {min(int(share * dense / one), exact) // grain * grain for share in shares}
    return sorted({s for s in found if s >= 1 and family.structure(g, s).macs(*size) < dense}, reverse=True)


def _seen_through(channels: IntArray | None, trial: Trial) -> Trial:
    """Let the first stage select among what a stage above it has selected."""
    if channels is None:
        return trial
    (geometry, own), *rest = trial.stages
    return replace(trial, stages=((geometry, channels if own is None else channels[own]), *rest))


def _joined(trials: Sequence[Trial]) -> Trial:
    return Trial(
        tuple(step for t in trials for step in t.steps),
        tuple(stage for t in trials for stage in t.stages),
        sum(t.macs for t in trials),
        sum(t.error for t in trials),
    )


def worthwhile(trials: Iterable[Trial]) -> list[Trial]:
    """Those that lose less than every other that costs no more, most expensive first."""
    found = list(trials)
    losses = comparable(np.array([t.error for t in found]))
    kept: list[int] = []
    for i in sorted(range(len(found)), key=lambda i: (found[i].macs, losses[i])):
        if not kept or losses[i] < losses[kept[-1]]:
            kept.append(i)
    return [found[i] for i in reversed(kept)]
