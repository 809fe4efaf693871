"""The front door for PyTorch modules: plan, apply, check, report, save and load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from netdecouple.api import TOLERANCE
from netdecouple.application import Applied, apply
from netdecouple.errors import BudgetError, ModelError, PlanError
from netdecouple.frontends import Layer
from netdecouple.frontends.torch import files
from netdecouple.frontends.torch.files import Decoupling
from netdecouple.frontends.torch.network import TorchNetwork
from netdecouple.frontends.torch.samples import collect
from netdecouple.planning.analysis import Progress, Settings, analyze, quiet
from netdecouple.planning.cost import budgets_of
from netdecouple.planning.plan import Plan
from netdecouple.planning.sensitivity import relative_error
from netdecouple.planning.solve import BudgetRow, budget_rows, make_plan, published_plan, ruled_plan
from netdecouple.report.report import Report, layer_reports, quality_of
from netdecouple.sampling import Inputs
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
        progress: called with a step's name, what is done and what there is to do.
        show_budgets: called once with the table of budgets that can be met, before solving.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    budgets = budgets_of(macs, parameters)
    if bool(budgets) == (settings.rule is not None):
        raise BudgetError("give a budget (macs=0.5, parameters=0.5) or a rule in the settings, and not both")
    with _opened(module, calib, device, filter, arguments, samples, settings.seed) as (network, inputs):
        analysis = analyze(network, inputs, settings, progress)
        if show_budgets is not None and settings.rule is None:
            show_budgets(budget_rows(analysis), analysis.loss)
        if settings.rule is not None:
            plan = ruled_plan(analysis)
        elif settings.data_free and settings.uniform_rank:
            plan = published_plan(analysis, budgets)
        else:
            plan = make_plan(analysis, budgets)
        return _result(network, inputs, apply(network, inputs, plan, progress))


def apply_plan(
    module: nn.Module,
    plan: Plan,
    calib: Iterable[Any],
    *,
    device: str = "cpu",
    arguments: Callable[[Any], Any] | None = None,
    progress: Progress = quiet,
) -> nn.Module:
    """Carry out a saved plan on the module and the samples it was made for, by either front door.

    Raises:
        PlanError: the plan is of another network or of other samples.
        NetDecoupleError: as in `decouple`.
    """
    with _opened(module, calib, device, None, arguments, plan.samples, plan.seed) as (network, inputs):
        if inputs.fingerprint != plan.images:
            raise PlanError("the plan was made with other calibration samples; give the same calib")
        adopted = plan.adopted(network.fingerprint, network.layers)
        return _result(network, inputs, apply(network, inputs, adopted, progress))


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
    seed: int,
) -> Iterator[tuple[TorchNetwork, Inputs]]:
    """Open a module; whatever happens, nothing is left running."""
    if not isinstance(module, nn.Module):
        raise ModelError(f"a {type(module).__name__} is no PyTorch module")
    with torch.inference_mode(False):  # what is made then can be trained
        collected = collect(calib, module, samples, arguments)
        inputs = Inputs.split(collected, seed, collected.fingerprint)
        with closing(TorchNetwork(module, collected, device, chosen)) as network:
            yield network, inputs


def _result(network: TorchNetwork, inputs: Inputs, applied: Applied) -> nn.Module:
    """Build the new module, hold it against the plan's own arithmetic and the original."""
    module = network.decoupled(applied.factorizations)
    shown = inputs.held_back
    evaluated = network.evaluated(module)
    original, new = network.run(shown), network.run_module(evaluated, shown)
    few = shown[:32]
    pairs = zip(network.run(few, applied.kernels), network.run_module(evaluated, few), strict=True)
    worst = max(float(np.sqrt(relative_error(a, b))) for a, b in pairs)
    tolerance = TOLERANCE if network.exact <= TOLERANCE else 0.1  # half precision, somewhere
    if not worst <= tolerance:
        raise ModelError(
            f"the decoupled module differs from its own plan by {worst:.1e}; please report this model"
        )
    plan = applied.plan
    quality = quality_of(plan, len(shown), original, new)
    layers = {layer.name: layer for layer in network.layers}
    rows = layer_reports(layers, applied, [_written(layer, applied) for layer in network.layers])
    report = Report(type(network.original).__name__, __version__, plan.budget, rows, quality, worst)
    norms = {name: network.found[name].norm for name in applied.factorizations if network.found[name].norm}
    module.decoupling = Decoupling(plan, report, norms)
    return module


def _written(layer: Layer, applied: Applied) -> Layer:
    """What a layer costs now."""
    made = applied.factorizations.get(layer.name)
    if made is None:
        return layer
    return replace(layer, macs=round(made.macs(*layer.size) * layer.maps), parameters=made.parameters)
