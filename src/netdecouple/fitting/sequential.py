"""Fit layers in order: what the original network produced, and what layers read in the partly decoupled one.

Inputs are split into shards (DESIGN §4). Every shard stops at the same layer and continues after that layer
has been replaced. A shard stays in one process; if that process dies, it starts again and replays the
replacements.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from netdecouple.convolution import Factorization
from netdecouple.execution.executors import Shared, Stale, ThisProcess
from netdecouple.execution.memory import ArrayStore
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Run
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments
from netdecouple.network import Array, Network, Observation, Walk
from netdecouple.planning.analysis import shared_network
from netdecouple.planning.eligibility import EXCLUDED
from netdecouple.planning.plan import Plan

Replaced = tuple[str, Factorization]  # a layer's name, and what has been put in its place


class Targets:
    """Targets of asymmetric reconstruction (DESIGN §4), for all layers that some plans change.

    A layer is fitted to ``t = (y + s) - s'``: y is its output in the original network, s the original's
    shortcut that is added to y, and s' the same shortcut in the partly decoupled network. So the last layer
    of a residual branch also corrects the error that the shortcut has by then. Without a shortcut, t = y.

    All layers that could be changed are observed, whatever the plans say, because a runtime may round
    differently when fewer tensors are asked for: the targets of several plans are, bit by bit, those of each
    of them.

    Args:
        inputs: all inputs, or those of one ``part`` of ``total``.
    """

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        plans: Sequence[Plan],
        progress: Progress = quiet,
        part: slice | None = None,
        total: int = 0,
    ) -> None:
        count = len(inputs.images)
        excluded = {row.name for row in plans[0].layers if row.reason == EXCLUDED}
        able = [la for la in network.layers if la.geometry and not la.reason and la.name not in excluded]
        fitted = {row.name for plan in plans for row in plan.layers if row.changed and not row.data_free}
        part, total = part or slice(0, count), total or count
        self.positions = {la.name: inputs.positions(la, plans[0].seed, total)[part] for la in able}
        # per layer, the sums of 1, y and y² over all samples, by their weights (3, n_o)
        self.sums = {la.name: np.zeros((3, len(la.bias))) for la in able if la.name in fitted}
        self._store = ArrayStore(network.memory.store_bytes, network.memory.scratch)  # y + s
        self._batches: dict[str, list[slice]] = {name: [] for name in fitted}
        for observed in network.observe(inputs.images, self.positions if fitted else {}, with_patches=False):
            progress("Recording targets", min(observed.images.stop, count), count)
            if observed.layer not in fitted:
                continue
            y, s = observed.outputs, observed.shortcut
            self.sums[observed.layer] += _sums(
                y, inputs.weights(observed.layer, y, observed.images.stop - observed.images.start)
            )
            self._store[observed.layer, observed.images.start] = y if s is None else y + s
            self._batches[observed.layer].append(observed.images)

    def of(self, observed: Observation) -> Array | None:
        """Return the targets t (n · p, n_o) of a batch of the partly decoupled network.

        None if the original network did not run the layer for all of its images: which layers are run may
        depend on the images. The batches of the two networks need not be the same.
        """
        layer, images = observed.layer, observed.images
        per_image = self.positions[layer].shape[1]
        rows = []
        for batch in self._batches[layer]:
            if batch.start < images.stop and images.start < batch.stop:
                begin = max(images.start - batch.start, 0) * per_image
                rows.append(self._store[layer, batch.start][begin : (images.stop - batch.start) * per_image])
        if sum(map(len, rows)) < len(observed.patches):
            return None
        t = np.concatenate(rows) if rows else observed.outputs
        return t if observed.shortcut is None else t - observed.shortcut


def targets_for(
    network: Network, inputs: Inputs, plans: Sequence[Plan], progress: Progress, run: Run
) -> Targets | None:
    """Record targets once for all ``plans``; None with workers, with several shards, or data-free."""
    alone = run.workers is None and run.shards == 1
    return Targets(network, inputs, plans, progress) if alone and not plans[0].data_free else None


@dataclass
class LayerMoments:
    """Moments of a layer's inputs in the partly decoupled network and of its targets."""

    moments: Split
    sums: Array  # (3, n_o): of 1, the original layer's outputs y, and y², by the samples' weights

    def absorb(self, other: LayerMoments) -> None:
        """Add the moments of other inputs."""
        self.moments.absorb(other.moments)
        self.sums = self.sums + other.sums

    @property
    def variance(self) -> float:
        """Variance of the original layer's outputs, summed over its n_o channels."""
        count, total, total_of_squares = self.sums
        mean, mean_of_squares = total / count, total_of_squares / count
        # for a constant output the difference is nothing but rounding
        return max(float((mean_of_squares - mean**2).sum()), 1e-12 * float(mean_of_squares.sum()))


