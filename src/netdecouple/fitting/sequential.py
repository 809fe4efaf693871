"""Advance the partly decoupled network layer by layer and collect each layer's moments (DESIGN §4).

Inputs are split into shards. Every shard stops at the same layer and continues after that layer has been
replaced. A shard stays in one process; if that process dies, it starts again and replays the replacements.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from netdecouple.convolution import Factorization
from netdecouple.execution.executors import Shared, Stale, ThisProcess
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Run
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments
from netdecouple.fitting.targets import Targets
from netdecouple.network import Array, Network, Walk
from netdecouple.planning.collection import shared_network
from netdecouple.planning.plan import Plan

Replaced = tuple[str, Factorization]  # a layer's name, and what has been put in its place


@dataclass
class LayerMoments:
    """Moments of a layer's inputs in the partly decoupled network and of its targets."""

    moments: Split
    sums: Array  # (2, n_o): of the original layer's outputs y, and of y²
    rows: int  # the number of outputs in these sums

    def absorb(self, other: LayerMoments) -> None:
        """Add the moments of other inputs."""
        self.moments.absorb(other.moments)
        self.sums = self.sums + other.sums
        self.rows += other.rows

    @property
    def variance(self) -> float:
        """Variance of the original layer's outputs, summed over its n_o channels."""
        mean, mean_of_squares = self.sums / self.rows
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
        targets: Targets | None = None,
        progress: Progress = quiet,
    ) -> None:
        self._network = shared_network(network, inputs)
        self._executor = run.for_shards()
        if not isinstance(self._executor, ThisProcess):
            targets, progress = None, quiet
        self._inputs, self._plan, self._progress = inputs, plan, progress
        self._targets = targets if run.shards == 1 else None
        self._key = secrets.token_hex(8)
        self._parts = run.parts(len(inputs.images))
        self._replaced: list[Replaced] = []
        self._sent: int | None = None  # number of replacements that the shards have got

    def collect(self, layer: str) -> LayerMoments:
        """Advance to a layer and return its moments over all shards, added in their order."""
        sent = len(self._replaced) if self._sent is None else self._sent
        new = tuple(self._replaced[sent:])
        tasks = ((self._network, self._shard(i), layer, sent, new) for i in range(len(self._parts)))
        shards = self._executor.map(_collect, tasks, pinned=True)
        total: LayerMoments = next(shards)
        for moments in shards:
            total.absorb(moments)
        self._sent = len(self._replaced)
        return total

    def _shard(self, index: int) -> Shared:
        def load() -> _Shard:
            part, total = self._parts[index], len(self._inputs.images)
            shard = self._inputs.shard(part)
            return _Shard(shard, part, total, self._plan, self._replaced, self._targets, self._progress)

        return Shared(f"{self._key} {index}", load, self._key)

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Replace a layer in all shards, when they advance."""
        self._replaced.append((layer, factorization))

    def __enter__(self) -> SequentialMoments:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        is_local = isinstance(self._executor, ThisProcess)
        if self._sent is not None and (kind is None or is_local):  # after an error, workers may have gone
            self._executor.forget(self._key)


class _Shard:
    """The partly decoupled network on one shard of the inputs. It starts with the first `collect`."""

    def __init__(
        self,
        inputs: Inputs,
        part: slice,
        total: int,
        plan: Plan,
        replaced: Sequence[Replaced],
        targets: Targets | None,
        progress: Progress,
    ) -> None:
        self._inputs = inputs
        self._record = partial(Targets, plans=[plan], progress=progress, part=part, total=total)
        self._targets = targets
        self._initial = tuple(replaced)
        self._count = 0  # of replacements
        self._layer: str | None = None  # at which it has stopped
        self._walk: Walk | None = None

    def collect(self, network: Network, layer: str, sent: int, new: Sequence[Replaced]) -> LayerMoments:
        """Replace the layers that are ``new`` after ``sent`` ones, advance to a layer, return its moments.

        Raises:
            Stale: it has not got exactly ``sent`` replacements, or is at the layer already.
        """
        if self._walk is None:
            self._targets = self._targets or self._record(network, self._inputs)
            self._walk = network.walk(self._inputs.images)
            new = self._initial
        elif self._count != sent or self._layer == layer:
            raise Stale
        for name, factorization in new:
            self._walk.advance(name)
            self._walk.replace(name, factorization)
            self._count += 1
        self._layer, targets = layer, self._targets
        assert targets is not None
        positions = targets.positions[layer]
        moments = SplitMoments(next(la for la in network.layers if la.name == layer), self._inputs)
        for observed in self._walk.observe(layer, positions):
            t = targets.of(observed)
            if t is not None:
                moments.add(observed.images, observed.patches, t)
        return LayerMoments(moments.both, targets.sums[layer], positions.size)


def _collect(network: Network, shard: _Shard, layer: str, sent: int, new: Sequence[Replaced]) -> LayerMoments:
    """Collect a layer's moments of one shard; a task."""
    return shard.collect(network, layer, sent, new)
