"""The analysis of a network: every layer's candidates, what each costs and what it would change.

It serves any number of budgets. Moments of what layers of the original network read and produce are collected
shard by shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from netdecouple.execution import threads
from netdecouple.execution.executors import Shared
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Run
from netdecouple.families import Problem
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments, sample_positions
from netdecouple.network import Images, Layer, Network
from netdecouple.planning.candidates import Candidate, LayerCandidates, candidates
from netdecouple.planning.divergence import Comparison, Loss, loss_kind
from netdecouple.planning.eligibility import is_too_wide_to_fit, kept_reasons
from netdecouple.planning.plan import LayerPlan
from netdecouple.planning.sensitivity import (
    OriginalOutputs,
    errors_with_margin,
    predicted_losses,
    probe_counts,
)
from netdecouple.planning.settings import Settings

STEP = "Collecting moments"  # name of this step in progress reports


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a plan minimises: Σ (weight · loss)ᵉ over the layers.

    Losses of single layers add up if their errors are independent; amplitudes do if they are coherent. Errors
    of late layers grow with those of the layers before them.
    """

    exponent: float = 1.0  # e
    depth: float = 0.0  # logarithm of the last layer's weight; the first one's is 1

    def of(self, candidate: Candidate, place: float) -> float:
        """Return a candidate's part of the sum, for the place of its layer from 0 (first) to 1 (last)."""
        return float((np.exp(self.depth * place) * candidate.objective) ** self.exponent)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What can be done to a network: every layer's candidates, with their losses."""

    network: Network
    settings: Settings
    inputs: Inputs
    loss: Loss
    reasons: dict[str, str]  # why a layer is kept
    candidates: dict[str, LayerCandidates]

    def candidates_of(self, layer: Layer) -> tuple[Candidate, ...]:
        """Return a layer's candidates; there are none of a layer that is kept."""
        found = self.candidates.get(layer.name)
        return found.candidates if found else ()

    def with_objective(self, objective: Objective) -> Analysis:
        """Return the analysis for plans that minimise something else."""
        names = [layer.name for layer in self.network.layers if layer.name in self.candidates]
        places = dict(zip(names, np.linspace(0, 1, len(names)), strict=True))
        changed = {
            name: replace(
                found,
                candidates=tuple(
                    replace(c, objective=objective.of(c, places[name])) for c in found.candidates
                ),
            )
            for name, found in self.candidates.items()
        }
        return replace(self, candidates=changed)

    def planned(self, row: LayerPlan) -> Candidate:
        """Return the candidate that a plan has chosen for a layer."""
        options = self.candidates[row.name].candidates
        return next(c for c in options if (c.method, c.sizes) == (row.family, row.sizes))


def analyze(
    network: Network, inputs: Inputs, settings: Settings, progress: Progress = quiet, run: Run = Run()
) -> Analysis:
    """Evaluate the candidates of every layer that may change: their errors, and their effect on the outputs.

    Raises:
        ModelError: activations are NaN or Inf, or there is nothing to decouple.
        OutputError: the work folder cannot be written.
    """
    reasons = kept_reasons(network.layers, settings, run.memory)
    layers = [la for la in network.layers if la.name not in reasons]
    original = OriginalOutputs(network, inputs, layers)
    held_out = len(inputs.held_out)
    loss = run.checkpoint.once("loss", str, lambda: loss_kind(original.outputs, held_out, settings.loss))
    macs = sum(layer.macs for layer in network.layers)
    probes, samples = probe_counts(len(layers), macs, held_out, loss)
    shared = shared_network(network, inputs)
    key = f"{samples} outputs, seed {settings.seed}, {shared.key}"
    shown = Shared(key, lambda: original.probe_samples(samples, loss))
    collector = MomentCollector(shared, inputs, settings.seed, run, progress)
    evaluated: dict[str, LayerCandidates] = {}
    for found in _evaluated(collector, layers, shown, (settings, probes)):
        evaluated[found.layer] = found
        if not found.candidates:
            reasons[found.layer] = "nothing costs less than the layer itself"
        progress("Evaluating candidates", len(evaluated), len(layers))
    return Analysis(
        network=network, settings=settings, inputs=inputs, loss=loss, reasons=reasons, candidates=evaluated
    )


def _evaluated(
    collector: MomentCollector, layers: Sequence[Layer], shown: Shared, options: tuple[Settings, int]
) -> Iterator[LayerCandidates]:
    """Evaluate layers in groups, so that the moments in memory at one time are bounded."""
    settings, run = options[0], collector.run
    entry = {layer.name: f"evaluated-{index:04}" for index, layer in enumerate(layers)}
    blind = {la.name for la in layers if settings.data_free or is_too_wide_to_fit(la, run.memory)}
    groups = [layers] if settings.data_free else groups_of(layers, blind, run.memory.moment_bytes)
    for index, group in enumerate(groups):
        saved = {la.name: run.checkpoint.load(entry[la.name], LayerCandidates) for la in group}
        yield from filter(None, saved.values())
        missing = [la for la in group if saved[la.name] is None]
        moments: dict[str, Split] = {}
        if any(la.name not in blind for la in missing):
            with_moments = [la for la in group if la.name not in blind]
            moments = collector.collect(with_moments, f"moments-{index:04}")
        if run.workers is not None:  # the longest tasks first, so that none of them is alone at the end
            missing.sort(key=SplitMoments.fit_bytes, reverse=True)
        tasks = (
            (collector.network, shown, layer.name, moments.pop(layer.name, None), *options)
            for layer in missing
        )
        for found in run.map(_evaluate, tasks, ordered=False):
            run.checkpoint.save(entry[found.layer], found)
            yield found
        run.checkpoint.drop(f"moments-{index:04}")


