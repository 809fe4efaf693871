"""Apply a plan: fit its layers in order and replace each before the next is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError, PlanError
from netdecouple.execution import threads
from netdecouple.execution.memory import Memory
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Run
from netdecouple.families import Problem
from netdecouple.families.chain import method
from netdecouple.families.linalg import TINY
from netdecouple.fitting.ridge import best_ridge, held_out_error
from netdecouple.fitting.sampling import Inputs
from netdecouple.fitting.sequential import SequentialMoments, Targets
from netdecouple.network import Array, Images, Layer, Network
from netdecouple.planning.candidates import applicable
from netdecouple.planning.divergence import rounding
from netdecouple.planning.eligibility import is_too_wide_to_fit
from netdecouple.planning.plan import LayerPlan, Plan

MOST = 0.5  # relative difference of outputs that rounding can never explain


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What training the decoupled layers together has brought."""

    seconds: float
    steps: int
    loss_before: float  # on held-out inputs
    loss: float


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A plan that has been applied: with its ranks and ridges, and the stages of every changed layer."""

    plan: Plan
    factorizations: dict[str, Factorization]
    errors: dict[str, float] = field(default_factory=dict)  # see `AppliedLayer`; of layers that were fitted
    samples: dict[str, int] = field(default_factory=dict)
    dependent: dict[str, int] = field(default_factory=dict)
    refinement: Refinement | None = None

    @property
    def kernels(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Weight (n_o, n_i / groups, kh, kw) and bias (n_o,) of changed layers as dense convolutions."""
        return {
            name: (factorization.dense().astype(np.float32), np.asarray(factorization.bias, np.float32))
            for name, factorization in self.factorizations.items()
        }


@dataclass(frozen=True, kw_only=True)
class AppliedLayer:
    """One layer's row of the plan, with its ranks and ridge, and its stages.

    The rest is of a layer that was fitted to samples, not to its weights alone.
    """

    row: LayerPlan
    factorization: Factorization
    error: float | None = None  # on held-out inputs, relative to the variance of the layer's outputs
    samples: int = 0  # that it was fitted to
    dependent: int = 0  # inputs of the layer that are linear combinations of others in these samples


def apply(
    network: Network,
    inputs: Inputs,
    plan: Plan,
    progress: Progress = quiet,
    targets: Targets | None = None,
    run: Run = Run(),
    is_trial: bool = False,
) -> Applied:
    """Fit every chosen layer to its inputs in the network as decoupled so far, and to the original's outputs
    at the same positions (asymmetric reconstruction, see `Targets`).

    Ranks and ridges that the plan already has are kept, so a plan that is applied twice gives the same
    network. ``targets`` that were recorded before, for several plans at once, change nothing. For a trial
    the fits are refined once only, and nothing is counted that only reports show.

    Raises:
        PlanError: the network has other layers than the plan, or a layer cannot be what the plan says.
        OutputError: intermediate results cannot be written.
    """
    layers = {layer.name: layer for layer in network.layers}
    if [row.name for row in plan.layers] != list(layers):
        raise PlanError("the plan is for a network of other layers; make it again for this model")
    rows = [_checked(row, layers[row.name], plan.data_free, run.memory) for row in plan.layers]
    plan = replace(plan, layers=tuple(rows))
    key = run.checkpoint.key("applied", (plan.to_json(), inputs.share, is_trial))
    changed = {row.name: (f"{key}-{i:04}", row) for i, row in enumerate(rows) if row.changed}
    applied: dict[str, AppliedLayer] = {}
    with SequentialMoments(network, inputs, plan, run, targets, progress) as sequential:
        for name, (entry, row) in changed.items():
            fit = partial(_applied, row, layers[name], sequential, plan.uniform_rank, is_trial)
            applied[name] = run.checkpoint.once(entry, AppliedLayer, fit)
            sequential.replace(name, applied[name].factorization)
            progress("Decoupling layers", len(applied), len(changed))
    rows = [applied[row.name].row if row.changed else row for row in rows]
    return Applied(
        plan=replace(plan, layers=tuple(rows)),
        factorizations={name: layer.factorization for name, layer in applied.items()},
        errors={name: layer.error for name, layer in applied.items() if layer.error is not None},
        samples={name: layer.samples for name, layer in applied.items() if layer.error is not None},
        dependent={name: layer.dependent for name, layer in applied.items() if layer.error is not None},
    )