class SequentialMoments:
    """Moments of one layer after the other, each behind all layers that have been replaced so far.

    Shards are kept by the workers if tasks can be pinned to them, otherwise by this process. Nothing runs
    before the first `collect`. ``targets`` that were recorded before are used by a single local shard.
    """

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        plan: Plan,
        run: Run,
        targets: Targets | None,
        progress: Progress,
    ) -> None:
        self._network = shared_network(network, inputs)
        self._executor = run.for_shards()
        self._is_local = isinstance(self._executor, ThisProcess)
        self._inputs, self._plan = inputs, plan
        self._targets = targets if self._is_local and run.shards == 1 else None
        self._progress = progress if self._is_local else quiet
        self._key = secrets.token_hex(8)
        self._parts = run.parts(len(inputs.images))
        self._replaced: list[Replaced] = []
        self._sent: int | None = None  # number of replacements that the shards have got

    def collect(self, layer: str) -> LayerMoments:
        """Advance to a layer and return its moments over all shards, added in their order."""
        sent = len(self._replaced) if self._sent is None else self._sent
        new = tuple(self._replaced[sent:])
        tasks = ((self._shard(i), self._network, layer, sent, new) for i in range(len(self._parts)))
        shards = self._executor.map(_Shard.collect, tasks, pinned=True)
        total: LayerMoments = next(shards)
        for moments in shards:
            total.absorb(moments)
        self._sent = len(self._replaced)
        return total

    def _shard(self, index: int) -> Shared:
        def load() -> _Shard:
            part, total = self._parts[index], len(self._inputs.images)
            record = partial(Targets, plans=[self._plan], progress=self._progress, part=part, total=total)
            return _Shard(self._inputs.shard(part), tuple(self._replaced), self._targets, record)

        return Shared(f"{self._key} {index}", load, self._key)

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Replace a layer in all shards, when they advance."""
        self._replaced.append((layer, factorization))

    def __enter__(self) -> SequentialMoments:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        may_run = kind is None or self._is_local  # after an error, workers may have gone
        if self._sent is not None and may_run:
            self._executor.forget(self._key)


@dataclass
class _Shard:
    """The partly decoupled network on one shard of the inputs. It starts with the first `collect`."""

    inputs: Inputs
    initial: tuple[Replaced, ...]
    targets: Targets | None
    record: Callable[[Network, Inputs], Targets]
    count: int = 0  # of replacements
    layer: str | None = None  # at which it has stopped
    walk: Walk | None = None

    def collect(self, network: Network, layer: str, sent: int, new: Sequence[Replaced]) -> LayerMoments:
        """Replace the layers that are ``new`` after ``sent`` ones, advance to a layer, return its moments.

        Raises:
            Stale: it has not got exactly ``sent`` replacements, or is at the layer already.
        """
        if self.walk is None:
            self.targets = self.targets or self.record(network, self.inputs)
            self.walk = network.walk(self.inputs.images)
            new = self.initial
        elif self.count != sent or self.layer == layer:
            raise Stale
        for name, factorization in new:
            self.walk.advance(name)
            self.walk.replace(name, factorization)
            self.count += 1
        self.layer, targets = layer, self.targets
        assert targets is not None
        positions = targets.positions[layer]
        moments = SplitMoments(next(la for la in network.layers if la.name == layer), self.inputs)
        for observed in self.walk.observe(layer, positions):
            if (t := targets.of(observed)) is not None:
                moments.add(observed.images, observed.patches, t)
        return LayerMoments(moments.both, targets.sums[layer])


def _sums(y: Array, weights: Array) -> Array:
    """Sum up 1, y and y² over the samples y (n, n_o), by their weights (n,): (3, n_o)."""
    y = np.asarray(y, np.float64)
    return np.stack([np.full(y.shape[1], weights.sum()), weights @ y, weights @ np.square(y)])
