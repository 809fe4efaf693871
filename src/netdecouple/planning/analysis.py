"""Watch the original network, weigh every layer's candidates, measure what each does to the output."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import numpy as np

from netdecouple.errors import BudgetError, ModelError
from netdecouple.execution import threads
from netdecouple.execution.executors import Shared
from netdecouple.execution.memory import Memory
from netdecouple.execution.run import Run
from netdecouple.families import Problem
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments, sample_positions
from netdecouple.network import Array, Images, Layer, Network
from netdecouple.planning.candidates import (
    LARGE,
    LayerCandidates,
    Rule,
    candidates,
    parse_families,
    smallest,
    suitable,
)
from netdecouple.planning.cost import Macs
from netdecouple.planning.divergence import Loss, divergence, loss_kind

EXCLUDED = "excluded"  # why a layer is kept that the user names
PROBE_MACS = 5e12  # all sensitivity probes together
TRIALS: dict[Loss, int] = {"kl": 16, "relative": 4}  # least samples to probe with; of maps, each says a lot
STEEPEST = 8.0  # power of its error with which a loss rises beyond the probes, at most; 5.7 has been seen
WORTH = 0.1  # of a wide layer's share of the work, its share of the network

Progress = Callable[[str, int, int], None]  # step, done, total


@dataclass(frozen=True)
class Settings:
    """How to decouple; the defaults are meant to be right.

    Raises:
        BudgetError: there is no such loss.
    """

    exclude: tuple[str, ...] = ()  # layer names or globs to leave alone
    data_free: bool = False
    uniform_rank: bool = False
    seed: int = 0
    families: tuple[str, ...] = ("all",)  # as in `families.combined.methods`
    rule: Rule | None = None  # one method for every layer, instead of planning
    loss: Loss | None = None  # None: KL for classifiers, relative error for all else

    def __post_init__(self) -> None:
        if self.loss not in (None, *get_args(Loss)):
            raise BudgetError(f"loss {self.loss!r}: give {' or '.join(get_args(Loss))}, or none")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to choose from, in full.

        Raises:
            BudgetError: one of them is unknown, or there is none.
        """
        published = self.data_free and self.uniform_rank
        return ("nd-dp",) if published else parse_families(",".join(self.families))


@dataclass(frozen=True)
class Analysis:
    """What can be done to a network: every layer's options, each with its loss and costs."""

    network: Network
    settings: Settings
    inputs: Inputs
    loss: Loss
    reasons: dict[str, str]  # why a layer is left alone
    candidates: dict[str, LayerCandidates]
    losses: dict[str, tuple[float, ...]]  # predicted loss of each of a layer's candidates


def quiet(step: str, done: int, total: int) -> None:
    """Report no progress."""


def kept_reasons(layers: Sequence[Layer], settings: Settings, memory: Memory = Memory()) -> dict[str, str]:
    """Name every layer that is left alone before any planning, and why.

    Raises:
        ModelError: a pattern of ``settings.exclude`` matches nothing, or nothing is left to decouple.
    """
    for pattern in settings.exclude:
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
            raise ModelError(
                f"--exclude {pattern!r} matches no layer; `netdecouple inspect` lists their names"
            )
    reasons = {}
    for layer in layers:
        if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in settings.exclude):
            reasons[layer.name] = EXCLUDED
        elif layer.reason:
            reasons[layer.name] = layer.reason
        elif all(Macs().decoupled(layer, c) >= layer.macs for c in smallest(layer)):
            reasons[layer.name] = "too small: nothing costs less than the layer itself"
        elif layer.methods and not suitable(layer, settings.methods, settings.rule):
            reasons[layer.name] = f"only {' or '.join(layer.methods)} would do, which is not asked for"
        elif not settings.data_free and _is_too_wide(layer, memory.row_bytes):
            size, limit = (f"{b / 1e9:.1f} GB" for b in (SplitMoments.nbytes(layer), memory.row_bytes))
            reasons[layer.name] = f"too wide: the moments of its inputs take {size}, more than {limit}"
    if not settings.data_free and settings.rule is None:
        reasons |= _not_worth_it([layer for layer in layers if layer.name not in reasons], layers)
    if len(reasons) == len(layers):
        why = "; ".join(f"{n}: {r}" for n, r in list(reasons.items())[:3])
        raise ModelError(
            f"none of the {len(layers)} layers can be decoupled ({why}{', …' if len(reasons) > 3 else ''})"
        )
    return reasons


