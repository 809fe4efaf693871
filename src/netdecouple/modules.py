"""The front door for PyTorch modules: plan, apply, check, report, save and load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from netdecouple.api import TOLERANCE
from netdecouple.curve import Files, Show, budgets_in, check_rule, named_after, unseen
from netdecouple.data.calibration import Preprocessing
from netdecouple.errors import BudgetError, ModelError, PlanError
from netdecouple.execution.run import Resources, Run
from netdecouple.fitting.apply import Applied, apply, difference
from netdecouple.fitting.sampling import Inputs, shuffled
from netdecouple.fitting.targets import targets_for
from netdecouple.frontends.torch import folder as files
from netdecouple.frontends.torch.folder import Decoupling
from netdecouple.frontends.torch.network import TorchNetwork, check
from netdecouple.frontends.torch.samples import Samples, collect, to_numpy
from netdecouple.network import Array, Layer
from netdecouple.planning.analysis import Progress, Settings, analyze, quiet
from netdecouple.planning.cost import Budget, budgets_of
from netdecouple.planning.plan import Plan
from netdecouple.planning.solve import BudgetRow, budget_rows, plan_within, ruled_plan
from netdecouple.report.inspection import energies
from netdecouple.report.pictures import pictures
from netdecouple.report.provenance import identity, provenance
from netdecouple.report.report import Disagreement, Report, disagreements_of, layer_reports, quality_of
from netdecouple.report.sweep import Sweep, SweepPoint
from netdecouple.version import __version__


def decouple(
    module: nn.Module,
    calib: Iterable[Any],
    *,
    macs: str | float | None = None,
    parameters: str | float | None = None,
    device: str = "cpu",
    filter: Callable[[str, nn.Module], bool] | None = None,
    arguments: Callable[[Any], Any] | None = None,
    settings: Settings = Settings(),
    samples: int | None = 1000,
    resources: Resources = Resources(),
    progress: Progress = quiet,
    show_budgets: Callable[[list[BudgetRow], str], None] | None = None,
) -> nn.Module:
    """Return a faster copy of a module, decoupled to a budget. The module given is not changed.

    Args:
        module: convolutional; whatever Python its forward runs.
        calib: unlabelled samples in batches: tensors, tuples of arguments, mappings, a DataLoader; or one
            tensor (N, …) of them all.
        macs: the share of the MACs that may stay: 0.5, "50%" or "2x" (two times fewer).
        parameters: the share of the parameters that may stay.
        device: where to run the module while decoupling; the linear algebra is NumPy's.
        filter: called with every layer's name and module; False leaves it alone.
        arguments: makes what the module's forward takes out of one batch of ``calib``, if that is not it.
        settings: families to choose from or one rule for all layers, how to fit, seed, layers to leave alone.
        samples: how many samples to take at most; None takes all.
        resources: where to keep what has been found, so that a run that was ended goes on.
        progress: called with a step's name, what is done and what there is to do.
        show_budgets: called once with the table of budgets that can be met, before solving.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    budgets = budgets_of(macs, parameters)
    if bool(budgets) == (settings.rule is not None):
        raise BudgetError("give a budget (macs=0.5, parameters=0.5) or a rule in the settings, and not both")
    with _opened(module, calib, device, filter, arguments, samples, settings, resources) as opened:
        network, inputs, run = opened
        analysis = analyze(network, inputs, settings, progress, run)
        curve = budget_rows(analysis) if settings.rule is None else []
        if show_budgets is not None and curve:
            show_budgets(curve, analysis.loss)

        def chosen() -> Plan:
            return ruled_plan(analysis) if settings.rule is not None else plan_within(analysis, budgets)

        plan = run.checkpoint.once(run.checkpoint.key("plan", (macs, parameters)), Plan, chosen)
        applied = apply(network, inputs, plan, progress, run=run)
        return _result(network, inputs, applied, None, settings, curve)


