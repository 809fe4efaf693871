"""Carrying a plan out, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from netdecouple import threads
from netdecouple.convolution import Factorization
from netdecouple.errors import PlanError
from netdecouple.families import Problem
from netdecouple.families.combined import method
from netdecouple.families.ridge import best_ridge, held_back_error
from netdecouple.frontends import Layer, Network, Walk
from netdecouple.frontends.storage import ArrayStore
from netdecouple.moments import Moments
from netdecouple.planning.analysis import EXCLUDED, Progress, is_too_wide_to_fit, quiet
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.resources import Resources
from netdecouple.sampling import Inputs, SplitMoments, sample_positions


@dataclass(frozen=True)
class Applied:
    """A plan carried out: its ranks and ridges are filled in, and every changed layer has its stages."""

    plan: Plan
    factorizations: dict[str, Factorization]
    errors: dict[str, float]  # on held-back inputs, relative to the variance of the layer's output
    samples: dict[str, int]  # fitted on, per layer
    dependent: dict[str, int] = field(default_factory=dict)  # inputs that the samples cannot tell apart

    @property
    def kernels(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Weight (n_o, n_i / groups, kh, kw) and bias (n_o,) that every changed layer stands for now."""
        return {
            name: (made.dense().astype(np.float32), np.asarray(made.bias, np.float32))
            for name, made in self.factorizations.items()
        }


@dataclass(frozen=True)
class AppliedLayer:
    """One layer carried out; its error and number of samples where it was fitted to any."""

    row: LayerPlan
    factorization: Factorization
    error: float | None = None  # relative to the variance of the layer's output
    samples: int = 0
    dependent: int = 0  # inputs that the samples cannot tell apart


def apply(
    network: Network,
    inputs: Inputs,
    plan: Plan,
    progress: Progress = quiet,
    targets: Targets | None = None,
    resources: Resources = Resources(),
) -> Applied:
    """Fit every chosen layer on what it sees in the network as decoupled so far, against what the
    original produced at the same places (asymmetric reconstruction, DESIGN §4).

    Ranks and ridges that the plan already has are kept, so a plan applied twice gives the same network.
    ``targets`` may have been recorded before, for several plans at once; that changes nothing either.

    Raises:
        PlanError: the plan names other layers than the network has, or asks for what a layer cannot be.
        OutputError: what was found cannot be kept.
    """
    layers = {layer.name: layer for layer in network.layers}
    if [row.name for row in plan.layers] != list(layers):
        raise PlanError("the plan is for a network of other layers; make it again for this model")
    for row in plan.layers:
        _check_row(row, layers[row.name])
    kept = resources.checkpoint
    key = kept.key("applied", plan.to_json())
    changed = {row.name: f"{key}-{i:04}" for i, row in enumerate(plan.layers) if row.changed}
    made: dict[str, AppliedLayer] = {}
    fitting: Fitting | None = None
    for row in plan.layers:
        if not row.changed:
            continue
        layer = layers[row.name]
        own = kept.load(changed[row.name], AppliedLayer)
        if own is None:
            if plan.data_free:
                own = _applied_data_free(row, layer, plan.uniform_rank)
            else:
                fitting = fitting or Fitting.at(network, inputs, plan, made, progress, targets, resources)
                own = fitting.applied(row, layer)
            kept.save(changed[row.name], own)
        elif fitting is not None:
            fitting.walk.advance(row.name)
        if fitting is not None:
            fitting.walk.replace(row.name, own.factorization)
        made[row.name] = own
        progress("Decoupling layers", len(made), len(changed))
    rows = tuple(made[row.name].row if row.changed else row for row in plan.layers)
    return Applied(
        replace(plan, layers=rows),
        {name: own.factorization for name, own in made.items()},
        {name: own.error for name, own in made.items() if own.error is not None},
        {name: own.samples for name, own in made.items() if own.error is not None},
        {name: own.dependent for name, own in made.items() if own.error is not None},
    )


def _check_row(row: LayerPlan, layer: Layer) -> None:
    """Refuse what cannot be carried out, before any work."""
    if not row.changed:
        return
    if layer.geometry is None or layer.reason:
        raise PlanError(f"layer {row.name!r} cannot be decoupled ({layer.reason}); make the plan again")
    if layer.methods and row.family not in layer.methods:
        raise PlanError(f"layer {row.name!r} cannot be {row.family}, only {' or '.join(layer.methods)}")
    if row.channels and len(row.channels) != len(row.sizes):
        raise PlanError(f"layer {row.name!r}: it has not as many channels as sizes; make the plan again")
    try:
        method(row.family).structure(layer.geometry, row.steps)
    except ValueError as error:
        raise PlanError(f"layer {row.name!r}: {error}; make the plan again") from error


def _applied_data_free(row: LayerPlan, layer: Layer, uniform: bool) -> AppliedLayer:
    assert layer.geometry is not None
    problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    with threads.for_unknowns(problem.weight.shape[2]):
        fitted, steps = method(row.family, uniform, rounds=0).fit(problem, row.steps)
    return AppliedLayer(row.with_steps(steps), fitted.astype(np.float32))


