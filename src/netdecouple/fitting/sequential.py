"""Those who go through the network as it is being decoupled, each with a shard of the inputs.

All of them stop at the same layer, tell what it sees, and go on when it has been replaced. They are here, or
in the workers: there each stays with its shard, and one that is lost starts again and catches up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count as numbers
from typing import Protocol

import numpy as np

from netdecouple.convolution import Factorization
from netdecouple.execution.executors import Workers
from netdecouple.execution.memory import ArrayStore
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Resources
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments, sample_positions
from netdecouple.network import Array, Network
from netdecouple.planning.collection import common_network
from netdecouple.planning.eligibility import EXCLUDED
from netdecouple.planning.plan import Plan

Made = tuple[str, Factorization]


@dataclass
class Look:
    """What a layer sees in the network decoupled so far, against what it is to make of it."""

    moments: Split
    sums: Array  # (2, n_o): of what the original makes, and of its squares
    rows: int  # that these are of

    def absorb(self, other: Look) -> None:
        """Add what the layer sees of other inputs."""
        self.moments.absorb(other.moments)
        self.sums = self.sums + other.sums
        self.rows += other.rows

    @property
    def variance(self) -> float:
        """Of what the original makes."""
        first, second = self.sums / self.rows
        # where nothing varies, what is left of the difference is rounding
        return max(float((second - first**2).sum()), 1e-12 * float(second.sum()))


class Walkers(Protocol):
    """All of them together."""

    def look(self, layer: str) -> Look:
        """Go to a layer, and tell what it sees."""
        ...

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Put a factorization in the place of a layer."""
        ...

    def __enter__(self) -> Walkers: ...

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Let them go."""
        ...


def walkers_for(
    network: Network,
    inputs: Inputs,
    plan: Plan,
    targets: Targets | None,
    resources: Resources,
    progress: Progress,
) -> Walkers:
    """In the workers, where these can keep something; else here. They set out when they are first asked."""
    workers = resources.workers
    if workers is not None and workers.is_steady:
        return _Elsewhere(network, inputs, plan, resources, workers)
    return _Here(network, inputs, plan, targets, resources, progress)


def targets_for(
    network: Network, inputs: Inputs, plans: Sequence[Plan], progress: Progress, resources: Resources
) -> Targets | None:
    """What several plans share; nothing, where nobody here has a use for it."""
    alone = resources.workers is None and resources.parts == 1
    return Targets(network, inputs, plans, progress, resources) if alone and not plans[0].data_free else None


class _Walker:
    """One of them, with its shard, behind the layers that have been replaced."""

    def __init__(
        self,
        network: Network,
        shard: Inputs,
        targets: Targets,
        made: Iterable[Made],
        resources: Resources,
    ) -> None:
        self._layers = {layer.name: layer for layer in network.layers}
        self._shard = shard
        self._targets = targets
        self._walk = network.walk(shard.images, resources.checkpoint.scratch)
        self.passed = 0
        self.seen: str | None = None  # the layer it has stopped at
        for name, factorization in made:
            self.replace(name, factorization)

    def look(self, name: str) -> Look:
        """Go to a layer, once, and tell what it sees."""
        targets = self._targets
        own = SplitMoments(self._layers[name], self._shard)
        self.seen = name
        for seen in self._walk.observe(name, targets.positions[name]):
            wanted = targets.of(name, seen.images)
            if len(wanted) < len(seen.patches):
                continue  # which layers run depends on the samples: the original did not run this one here
            own.add(seen.images, seen.patches, wanted if seen.shortcut is None else wanted - seen.shortcut)
        return Look(own.both, targets.sums[name], targets.positions[name].size)

    def replace(self, name: str, factorization: Factorization) -> None:
        """Put a factorization in the place of a layer, by the same steps whether it has been seen or not."""
        self._walk.advance(name)
        self._walk.replace(name, factorization)
        self.passed += 1


class _Here:
    """In this process."""

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        plan: Plan,
        targets: Targets | None,
        resources: Resources,
        progress: Progress,
    ) -> None:
        self._network, self._inputs, self._plan = network, inputs, plan
        self._targets, self._resources, self._progress = targets, resources, progress
        self._made: list[Made] = []
        self._walkers: list[_Walker] = []

    def look(self, layer: str) -> Look:
        if not self._walkers:
            self._walkers = list(self._begun())
        first, *others = self._walkers
        look = first.look(layer)
        for other in others:
            look.absorb(other.look(layer))
        return look

    def _begun(self) -> Iterable[_Walker]:
        inputs, resources = self._inputs, self._resources
        total = len(inputs.images)
        for part in resources.shards_of(total):
            targets = self._targets if resources.parts == 1 else None
            shard = inputs if resources.parts == 1 else inputs.shard(part)
            own = targets or Targets(
                self._network, shard, [self._plan], self._progress, resources, part, total
            )
            yield _Walker(self._network, shard, own, self._made, resources)

    def replace(self, layer: str, factorization: Factorization) -> None:
        self._made.append((layer, factorization))
        for walker in self._walkers:
            walker.replace(layer, factorization)

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._walkers.clear()


@dataclass(frozen=True)
class _Start:
    """What a walker needs that sets out."""

    shard: Inputs
    part: slice
    total: int
    plan: Plan
    resources: Resources
    made: tuple[Made, ...]


class _Elsewhere:
    """In workers that keep them."""

    _numbers = numbers()

    def __init__(
        self, network: Network, inputs: Inputs, plan: Plan, resources: Resources, workers: Workers
    ) -> None:
        self._inputs, self._plan, self._resources, self._workers = inputs, plan, resources, workers
        self._common = common_network(network, inputs, resources)
        self._parts = resources.shards_of(len(inputs.images))
        told = f"{self._common.key} {plan.to_json()} {next(self._numbers)}"
        self._key = hashlib.sha256(told.encode()).hexdigest()
        self._made: list[Made] = []
        self._told = -1  # factorizations that they know; none has set out yet

    def look(self, layer: str) -> Look:
        starting = range(len(self._parts)) if self._told < 0 else ()
        new = tuple(self._made[self._told :]) if self._told >= 0 else ()
        looks = self._asked(
            layer, [(i, self._start(i) if i in starting else None, new) for i in range(len(self._parts))]
        )
        total: Look | None = None
        later: dict[int, Look | None] = {}
        for index, look in enumerate(looks):
            if look is None or later:  # it has to set out again, and the order of the sum is to stay
                later[index] = look
            elif total is None:
                total = look
            else:
                total.absorb(look)
        lost = [index for index, look in later.items() if look is None]
        if lost:
            self._workers.refresh()
            again = self._asked(layer, [(index, self._start(index), ()) for index in lost])
            later |= dict(zip(lost, again, strict=True))
        for look in later.values():
            assert look is not None, "who has just set out has nothing to miss"
            if total is None:
                total = look
            else:
                total.absorb(look)
        assert total is not None
        self._told = len(self._made)
        return total

    def _start(self, index: int) -> _Start:
        part = self._parts[index]
        return _Start(
            self._inputs.shard(part),
            part,
            len(self._inputs.images),
            self._plan,
            self._resources.elsewhere,
            tuple(self._made),
        )

    def _asked(
        self, layer: str, pieces: Sequence[tuple[int, _Start | None, tuple[Made, ...]]]
    ) -> Iterable[Look | None]:
        owns = ((f"{self._key} {i}", start, self._told, new, layer) for i, start, new in pieces)
        places = [index for index, _, _ in pieces]
        yield from self._workers.each(_looked, (self._common,), owns, places=places)

    def replace(self, layer: str, factorization: Factorization) -> None:
        self._made.append((layer, factorization))

    def __enter__(self) -> _Elsewhere:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None and self._told >= 0:  # where something went wrong, they go when others set out
            places = range(self._workers.count)
            list(self._workers.each(_let_go, (), [(self._key,) for _ in places], places=places))


_walkers: dict[str, _Walker] = {}  # of this process, if it is a worker


def _let_go(run: str) -> None:
    """Forget a run's walkers; a piece of work."""
    for key in [known for known in _walkers if known.startswith(run)]:
        del _walkers[key]