def sweep(
    module: nn.Module,
    calib: Iterable[Any],
    macs: str | float | Iterable[str | float] = (),
    *,
    output: str | os.PathLike[str] | None = None,
    show: Show = unseen,
    **options: Any,
) -> Sweep:
    """Decouple a module to several budgets at little more than the price of one.

    The module is analysed once. What a budget gives is what `decouple` gives for it alone. The module and
    ``calib`` are as there.

    Args:
        macs: the budgets: "80%,60%,2x" or (0.8, 0.6, 0.5).
        output: a folder that gets a folder for `load` per budget; else only figures are kept.
        show: called with every point of the curve as soon as it is known.
        options: device, filter, arguments, settings, samples, resources, progress; as in `decouple`.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    name = type(module).__name__
    files = None if output is None else Files(Path(output), name, "")

    def point(budget: Budget, faster: nn.Module) -> SweepPoint:
        file = None if files is None else files.save(budget, partial(save, faster))
        made: Any = faster.decoupling
        return SweepPoint.of(made.report, made.plan, file)

    return Sweep.of(name, *each(module, calib, budgets_in(macs), point, show, **options))


def each(
    module: nn.Module,
    calib: Iterable[Any],
    budgets: Sequence[Budget],
    point: Callable[[Budget, nn.Module], SweepPoint],
    show: Show,
    *,
    device: str = "cpu",
    filter: Callable[[str, nn.Module], bool] | None = None,
    arguments: Callable[[Any], Any] | None = None,
    settings: Settings = Settings(),
    samples: int | None = 1000,
    resources: Resources = Resources(),
    progress: Progress = quiet,
) -> tuple[str, list[SweepPoint]]:
    """Decouple a module to several budgets and make a ``point`` of each; tell the kind of loss as well.

    Raises:
        NetDecoupleError: as in `decouple`.
    """
    check_rule(settings)
    if not budgets:
        raise BudgetError("give budgets to sweep over, like macs=(0.8, 0.6, 0.5)")
    points = []
    with _opened(module, calib, device, filter, arguments, samples, settings, resources) as opened:
        network, inputs, run = opened
        analysis = analyze(network, inputs, settings, progress, run)
        plans = [plan_within(analysis, [budget]) for budget in budgets]
        targets = targets_for(network, inputs, plans, progress, run)
        original = network.run(inputs.held_back)
        for budget, plan in zip(budgets, plans, strict=True):
            applied = apply(network, inputs, plan, named_after(budget, progress), targets, run)
            points.append(point(budget, _result(network, inputs, applied, original, settings)))
            show(points[-1])
    return analysis.loss, points


def apply_plan(
    module: nn.Module,
    plan: Plan,
    calib: Iterable[Any],
    *,
    device: str = "cpu",
    arguments: Callable[[Any], Any] | None = None,
    resources: Resources = Resources(),
    progress: Progress = quiet,
) -> nn.Module:
    """Carry out a saved plan on the module and the samples it was made for, by either front door.

    Raises:
        PlanError: the plan is of another network or of other samples.
        NetDecoupleError: as in `decouple`.
    """
    settings = Settings(data_free=plan.data_free, uniform_rank=plan.uniform_rank, seed=plan.seed)
    with _opened(module, calib, device, None, arguments, plan.samples, settings, resources) as opened:
        network, inputs, run = opened
        if inputs.fingerprint != plan.images:
            raise PlanError("the plan was made with other calibration samples; give the same calib")
        adopted = plan.adopted(network.fingerprint, network.layers)
        return _result(network, inputs, apply(network, inputs, adopted, progress, run=run))


def save(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a decoupled module into a folder of its own: ``model.safetensors`` and ``netdecouple.json``.

    What an earlier call wrote there is replaced, at once; a folder with anything else in it is refused.

    Raises:
        ModelError: the module was not decoupled, or its state is more than tensors.
        OutputError: the folder cannot be written.
    """
    decoupling = vars(module).get("decoupling")
    if not isinstance(decoupling, Decoupling):
        raise ModelError(
            f"this {type(module).__name__} was not made by netdecouple.decouple; "
            "of a compiled or distributed module, give the one inside"
        )
    files.write(module, decoupling, folder)


def load(module: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Return a copy of the original module, decoupled as the one in a folder was, with that one's weights.

    Args:
        module: built as the original was; its weights do not matter. Modes, types, devices and whether
            gradients are wanted are taken from it. It is not changed.
        folder: that `save` wrote; weights may be in shards, as on the Hugging Face Hub.

    Raises:
        PlanError: the folder's description is missing, damaged or of another version.
        ModelError: the weights are missing or damaged, or of another module than this.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"a {type(module).__name__} is no PyTorch module")
    check(module)
    with torch.inference_mode(False):  # what is made then can be trained
        new, decoupling = files.read(module, folder)
    new.decoupling = decoupling
    return new