def _checked(row: LayerPlan, layer: Layer, data_free: bool, memory: Memory) -> LayerPlan:
    """Check before any work that a row can be applied; mark layers that are fitted to their weights alone."""
    if not row.changed:
        return row
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
    return replace(row, data_free=data_free or row.data_free or is_too_wide_to_fit(layer, memory))


def _applied(
    row: LayerPlan, layer: Layer, sequential: SequentialMoments, uniform: bool, is_trial: bool
) -> AppliedLayer:
    """Fit one layer to its inputs behind the layers replaced so far, or to its weights alone."""
    assert layer.geometry is not None
    collected = None if row.data_free else sequential.collect(layer.name)
    if collected is None or not (collected.moments.fitted.count and collected.moments.held_out.count):
        problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
        with threads.for_unknowns(layer.geometry.unknowns):
            exact, steps = method(row.family, uniform, rounds=0).fit(problem, row.steps)
        row = replace(row.with_steps(steps), data_free=True)
        return AppliedLayer(row=row, factorization=exact.astype(np.float32))
    fitted, held_out = collected.moments.fitted, collected.moments.held_out
    problem = Problem.of(layer.geometry, layer.weight, fitted)
    with threads.for_unknowns(layer.geometry.unknowns):
        if row.ridge:
            regularized = problem.regularized(row.ridge)
        else:
            ridge, regularized = best_ridge(problem, held_out, _QuickFit(row, uniform))
            row = replace(row, ridge=ridge)
        exact, steps = method(row.family, uniform, 1 if is_trial else None).fit(regularized, row.steps)
        factorization = exact.astype(np.float32)
    error = held_out_error(problem, held_out, factorization)
    return AppliedLayer(
        row=row.with_steps(steps),
        factorization=factorization,
        error=error / max(collected.variance, TINY),
        samples=round(fitted.count),
        dependent=0 if is_trial else fitted.dependent,
    )


class _QuickFit:
    """Fits a layer roughly; the channels that its first fit selects are those of the others."""

    def __init__(self, row: LayerPlan, uniform: bool) -> None:
        self._method, self._steps = method(row.family, uniform, rounds=1), row.steps

    def __call__(self, problem: Problem) -> Factorization:
        factorization, self._steps = self._method.fit(problem, self._steps)
        return factorization


def difference(
    network: Network, applied: Applied, images: Images, outputs: Sequence[Array], tolerance: float
) -> float:
    """Check the outputs of the network that was built from a plan against the plan's own arithmetic.

    The reference is the original network with the dense convolutions that the factorizations equal. Outputs
    like ranked boxes or class indices change by whole steps when anything is rounded differently. So a
    difference beyond the tolerance is accepted if it is at most twice what noise of a hundredth of the
    tolerance in these convolutions causes. The largest difference is returned, relative to the reference.

    Raises:
        ModelError: the outputs differ by more than rounding explains.
    """
    reference = network.run(images, applied.kernels)
    worst = rounding(reference, outputs)
    if worst <= tolerance:
        return worst
    rng = np.random.default_rng(0)
    noisy = {
        name: ((weight * (1 + tolerance / 100 * rng.standard_normal(weight.shape))).astype(np.float32), bias)
        for name, (weight, bias) in applied.kernels.items()
    }
    if worst > min(2 * rounding(reference, network.run(images, noisy)), MOST):
        raise ModelError(
            f"the outputs of the decoupled network differ from those of its own plan by {worst:.1e}; "
            "please report this model"
        )
    return worst