def _looked(
    network: Network, key: str, start: _Start | None, told: int, new: Sequence[Made], layer: str
) -> Look | None:
    """Have a walker go on to a layer; a piece of work. None: it is not here, or not where it should be."""
    if start is not None:
        run = key.partition(" ")[0]
        for other in [known for known in _walkers if not known.startswith(run)]:  # of a run that is over
            del _walkers[other]
        targets = Targets(network, start.shard, [start.plan], quiet, start.resources, start.part, start.total)
        _walkers[key] = _Walker(network, start.shard, targets, start.made, start.resources)
    else:
        known = _walkers.get(key)
        if known is None or known.passed != told or known.seen == layer:
            return None
        for name, factorization in new:
            known.replace(name, factorization)
    return _walkers[key].look(layer)


class Targets:
    """What the original network produced at sampled positions of the layers that some plans change.

    Shortcuts are added: a residual branch's last layer thereby also makes up for what is already wrong there.
    All layers that could be changed are looked at, whatever the plans say, as a runtime may round otherwise
    where it is asked for less: several plans' targets are, number for number, those of each of them.

    Args:
        inputs: all, or one ``part`` of ``total``.
    """

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        plans: Sequence[Plan],
        progress: Progress = quiet,
        resources: Resources = Resources(),
        part: slice | None = None,
        total: int = 0,
    ) -> None:
        count = len(inputs.images)
        excluded = {row.name for row in plans[0].layers if row.reason == EXCLUDED}
        able = [la for la in network.layers if la.geometry and not la.reason and la.name not in excluded]
        wanted = {row.name for plan in plans for row in plan.layers if row.changed and not row.data_free}
        part, total = part or slice(0, count), total or count
        self.positions = {la.name: sample_positions(la, total, plans[0].seed)[part] for la in able}
        self._store = ArrayStore(resources.store_bytes, resources.checkpoint.scratch)
        self._recorded: dict[str, list[slice]] = {name: [] for name in wanted}
        self.sums = {la.name: np.zeros((2, len(la.bias))) for la in able if la.name in wanted}
        for seen in network.observe(inputs.images, self.positions if wanted else {}, with_patches=False):
            progress("Recording targets", min(seen.images.stop, count), count)
            if seen.layer not in wanted:
                continue
            y = seen.outputs
            self.sums[seen.layer] += [
                y.sum(axis=0, dtype=np.float64),
                np.square(y, dtype=np.float64).sum(axis=0),
            ]
            self._store[seen.layer, seen.images.start] = y if seen.shortcut is None else y + seen.shortcut
            self._recorded[seen.layer].append(seen.images)

    def of(self, layer: str, images: slice) -> np.ndarray:
        """Targets (n · p, n_o) of a run of images, whatever batches they were recorded in."""
        per_image = self.positions[layer].shape[1]
        found = []
        for batch in self._recorded[layer]:
            rows = slice(
                max(images.start - batch.start, 0) * per_image, (images.stop - batch.start) * per_image
            )
            if batch.start < images.stop and images.start < batch.stop:
                found.append(self._store[layer, batch.start][rows])
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)