@contextmanager
def _opened(
    module: nn.Module,
    calib: Iterable[Any],
    device: str,
    chosen: Callable[[str, nn.Module], bool] | None,
    arguments: Callable[[Any], Any] | None,
    samples: int | None,
    settings: Settings,
    resources: Resources,
) -> Iterator[tuple[TorchNetwork, Inputs, Run]]:
    """Open a module, and the work folder; whatever happens, nothing is left running."""
    if not isinstance(module, nn.Module):
        raise ModelError(f"a {type(module).__name__} is no PyTorch module")
    check(module)
    if not isinstance(getattr(module, "decoupling", None), Decoupling | None):
        raise ModelError("the module has something of its own called 'decoupling'; give it another name")
    with torch.inference_mode(False):  # what is made then can be trained
        collected = collect(calib, module, samples, arguments)
        inputs = Inputs.split(collected, settings.seed, collected.fingerprint)
        with (
            resources.opened(state_bytes(module), collected.nbytes) as run,
            closing(TorchNetwork(module, collected, device, chosen, run.memory)) as network,
        ):
            run.claim(identity(network, inputs, settings, "torch") | {"device": str(network.device)})
            yield network, inputs, run


def _result(
    network: TorchNetwork,
    inputs: Inputs,
    applied: Applied,
    original: list[Array] | None = None,
    settings: Settings | None = None,
    curve: Sequence[BudgetRow] = (),
) -> nn.Module:
    """Build the new module, hold it against the plan's own arithmetic and the original."""
    module = network.decoupled(applied.factorizations)
    shown = inputs.held_back
    evaluated = network.evaluated(module)
    original, new = original or network.run(shown), network.run_module(evaluated, shown)
    few = shown[:32]
    tolerance = TOLERANCE if network.exact <= TOLERANCE else 0.1  # half precision, somewhere
    worst = difference(network, applied, few, network.run_module(evaluated, few), tolerance)
    plan = applied.plan
    quality = quality_of(plan, len(shown), original, new)
    layers = {layer.name: layer for layer in network.layers}
    written = [_written(layer, applied) for layer in network.layers]
    rows = layer_reports(layers, applied, written, energies(network.layers))
    places = shuffled(len(inputs.images), plan.seed)[inputs.fitted :]
    found = disagreements_of(plan, places.tolist(), original, new)
    report = Report(
        type(network.original).__name__,
        __version__,
        plan.budget,
        rows,
        quality,
        worst,
        bytes_before=state_bytes(network.original),
        bytes=state_bytes(module),
        curve=tuple(curve),
        disagreements=found,
        provenance=provenance(plan, inputs, "batches", settings),
        pictures=drawn(inputs.held_back, places.tolist(), found, Preprocessing()),
    )
    norms = {name: network.found[name].norm for name in applied.factorizations if network.found[name].norm}
    module.decoupling = Decoupling(plan, report, norms)
    return module


def state_bytes(module: nn.Module) -> int:
    """What a module's parameters and buffers take; what several names mean counts once."""
    state = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def drawn(
    held_back: Samples, places: Sequence[int], found: Iterable[Disagreement], preprocessing: Preprocessing
) -> tuple[bytes, ...]:
    """Pictures of the samples that networks disagree on, where a sample is one picture and nothing else."""
    arguments = [held_back.units[places.index(d.sample)] for d in found]
    tensors = [args[0] if len(args) == 1 and not kwargs else None for args, kwargs in arguments]
    if any(not isinstance(t, torch.Tensor) or t.ndim != 4 or len(t) != 1 for t in tensors):
        return ()
    return pictures([np.asarray(to_numpy(t)[0], np.float32) for t in tensors], preprocessing)


def _written(layer: Layer, applied: Applied) -> Layer:
    """What a layer costs now."""
    made = applied.factorizations.get(layer.name)
    if made is None:
        return layer
    return replace(layer, macs=round(made.macs(*layer.size) * layer.maps), parameters=made.parameters)
