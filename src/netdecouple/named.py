"""The front door for PyTorch models that are named, as on the command line, and written to files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from netdecouple import api, modules
from netdecouple.curve import Files, Show, budgets_in, unseen
from netdecouple.data import calibration
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import BudgetError, CalibrationError, ModelError
from netdecouple.execution.run import Resources
from netdecouple.fitting.sampling import shuffled
from netdecouple.frontends.onnx.model import write_model
from netdecouple.frontends.torch.export import export
from netdecouple.frontends.torch.folder import check_replaceable
from netdecouple.frontends.torch.network import TorchNetwork
from netdecouple.frontends.torch.samples import Samples, collect, to_numpy
from netdecouple.frontends.torch.sources import Model, build
from netdecouple.planning.analysis import Progress, Settings, quiet
from netdecouple.planning.cost import Budget
from netdecouple.planning.plan import Plan
from netdecouple.planning.solve import BudgetRow
from netdecouple.report.files import save_report
from netdecouple.report.inspection import Inspection, inspection
from netdecouple.report.model import Report
from netdecouple.report.sweep import Sweep, SweepPoint
from netdecouple.runtimes import benchmark
from netdecouple.version import __version__

__all__ = [
    "Calibrated",
    "Result",
    "apply_plan",
    "build",
    "calibrate",
    "check_replaceable",
    "decouple",
    "inspect",
    "sweep",
]

BATCH = 32  # labelled images that are run at once
TRIED = 3  # samples that an exported model is tried with


@dataclass(frozen=True)
class Calibrated:
    """Samples for a model: arrays or batches, and the names of unreadable files."""

    batches: Any
    skipped: tuple[str, ...] = ()
    noise: bool = False  # there were none to be had


@dataclass(frozen=True)
class Result:
    """A decoupled module, and samples to try it with once it is written."""

    module: nn.Module
    plan: Plan
    report: Report
    samples: Samples
    original: nn.Module

    def timed(
        self, runtimes: Sequence[str] = (), threads: Sequence[int] = (1,), seconds: float | None = None
    ) -> Result:
        """The same with times in its report: of the original and of this network.

        Whatever cannot be timed does not fail, and the report says why.

        Args:
            runtimes: "torch", "torch.compile", and for models that can be exported "onnxruntime" and
                "openvino"; those two that everybody has unless they are named.
            threads: the numbers of threads to time with.
            seconds: how long to measure, for each runtime and number of threads; two unless told.
        """
        report = self.report
        for name in runtimes or ("torch", "onnxruntime"):
            networks: list[Any] = [self.original, self.module]
            shape, feeds = None, None
            try:
                if name.startswith("torch"):
                    feeds = _feeds(self.samples)
                else:
                    few = _picture_tensor(self.samples)
                    networks, shape = [export(n, few, {}) for n in networks], (1, *few.shape[1:])
            except ModelError as error:
                report = replace(report, not_timed=(*report.not_timed, f"{name}: {error}"))
                continue
            report = benchmark.timed(report, networks, [name], threads, seconds, shape=shape, feeds=feeds)
        return replace(self, report=report)

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write the report as .html or .json, as the path ends; for .html it is timed first, if it was not.

        Raises:
            OutputError: the ending is another one, or the place is not writable.
        """
        save_report(self.report, path, lambda: self.timed().report)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .onnx file, or else a folder for `netdecouple.load`; never half of either.

        Raises:
            OutputError: the place is not writable.
            ModelError: the module cannot be exported.
        """
        if Path(path).suffix == ".onnx":
            metadata = {
                "netdecouple.version": __version__,
                "netdecouple.plan": self.plan.to_json(indent=None),
            }
            write_model(export(self.module, _picture_tensor(self.samples), metadata), path)
        else:
            modules.save(self.module, path)


def decouple(
    model: Model,
    calib: str | None,
    *,
    macs: str | float | None = None,
    parameters: str | float | None = None,
    settings: Settings = Settings(),
    labels: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    samples: int | None = api.SAMPLES,
    to_onnx: bool = False,
    resources: Resources = Resources(),
    progress: Progress = quiet,
    show_budgets: Callable[[list[BudgetRow], str], None] | None = None,
) -> Result:
    """Decouple a model that `build` made to a budget, from what ``calib`` names; see `modules.decouple`.

    Args:
        to_onnx: find out before the work that the model cannot be exported.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    if (macs is not None or parameters is not None) == (settings.rule is not None):
        raise BudgetError("give one of: a budget (--macs 50%, --params 2x), or --method")
    preprocessing = preprocessing or model.preprocessing
    calibrated = calibrate(model, calib, preprocessing, samples, settings)
    labelled = None if labels is None else _labelled(model, labels, preprocessing)
    collected = collect(calibrated.batches, model.module, samples, None)
    if to_onnx:
        export(model.module, _picture_tensor(collected), {})
    before = None if labelled is None else _accuracy(model.module, *labelled)
    module = modules.decouple(
        model.module,
        _batches(collected),
        macs=macs,
        parameters=parameters,
        settings=settings,
        samples=samples,
        resources=resources,
        progress=progress,
        show_budgets=show_budgets,
    )
    both = None if before is None or labelled is None else (before, _accuracy(module, *labelled))
    return _result(model, module, calibrated, collected, calib, preprocessing, both)