@dataclass(frozen=True)
class Fitting:
    """A plan half carried out: what the network decoupled so far shows a layer, and what it is to make."""

    inputs: Inputs
    targets: Targets
    walk: Walk
    uniform: bool
    resources: Resources

    @classmethod
    def at(
        cls,
        network: Network,
        inputs: Inputs,
        plan: Plan,
        made: Mapping[str, AppliedLayer],
        progress: Progress,
        targets: Targets | None,
        resources: Resources,
    ) -> Fitting:
        """Begin, or go on behind the layers that an earlier run has ``made``, by the same steps as it did."""
        targets = targets or Targets(network, inputs, [plan], progress, resources)
        walk = network.walk(inputs.images, resources.checkpoint.scratch)
        for name, layer in made.items():
            walk.advance(name)
            walk.replace(name, layer.factorization)
        return cls(inputs, targets, walk, plan.uniform_rank, resources)

    def applied(self, row: LayerPlan, layer: Layer) -> AppliedLayer:
        """Fit one layer, at which the walk has arrived then."""
        assert layer.geometry is not None
        targets = self.targets
        if is_too_wide_to_fit(layer, self.resources):
            self.walk.advance(layer.name)
            return _applied_data_free(row, layer, self.uniform)
        own = SplitMoments(layer, self.inputs)
        for seen in self.walk.observe(layer.name, targets.positions[layer.name]):
            wanted = targets.of(layer.name, seen.images)
            if len(wanted) < len(seen.patches):
                continue  # which layers run depends on the samples: the original did not run this one here
            own.add(seen.images, seen.patches, wanted if seen.shortcut is None else wanted - seen.shortcut)
        if not (own.fitted.count and own.held_back.count):  # no sample runs it: its weights are all there is
            return _applied_data_free(row, layer, self.uniform)
        problem = Problem.of(layer.geometry, layer.weight, own.fitted)
        with threads.for_unknowns(problem.weight.shape[2]):
            row, regular = _with_ridge(row, problem, own.held_back, self.uniform)
            exact, steps = method(row.family, self.uniform).fit(regular, row.steps)
            row, fitted = row.with_steps(steps), exact.astype(np.float32)
        error = held_back_error(problem, own.held_back, fitted)
        variance = max(targets.variances[layer.name], np.finfo(float).tiny)
        return AppliedLayer(row, fitted, error / variance, own.fitted.count, own.fitted.dependent)


def _with_ridge(
    row: LayerPlan, problem: Problem, held_back: Moments, uniform: bool
) -> tuple[LayerPlan, Problem]:
    """Choose the ridge on held-back inputs, unless the plan says it, and pose the problem with it."""
    if row.ridge:
        return row, problem.regularized(row.ridge)

    def quick(p: Problem) -> Factorization:
        return method(row.family, uniform, rounds=1).fit(p, row.steps)[0]

    ridge, regular = best_ridge(problem, held_back, quick)
    return replace(row, ridge=ridge), regular


class Targets:
    """What the original network produced at sampled positions of the layers that some plans change.

    Shortcuts are added: a residual branch's last layer thereby also makes up for what is already wrong there.
    All layers that could be changed are looked at, whatever the plans say, as a runtime may round otherwise
    where it is asked for less: several plans' targets are, number for number, those of each of them.
    """

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        plans: Sequence[Plan],
        progress: Progress = quiet,
        resources: Resources = Resources(),
    ) -> None:
        count = len(inputs.images)
        excluded = {row.name for row in plans[0].layers if row.reason == EXCLUDED}
        able = [la for la in network.layers if la.geometry and not la.reason and la.name not in excluded]
        wanted = {row.name for plan in plans for row in plan.layers if row.changed}
        wanted -= {la.name for la in able if is_too_wide_to_fit(la, resources)}
        self.positions = {la.name: sample_positions(la, count, plans[0].seed) for la in able}
        self._store = ArrayStore(resources.store_bytes, resources.checkpoint.scratch)
        self._recorded: dict[str, list[slice]] = {name: [] for name in wanted}
        sums = {la.name: np.zeros((2, len(la.bias))) for la in able if la.name in wanted}
        for seen in network.observe(inputs.images, self.positions if wanted else {}, with_patches=False):
            progress("Recording targets", min(seen.images.stop, count), count)
            if seen.layer not in wanted:
                continue
            y = seen.outputs
            sums[seen.layer] += [y.sum(axis=0, dtype=np.float64), np.square(y, dtype=np.float64).sum(axis=0)]
            self._store[seen.layer, seen.images.start] = y if seen.shortcut is None else y + seen.shortcut
            self._recorded[seen.layer].append(seen.images)
        self.variances = {}
        for name, (first, second) in sums.items():
            rows = self.positions[name].size
            second /= rows
            # where nothing varies, what is left of the difference is rounding
            self.variances[name] = max(
                float((second - (first / rows) ** 2).sum()), 1e-12 * float(second.sum())
            )

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