def _evaluate(
    network: Network,
    shown: tuple[Images, Comparison],
    name: str,
    moments: Split | None,
    settings: Settings,
    probes: int,
) -> LayerCandidates:
    """Fit one layer's candidates and run ``probes`` of them in the network; a task for a worker.

    ``shown`` is inputs, and the comparison with the original's outputs on them. Without ``moments`` the
    weights are all there is.
    """
    layer = next(la for la in network.layers if la.name == name)
    assert layer.geometry is not None
    if moments is None:
        problem, held_out = Problem.data_free(layer.geometry, layer.weight, layer.bias), None
    else:
        problem, held_out = Problem.of(layer.geometry, layer.weight, moments.fitted), moments.held_out
    with threads.for_unknowns(layer.geometry.unknowns):
        found = candidates(
            layer, problem, held_out, settings.methods, settings.uniform_rank, probes, settings.rule
        )
    images, comparison = shown
    probed = [
        comparison.divergence(network.run(images, {name: (probe.weight, probe.bias)}))
        for probe in found.probes
    ]
    probe_errors = [probe.relative_error for probe in found.probes]
    losses = predicted_losses([c.relative_error for c in found.candidates], probe_errors, probed)
    objectives = predicted_losses(errors_with_margin(found.candidates), probe_errors, probed)
    rows = zip(found.candidates, losses, objectives, strict=True)
    return replace(found, candidates=tuple(replace(c, loss=lo, objective=o) for c, lo, o in rows), probes=())


def shared_network(network: Network, inputs: Inputs) -> Shared:
    """Return the network as an argument of tasks; its key is of the network as opened for these inputs."""
    layers = [(la.name, la.reason, la.size) for la in network.layers]
    identity = [network.fingerprint, inputs.fingerprint, network.memory.in_worker, layers]
    return Shared(hashlib.sha256(repr(identity).encode()).hexdigest(), lambda: network)


@dataclass(frozen=True)
class CollectedMoments:
    """Moments of layers over the first shards of the inputs."""

    shards: int  # how many are in the moments
    moments: dict[str, Split]


@dataclass(frozen=True)
class MomentCollector:
    """Collects moments of what layers of the original network read and produce."""

    network: Shared
    inputs: Inputs
    seed: int
    run: Run
    progress: Progress

    def collect(self, layers: Sequence[Layer], entry: str) -> dict[str, Split]:
        """Return the moments of some layers; checkpoint ``entry`` holds those of the shards that are done."""
        checkpoint, inputs, count = self.run.checkpoint, self.inputs, len(self.inputs.images)
        shards, names = self.run.parts(count), tuple(layer.name for layer in layers)
        progress = self.progress if self.run.workers is None else quiet
        collected: CollectedMoments = checkpoint.load(entry, CollectedMoments) or CollectedMoments(0, {})
        tasks = (
            (self.network, inputs.shard(shard), shard.start, count, names, self.seed, progress)
            for shard in shards[collected.shards :]
        )
        for moments in self.run.map(_collect_shard, tasks):
            if collected.shards:
                for name, total in collected.moments.items():
                    total.absorb(moments[name])
                moments = collected.moments
            collected = CollectedMoments(collected.shards + 1, moments)
            checkpoint.save(entry, collected)
            self.progress(STEP, shards[collected.shards - 1].stop, count)
        return collected.moments


def _collect_shard(
    network: Network,
    shard: Inputs,
    start: int,
    total: int,
    names: Sequence[str],
    seed: int,
    progress: Progress,
) -> dict[str, Split]:
    """Return moments of the named layers over one shard, which starts at input ``start`` of ``total``."""
    layers = [layer for layer in network.layers if layer.name in names]
    stop = start + len(shard.images)
    positions = {la.name: sample_positions(la, total, seed)[start:stop] for la in layers}
    moments = {la.name: SplitMoments(la, shard) for la in layers}
    for observation in network.observe(shard.images, positions):
        moments[observation.layer].add(observation.images, observation.patches, observation.outputs)
        progress(STEP, min(start + observation.images.stop, total), total)
    return {name: split.both for name, split in moments.items()}


def groups_of(layers: Sequence[Layer], blind: Collection[str], limit: int) -> Iterator[Sequence[Layer]]:
    """Split layers into groups whose moments take at most ``limit`` bytes; ``blind`` layers need none."""
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