def sweep(
    model: Model,
    calib: str | None,
    macs: str | Iterable[str | float],
    *,
    settings: Settings = Settings(),
    labels: str | os.PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    samples: int | None = api.SAMPLES,
    output: str | os.PathLike[str] | None = None,
    resources: Resources = Resources(),
    progress: Progress = quiet,
    show: Show = unseen,
) -> Sweep:
    """Decouple a model that `build` made to several budgets; see `modules.sweep`.

    Args:
        output: a folder to write an .onnx file per budget into.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    budgets = budgets_in(macs)
    files = None if output is None else Files(Path(output), model.name.rpartition(":")[2], ".onnx")
    preprocessing = preprocessing or model.preprocessing
    calibrated = calibrate(model, calib, preprocessing, samples, settings)
    labelled = None if labels is None else _labelled(model, labels, preprocessing)
    collected = collect(calibrated.batches, model.module, samples, None)
    if files is not None:
        export(model.module, _picture_tensor(collected), {})
    before = None if labelled is None else _accuracy(model.module, *labelled)

    def point(budget: Budget, module: nn.Module) -> SweepPoint:
        both = None
        if before is not None and labelled is not None:
            both = before, _accuracy(module, *labelled)
        result = _result(model, module, calibrated, collected, calib, preprocessing, both)
        file = None if files is None else files.save(budget, result.save)
        return SweepPoint.of(result.report, result.plan, file)

    made = modules.each(
        model.module,
        _batches(collected),
        budgets,
        point,
        show,
        settings=settings,
        samples=samples,
        resources=resources,
        progress=progress,
    )
    return Sweep.of(model.name, *made)


def _labelled(model: Model, labels: str | os.PathLike[str], preprocessing: Preprocessing) -> tuple[Any, Any]:
    return calibration.load_labelled(
        labels, channels=_channels(model), size=None, preprocessing=preprocessing
    )


def apply_plan(
    model: Model,
    plan: Plan,
    calib: str | None,
    *,
    preprocessing: Preprocessing | None = None,
    to_onnx: bool = False,
    resources: Resources = Resources(),
    progress: Progress = quiet,
) -> Result:
    """Carry out a saved plan on a model that `build` made; see `modules.apply_plan`, and `decouple`.

    Raises:
        PlanError: the plan is of another network or of other samples.
        NetDecoupleError: as in `decouple`.
    """
    settings = Settings(data_free=plan.data_free, uniform_rank=plan.uniform_rank, seed=plan.seed)
    preprocessing = preprocessing or model.preprocessing
    calibrated = calibrate(model, calib, preprocessing, plan.samples, settings)
    collected = collect(calibrated.batches, model.module, plan.samples, None)
    if to_onnx:
        export(model.module, _picture_tensor(collected), {})
    module = modules.apply_plan(
        model.module, plan, _batches(collected), resources=resources, progress=progress
    )
    return _result(model, module, calibrated, collected, calib, preprocessing)


def inspect(model: Model, preprocessing: Preprocessing | None = None) -> Inspection:
    """Look at a model that `build` made, without calibration samples."""
    settings = Settings(data_free=True)
    noise = calibrate(model, None, preprocessing or model.preprocessing, None, settings)
    network = TorchNetwork(model.module, collect(noise.batches, model.module, None, None))
    return inspection(model.name, network.layers)


def calibrate(
    model: Model, calib: str | None, preprocessing: Preprocessing, samples: int | None, settings: Settings
) -> Calibrated:
    """Load samples: what ONNX models take, or MODULE:FUNCTION that makes whatever the module takes.

    Raises:
        CalibrationError: they cannot be read, or do not fit.
    """
    if calib is None:
        if not settings.data_free:
            raise CalibrationError(
                "give --calib (a folder of images, FILE.npz:KEY, …), or --data-free to do without"
            )
        height, width = _sized(model, preprocessing)
        # without inputs, noise tells the shapes of things
        noise = np.random.default_rng(settings.seed).standard_normal((10, _channels(model), height, width))
        return Calibrated(noise.astype(np.float32), noise=True)
    if calibration.names_function(calib):
        try:
            made, plain = _peeked(calibration.call(calib))
        except CalibrationError as error:
            raise CalibrationError(f"{calib}: {error}") from error
        if not plain:
            return Calibrated(made)
    else:
        made = calib
        if os.path.isdir(calib):
            _sized(model, preprocessing)
    loaded = calibration.load(
        made,
        channels=_channels(model),
        size=None,
        preprocessing=preprocessing,
        samples=samples,
        seed=settings.seed,
    )
    return Calibrated(loaded.images, loaded.skipped)


def _sized(model: Model, preprocessing: Preprocessing) -> tuple[int, int]:
    if preprocessing.size is None:
        raise CalibrationError(
            f"{model.name}: its weights do not say how large its images are; give --input-size"
        )
    return preprocessing.size


def _channels(model: Model) -> int:
    if model.channels is None:
        raise CalibrationError(
            f"{model.name} takes no images; give --calib MODULE:FUNCTION that makes what its forward takes"
        )
    return model.channels


def _peeked(made: Any) -> tuple[Any, bool]:
    """Tell whether these are NumPy arrays, which are pictures or plain inputs; nothing is lost by looking."""
    if isinstance(made, np.ndarray):
        return made, True
    if isinstance(made, torch.Tensor) or not isinstance(made, Iterable):
        return made, False
    try:
        if isinstance(made, Iterator):
            first = next(made)
            made = chain([first], made)
        else:
            first = next(iter(made))
    except StopIteration:
        raise CalibrationError("made nothing; it should make a few hundred samples") from None
    except Exception as error:
        raise CalibrationError(f"failed while it made samples ({type(error).__name__}: {error})") from error
    return made, isinstance(first, np.ndarray)


def _batches(samples: Samples) -> Iterable[Any]:
    """The same samples again, one by one, as a calibration set."""
    for args, kwargs in samples:
        yield kwargs or args


def _feeds(samples: Samples) -> dict[str, Any]:
    """The first sample, as what a module is timed with."""
    args, kwargs = samples.units[0]
    if kwargs or not all(isinstance(a, torch.Tensor) for a in args):
        raise ModelError("only models that take tensors by position are timed")
    return {str(index): to_numpy(a) for index, a in enumerate(args)}


def _picture_tensor(samples: Samples) -> torch.Tensor:
    """A few samples as the one tensor that an exported model is to take."""
    few: Sequence[Any] = samples[:TRIED].units
    shapes = {tuple(a.shape) if isinstance(a, torch.Tensor) else None for args, _ in few for a in args}
    if any(kwargs or len(args) != 1 for args, kwargs in few) or len(shapes) != 1 or None in shapes:
        raise ModelError("only models that take one tensor are written as ONNX; write a folder: -o FOLDER")
    return torch.cat([args[0] for args, _ in few])


def _accuracy(module: nn.Module, images: Any, labels: Any) -> float:
    with torch.inference_mode():
        outputs = [module(torch.from_numpy(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    if not all(isinstance(output, torch.Tensor) for output in outputs):
        raise ModelError("accuracy needs a classifier, with one output (N, classes); leave out --labels")
    return api.accuracy(torch.cat(outputs).numpy(), labels)


def _result(
    model: Model,
    module: nn.Module,
    calibrated: Calibrated,
    samples: Samples,
    calib: str | None,
    preprocessing: Preprocessing,
    accuracy: tuple[float, float] | None = None,
) -> Result:
    made: Any = module.decoupling
    report = replace(
        made.report,
        model=model.name,
        accuracy=accuracy,
        skipped=calibrated.skipped,
        provenance=replace(made.report.provenance, calibration=calib or calibration.NOISE),
    )
    if calibrated.noise:
        report = replace(report, agreement=None, disagreements=(), pictures=())
    else:
        places = shuffled(len(samples), made.plan.seed).tolist()
        order = samples[np.array(places)]
        report = replace(report, pictures=modules.drawn(order, places, report.disagreements, preprocessing))
    module.decoupling = replace(made, report=report)
    return Result(module, made.plan, report, samples, model.module)
