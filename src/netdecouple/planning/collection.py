"""Collect moments of layers of the original network, shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from netdecouple.execution.executors import Common, each
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Resources
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments, sample_positions
from netdecouple.network import Layer, Network

STEP = "Collecting moments"  # name of this step in progress reports


def network_key(network: Network, inputs: Inputs, resources: Resources) -> str:
    """Return a hash that identifies a network as it is opened for some inputs."""
    layers = [(la.name, la.reason, la.size) for la in network.layers]
    return hashlib.sha256(
        repr([network.fingerprint, inputs.fingerprint, resources.memory, layers]).encode()
    ).hexdigest()


def common_network(network: Network, inputs: Inputs, resources: Resources) -> Common:
    """Return the network in the form in which all workers share it."""
    return Common(network_key(network, inputs, resources), lambda: network, network.recipe)


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
    resources: Resources
    progress: Progress

    @cached_property
    def common(self) -> Common:
        """The network, as workers share it."""
        return common_network(self.network, self.inputs, self.resources)

    def collect(self, layers: Sequence[Layer], entry: str) -> dict[str, Split]:
        """Return the moments of some layers; checkpoint ``entry`` holds those of the shards that are done."""
        checkpoint, inputs, count = self.resources.checkpoint, self.inputs, len(self.inputs.images)
        shards, workers = self.resources.shards_of(count), self.resources.workers
        names = tuple(layer.name for layer in layers)
        collected: CollectedMoments = checkpoint.load(entry, CollectedMoments) or CollectedMoments(0, {})
        tasks = (
            (inputs.shard(shard), shard.start, count, names, self.seed)
            for shard in shards[collected.shards :]
        )
        work = partial(_collect_shard, progress=self.progress) if workers is None else _collect_shard
        for moments in each(workers, work, (self.common,), tasks):
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
    progress: Progress = quiet,
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
