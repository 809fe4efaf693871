"""Collect moments of layers of the original network, shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from netdecouple.execution.executors import Shared
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Run
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments, sample_positions
from netdecouple.network import Layer, Network

STEP = "Collecting moments"  # name of this step in progress reports


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


@dataclass(frozen=True, kw_only=True)
class MomentCollector:
    """Collects moments of what layers of the original network read and produce."""

    network: Network
    inputs: Inputs
    seed: int
    run: Run
    progress: Progress

    @cached_property
    def shared(self) -> Shared:
        """The network, as an argument of tasks."""
        return shared_network(self.network, self.inputs)

    def collect(self, layers: Sequence[Layer], entry: str) -> dict[str, Split]:
        """Return the moments of some layers; checkpoint ``entry`` holds those of the shards that are done."""
        checkpoint, inputs, count = self.run.checkpoint, self.inputs, len(self.inputs.images)
        shards, names = self.run.parts(count), tuple(layer.name for layer in layers)
        progress = self.progress if self.run.workers is None else quiet
        collected: CollectedMoments = checkpoint.load(entry, CollectedMoments) or CollectedMoments(0, {})
        tasks = (
            (self.shared, inputs.shard(shard), shard.start, count, names, self.seed, progress)
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
