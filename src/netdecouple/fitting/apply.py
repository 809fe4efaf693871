"""Carrying a plan out, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError, PlanError
from netdecouple.execution import threads
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Resources
from netdecouple.families import Problem
from netdecouple.families.chain import method
from netdecouple.fitting.ridge import best_ridge, held_back_error
from netdecouple.fitting.sampling import Inputs
from netdecouple.fitting.sequential import Targets, Walkers, walkers_for
from netdecouple.moments import Moments
from netdecouple.network import Array, Images, Layer, Network
from netdecouple.planning.candidates import applicable
from netdecouple.planning.divergence import rounding
from netdecouple.planning.eligibility import is_too_wide_to_fit
from netdecouple.planning.plan import LayerPlan, Plan

JUMPY = 0.5  # relative difference beyond which no rounding is blamed


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
    checked = []
    for row in plan.layers:
        _check_row(row, layers[row.name])
        known = plan.data_free or row.data_free
        blind = row.changed and (known or is_too_wide_to_fit(layers[row.name], resources))
        checked.append(replace(row, data_free=blind))
    plan = replace(plan, layers=tuple(checked))
    kept = resources.checkpoint
    key = kept.key("applied", plan.to_json())
    changed = {row.name: f"{key}-{i:04}" for i, row in enumerate(plan.layers) if row.changed}
    made: dict[str, AppliedLayer] = {}
    with walkers_for(network, inputs, plan, targets, resources, progress) as walkers:
        for row in plan.layers:
            if not row.changed:
                continue
            own = kept.load(changed[row.name], AppliedLayer)
            if own is None:
                own = _applied(row, layers[row.name], walkers, plan.uniform_rank)
                kept.save(changed[row.name], own)
            walkers.replace(row.name, own.factorization)
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
    if row.channels and len(row.channels) != len(row.sizes):
        raise PlanError(f"layer {row.name!r}: it has not as many channels as sizes; make the plan again")
    try:
        chosen = method(row.family)
        if not chosen.is_possible(layer.is_linear, layer.upsamples):
            raise ValueError(f"it cannot be {row.family}, only {' or '.join(applicable(layer))}")
        chosen.structure(layer.geometry, row.steps)
    except ValueError as error:
        raise PlanError(f"layer {row.name!r}: {error}; make the plan again") from error


def _applied_data_free(row: LayerPlan, layer: Layer, uniform: bool) -> AppliedLayer:
    assert layer.geometry is not None
    problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    with threads.for_unknowns(problem.weight.shape[2]):
        fitted, steps = method(row.family, uniform, rounds=0).fit(problem, row.steps)
    return AppliedLayer(replace(row.with_steps(steps), data_free=True), fitted.astype(np.float32))


def _applied(row: LayerPlan, layer: Layer, walkers: Walkers, uniform: bool) -> AppliedLayer:
    """Fit one layer to what it sees behind those that have been changed so far."""
    assert layer.geometry is not None
    if row.data_free:
        return _applied_data_free(row, layer, uniform)
    look = walkers.look(layer.name)
    fitted, held_back = look.moments.fitted, look.moments.held_back
    if not (fitted.count and held_back.count):  # no sample runs it: its weights are all there is
        return _applied_data_free(row, layer, uniform)
    problem = Problem.of(layer.geometry, layer.weight, fitted)
    with threads.for_unknowns(problem.weight.shape[2]):
        row, regular = _with_ridge(row, problem, held_back, uniform)
        exact, steps = method(row.family, uniform).fit(regular, row.steps)
        row, made = row.with_steps(steps), exact.astype(np.float32)
    error = held_back_error(problem, held_back, made)
    relative = error / max(look.variance, np.finfo(float).tiny)
    return AppliedLayer(row, made, relative, fitted.count, fitted.dependent)


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


def difference(
    network: Network, applied: Applied, images: Images, made: Sequence[Array], tolerance: float
) -> float:
    """How far the outputs of what was made are from those of the composed dense kernels, relative to them.

    Ranked boxes and names of classes jump where anything is rounded otherwise; they may be as far off
    as a hundredth of the tolerance in the kernels takes them, twice.

    Raises:
        ModelError: they are further off than rounding explains.
    """
    plain = network.run(images, applied.kernels)
    worst = rounding(plain, made)
    if worst > tolerance and worst > min(2 * _jump(network, applied, images, plain, tolerance / 100), JUMPY):
        raise ModelError(
            f"what was made of the network differs from its own plan by {worst:.1e}; please report this model"
        )
    return worst


def _jump(network: Network, applied: Applied, images: Images, plain: Sequence[Array], noise: float) -> float:
    """How far noise of this size in the kernels takes the outputs."""
    rng = np.random.default_rng(0)
    nudged = {
        name: ((weight * (1 + noise * rng.standard_normal(weight.shape))).astype(np.float32), bias)
        for name, (weight, bias) in applied.kernels.items()
    }
    return rounding(plain, network.run(images, nudged))