def _not_worth_it(open_layers: Sequence[Layer], layers: Sequence[Layer]) -> dict[str, str]:
    """Name those wide layers that would take much of the work and are next to nothing of the network."""
    shapes = {la.name: la.geometry for la in open_layers if la.geometry is not None}
    work = {name: g.groups * g.unknowns**3 for name, g in shapes.items()}
    macs, parameters = (max(sum(getattr(la, cost) for la in layers), 1) for cost in ("macs", "parameters"))
    all_work = sum(work.values())
    reasons = {}
    for layer in open_layers:
        effort = work[layer.name] / all_work
        share = max(layer.macs / macs, layer.parameters / parameters)
        if shapes[layer.name].unknowns > LARGE and share < WORTH * effort:
            percent = f"{100 * effort:.0f} % of all, for {100 * share:.1g} % of the network"
            reasons[layer.name] = f"not worth the work: {percent}"
    return reasons


def _is_too_wide(layer: Layer, limit: int) -> bool:
    """Whether a layer that sees one sample per image would take more memory than is worth it.

    Convolutions as wide as that see many samples, which pay for it.
    """
    return layer.output_size == (1, 1) and SplitMoments.nbytes(layer) > limit


def is_too_wide_to_fit(layer: Layer, memory: Memory) -> bool:
    """Whether a layer is fitted from its weights alone, for want of memory."""
    return SplitMoments.fit_bytes(layer) > memory.fit_bytes


def analyze(
    network: Network,
    inputs: Inputs,
    settings: Settings,
    progress: Progress = quiet,
    run: Run = Run(),
) -> Analysis:
    """Watch the original network, weigh every layer's candidates, and measure what each does to the output.

    Raises:
        ModelError: NaN or Inf on the way, or nothing to decouple.
        OutputError: what was found cannot be kept.
    """
    layers = network.layers
    reasons = kept_reasons(layers, settings, run.memory)
    open_layers = [la for la in layers if la.name not in reasons]
    original = Original(network, inputs, open_layers)
    loss = run.checkpoint.once(
        "loss", str, lambda: loss_kind(original.outputs, len(inputs.held_back), settings.loss)
    )
    total = sum(layer.macs for layer in layers)
    depth = len(open_layers)
    probes = 3 if 3 * depth * 64 * total < PROBE_MACS else 1
    most = len(inputs.held_back)
    trials = int(np.clip(PROBE_MACS / (probes * depth * total), min(TRIALS[loss], most), most))

    key = f"{trials} outputs, seed {settings.seed}, {shared_network(network, inputs).key}"
    shown = Shared(key, lambda: original.trials(trials))
    watcher = Watcher(network, inputs, settings, run, progress)
    found: dict[str, LayerCandidates] = {}
    losses: dict[str, tuple[float, ...]] = {}
    for weighed in _weigh(watcher, open_layers, shown, (settings, probes, loss)):
        name = weighed.candidates.layer
        found[name], losses[name] = weighed.candidates, weighed.losses
        if not weighed.candidates.candidates:
            reasons[name] = "nothing costs less than the layer itself"
        progress("Weighing layers", len(found), depth)
    return Analysis(network, settings, inputs, loss, reasons, found, losses)


def shared_network(network: Network, inputs: Inputs) -> Shared:
    """Return the network as an argument of tasks; the key is of the network as opened for these inputs."""
    layers = [(la.name, la.reason, la.size) for la in network.layers]
    identity = [network.fingerprint, inputs.fingerprint, network.memory.in_worker, layers]
    return Shared(hashlib.sha256(repr(identity).encode()).hexdigest(), lambda: network)


