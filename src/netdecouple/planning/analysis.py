"""The analysis of a network: every layer's candidates, what each costs and what it would change.

It serves any number of budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from netdecouple.execution import threads
from netdecouple.execution.executors import Shared
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Run
from netdecouple.families import Problem
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments
from netdecouple.network import Array, Images, Layer, Network
from netdecouple.planning.candidates import LayerCandidates, candidates
from netdecouple.planning.collection import MomentCollector, groups_of
from netdecouple.planning.divergence import Loss, divergence, loss_kind
from netdecouple.planning.eligibility import is_too_wide_to_fit, kept_reasons
from netdecouple.planning.sensitivity import (
    OriginalOutputs,
    errors_with_margin,
    predicted_losses,
    probe_counts,
)
from netdecouple.planning.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What can be done to a network: every layer's candidates, with their losses."""

    network: Network
    settings: Settings
    inputs: Inputs
    loss: Loss
    reasons: dict[str, str]  # why a layer is kept
    candidates: dict[str, LayerCandidates]
    losses: dict[str, tuple[float, ...]]  # predicted for each of a layer's candidates
    objectives: dict[str, tuple[float, ...]]  # the same with the margin: what the choice minimises


@dataclass(frozen=True, kw_only=True)
class EvaluatedLayer:
    """One layer's candidates without their probes, and for each its predicted loss and its objective."""

    candidates: LayerCandidates
    losses: tuple[float, ...]
    objectives: tuple[float, ...]


def analyze(
    network: Network,
    inputs: Inputs,
    settings: Settings,
    progress: Progress = quiet,
    run: Run = Run(),
) -> Analysis:
    """Evaluate the candidates of every layer that may change: their errors, and their effect on the outputs.

    Raises:
        ModelError: activations are NaN or Inf, or there is nothing to decouple.
        OutputError: the work folder cannot be written.
    """
    reasons = kept_reasons(network.layers, settings, run.memory)
    layers = [la for la in network.layers if la.name not in reasons]
    original = OriginalOutputs(network, inputs, layers)
    held_out = len(inputs.held_back)
    loss = run.checkpoint.once("loss", str, lambda: loss_kind(original.outputs, held_out, settings.loss))
    macs = sum(layer.macs for layer in network.layers)
    probes, samples = probe_counts(len(layers), macs, held_out, loss)
    collector = MomentCollector(
        network=network, inputs=inputs, seed=settings.seed, run=run, progress=progress
    )
    key = f"{samples} outputs, seed {settings.seed}, {collector.shared.key}"
    shown = Shared(key, lambda: original.probe_samples(samples))
    evaluated: dict[str, EvaluatedLayer] = {}
    for layer in _evaluated(collector, layers, shown, (settings, probes, loss)):
        name = layer.candidates.layer
        evaluated[name] = layer
        if not layer.candidates.candidates:
            reasons[name] = "nothing costs less than the layer itself"
        progress("Evaluating candidates", len(evaluated), len(layers))
    return Analysis(
        network=network,
        settings=settings,
        inputs=inputs,
        loss=loss,
        reasons=reasons,
        candidates={name: layer.candidates for name, layer in evaluated.items()},
        losses={name: layer.losses for name, layer in evaluated.items()},
        objectives={name: layer.objectives for name, layer in evaluated.items()},
    )


def _evaluated(
    collector: MomentCollector, layers: Sequence[Layer], shown: Shared, options: tuple[Settings, int, Loss]
) -> Iterator[EvaluatedLayer]:
    """Evaluate layers in groups, so that the moments in memory at one time are bounded."""
    settings, run = options[0], collector.run
    checkpoint = run.checkpoint
    entry = {layer.name: f"evaluated-{index:04}" for index, layer in enumerate(layers)}
    blind = {la.name for la in layers if settings.data_free or is_too_wide_to_fit(la, run.memory)}
    groups = [layers] if settings.data_free else groups_of(layers, blind, run.memory.moment_bytes)
    for index, group in enumerate(groups):
        missing = []
        for layer in group:
            known = checkpoint.load(entry[layer.name], EvaluatedLayer)
            if known is None:
                missing.append(layer)
            else:
                yield known
        with_moments = [la for la in group if la.name not in blind]
        moments: dict[str, Split] = {}
        if any(la in missing for la in with_moments):
            moments = collector.collect(with_moments, f"moments-{index:04}")
        if run.workers is not None:  # the longest tasks first, so that none of them is alone at the end
            missing.sort(key=SplitMoments.fit_bytes, reverse=True)
        tasks = (
            (collector.shared, shown, layer.name, moments.pop(layer.name, None), *options)
            for layer in missing
        )
        for evaluated in run.map(_evaluate, tasks, ordered=False):
            checkpoint.save(entry[evaluated.candidates.layer], evaluated)
            yield evaluated
        checkpoint.drop(f"moments-{index:04}")


def _evaluate(
    network: Network,
    shown: tuple[Images, list[Array]],
    name: str,
    moments: Split | None,
    settings: Settings,
    probes: int,
    loss: Loss,
) -> EvaluatedLayer:
    """Fit one layer's candidates and run ``probes`` of them in the network; a task for a worker.

    ``shown`` is inputs and the original's outputs on them. Without ``moments`` the weights are all there is.
    """
    layer = next(la for la in network.layers if la.name == name)
    assert layer.geometry is not None
    if moments is None:
        problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    else:
        problem = Problem.of(layer.geometry, layer.weight, moments.fitted)
    held_back = None if moments is None else moments.held_back
    with threads.for_unknowns(problem.weight.shape[2]):
        found = candidates(
            layer, problem, held_back, settings.methods, settings.uniform_rank, probes, settings.rule
        )
    images, outputs = shown
    probed = [
        divergence(outputs, network.run(images, {name: (probe.weight, probe.bias)}), loss)
        for probe in found.probes
    ]
    errors = [probe.relative_error for probe in found.probes]
    return EvaluatedLayer(
        candidates=replace(found, probes=()),
        losses=predicted_losses([c.relative_error for c in found.candidates], errors, probed),
        objectives=predicted_losses(errors_with_margin(found.candidates), errors, probed),
    )