@dataclass(frozen=True)
class Original:
    """What the original network makes of the inputs that are held back; it is run when that is first asked.

    Raises:
        ModelError: NaN or Inf.
    """

    network: Network
    inputs: Inputs
    layers: Sequence[Layer]  # that are looked at where its outputs are not finite

    @cached_property
    def outputs(self) -> list[Array]:
        """The network's outputs, finite."""
        outputs = self.network.run(self.inputs.held_back)
        _check_outputs(self.network, self.inputs, self.layers, outputs)
        return outputs

    def trials(self, count: int) -> tuple[Images, list[Array]]:
        """Some inputs, and what the network makes of them: outputs need not be one per input, to be cut."""
        shown = self.inputs.held_back[:count]
        return shown, self.outputs if count >= len(self.inputs.held_back) else self.network.run(shown)


@dataclass(frozen=True)
class Weighed:
    """One layer's candidates without what they were probed with, and the predicted loss of each."""

    candidates: LayerCandidates
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Watched:
    """Moments of layers on the first so many shards of the inputs."""

    shards: int
    moments: dict[str, Split]


def _weighed(
    network: Network,
    shown: tuple[Images, list[Array]],
    name: str,
    moments: Split | None,
    settings: Settings,
    probes: int,
    loss: Loss,
) -> Weighed:
    """Weigh one layer's candidates, and try a few of them in the network; a piece of work."""
    layer = next(la for la in network.layers if la.name == name)
    assert layer.geometry is not None
    if moments is None:
        problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    else:
        problem = Problem.of(layer.geometry, layer.weight, moments.fitted)
    with threads.for_unknowns(problem.weight.shape[2]):
        found = candidates(
            layer,
            problem,
            None if moments is None else moments.held_back,
            settings.methods,
            settings.uniform_rank,
            probes,
            settings.rule,
        )
    images, outputs = shown
    losses = [
        divergence(outputs, network.run(images, {name: (probe.weight, probe.bias)}), loss)
        for probe in found.probes
    ]
    return Weighed(replace(found, probes=()), _losses(found, losses))


def _weigh(
    watcher: Watcher, layers: Sequence[Layer], shown: Shared, options: tuple[Settings, int, Loss]
) -> Iterator[Weighed]:
    """Yield what every layer can become; moments are held for a bounded number of layers at a time."""
    settings, run = watcher.settings, watcher.run
    kept = run.checkpoint
    entry = {layer.name: f"weighed-{index:04}" for index, layer in enumerate(layers)}
    blind = {la.name for la in layers if settings.data_free or is_too_wide_to_fit(la, run.memory)}
    groups = [layers] if settings.data_free else groups_of(layers, blind, run.memory.moment_bytes)
    for index, group in enumerate(groups):
        missing = []
        for layer in group:
            known = kept.load(entry[layer.name], Weighed)
            if known is None:
                missing.append(layer)
            else:
                yield known
        watched = [la for la in group if la.name not in blind]
        moments: dict[str, Split] = {}
        if any(la in missing for la in watched):
            moments = watcher.moments(watched, f"moments-{index:04}")
        if run.workers is not None:  # what takes longest first, lest all wait for it in the end
            missing.sort(key=SplitMoments.fit_bytes, reverse=True)
        tasks = ((watcher.shared, shown, la.name, moments.pop(la.name, None), *options) for la in missing)
        for weighed in run.map(_weighed, tasks, ordered=False):
            kept.save(entry[weighed.candidates.layer], weighed)
            yield weighed
        kept.drop(f"moments-{index:04}")


@dataclass(frozen=True)
class Watcher:
    """Who looks at layers of the original network, shard by shard."""

    network: Network
    inputs: Inputs
    settings: Settings
    run: Run
    progress: Progress

    @cached_property
    def shared(self) -> Shared:
        """The network, as an argument of tasks."""
        return shared_network(self.network, self.inputs)

    def moments(self, layers: Sequence[Layer], entry: str) -> dict[str, Split]:
        """Moments of what some layers see, and make of it; shards add up in their order."""
        kept, inputs, count = self.run.checkpoint, self.inputs, len(self.inputs.images)
        shards = self.run.parts(count)
        names = tuple(layer.name for layer in layers)
        watched: Watched = kept.load(entry, Watched) or Watched(0, {})
        alone = self.progress if self.run.workers is None else quiet
        tasks = (
            (self.shared, inputs.shard(shard), shard.start, count, names, self.settings.seed, alone)
            for shard in shards[watched.shards :]
        )
        for seen in self.run.map(_watched, tasks):
            if watched.shards:
                for name, own in watched.moments.items():
                    own.absorb(seen[name])
                seen = watched.moments
            watched = Watched(watched.shards + 1, seen)
            kept.save(entry, watched)
            self.progress("Watching the network", shards[watched.shards - 1].stop, count)
        return watched.moments


def _watched(
    network: Network,
    shard: Inputs,
    start: int,
    total: int,
    names: Sequence[str],
    seed: int,
    progress: Progress,
) -> dict[str, Split]:
    """Moments of what some layers see, and make of it, on a shard of all inputs; a piece of work."""
    layers = [layer for layer in network.layers if layer.name in names]
    stop = start + len(shard.images)
    positions = {la.name: sample_positions(la, total, seed)[start:stop] for la in layers}
    moments = {la.name: SplitMoments(la, shard) for la in layers}
    for seen in network.observe(shard.images, positions):
        moments[seen.layer].add(seen.images, seen.patches, seen.outputs)
        progress("Watching the network", min(start + seen.images.stop, total), total)
    return {name: own.both for name, own in moments.items()}


def groups_of(layers: Sequence[Layer], blind: Collection[str], limit: int) -> Iterator[Sequence[Layer]]:
    """Cut layers into groups whose moments take so many bytes at most, those that are ``blind`` none."""
    group: list[Layer] = []
    held = 0
    for layer in layers:
        size = 0 if layer.name in blind else SplitMoments.nbytes(layer)
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    if group:
        yield group


def _losses(weighed: LayerCandidates, shown: Sequence[float]) -> tuple[float, ...]:
    """Predict each candidate's loss from the probes': interpolate log loss over log error.

    Below the probes the loss is proportional to the error, as it is for small perturbations; beyond them
    it goes on rising as it did between the last two, and never slower than the error.
    """
    if not weighed.probes:
        return ()
    pairs = sorted(zip([probe.error for probe in weighed.probes], shown, strict=True))
    errors, measured = np.log(np.maximum(np.array(pairs).T, 1e-12))
    wanted = np.log(np.maximum([c.error for c in weighed.candidates], 1e-12))
    ratios = np.interp(wanted, errors, measured - errors)
    if len(pairs) > 1 and errors[-1] > errors[-2]:
        steepness = (measured[-1] - measured[-2]) / (errors[-1] - errors[-2])
        ratios += (np.clip(steepness, 1.0, STEEPEST) - 1.0) * np.maximum(wanted - errors[-1], 0.0)
    losses = np.exp(wanted + ratios)
    rising = np.argsort(wanted, kind="stable")
    losses[rising] = np.maximum.accumulate(losses[rising])  # a greater error never loses less
    return tuple(float(v) for v in losses)


def _check_outputs(
    network: Network, inputs: Inputs, layers: Sequence[Layer], outputs: Sequence[Array]
) -> None:
    if all(np.isfinite(o).all() for o in outputs if o.dtype.kind == "f"):
        return
    positions = {la.name: sample_positions(la, len(inputs.held_back), 0) for la in layers}
    for seen in network.observe(inputs.held_back, positions):
        seen.patches  # noqa: B018  # raises, with its name, at the first layer that sees or makes NaN or Inf
    raise ModelError(
        "the network's outputs are NaN or Inf on the calibration images; check the preprocessing"
    )
