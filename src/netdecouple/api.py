"""The public functions. They read what they are given, call `pipeline`, and return what the user keeps."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import onnx
from numpy.typing import NDArray

from netdecouple import pipeline
from netdecouple.convolution import ConvGeometry, Structure
from netdecouple.data import calibration
from netdecouple.data.calibration import names_function, pictures
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import BudgetError, ModelError, OutputError, PlanError, UnavailableError
from netdecouple.execution.memory import Memory
from netdecouple.execution.progress import Progress, quiet, with_suffix
from netdecouple.execution.run import Resources
from netdecouple.execution.scratch import StrPath, check_apart, check_writable
from netdecouple.families.chain import method
from netdecouple.frontends.onnx import fused
from netdecouple.frontends.onnx.model import ModelSource, noted_shape, write_model
from netdecouple.frontends.onnx.model import load as read_proto
from netdecouple.frontends.onnx.proto import nodes_of
from netdecouple.frontends.onnx.source import OnnxSource, open_for_shapes
from netdecouple.goal import Budgets, Emission, Fastest, Share, parse_goal, parse_sweep
from netdecouple.network import Array, Source
from netdecouple.pipeline import Outcome, Request, accuracy, majority
from netdecouple.planning.divergence import agreement, best_steps, divergence, same_texts
from netdecouple.planning.plan import Plan
from netdecouple.planning.planner import BudgetRow
from netdecouple.planning.settings import Settings
from netdecouple.planning.tolerance import Tolerance, mean_psnr
from netdecouple.report.files import save_report
from netdecouple.report.inspection import Inspection, inspection
from netdecouple.report.model import Report, Score
from netdecouple.report.sweep import Sweep, SweepPoint
from netdecouple.runtimes import onnxfile, runtime
from netdecouple.runtimes.benchmark import DECOUPLED, SECONDS, SHORT, Benchmark, benchmark, layer_times
from netdecouple.version import __version__

if TYPE_CHECKING:
    from torch.nn import Module

SAMPLES = 1000  # calibration inputs taken unless more or fewer are asked for
DESCRIPTION = "netdecouple.json"  # in a folder that `save` wrote
LIBRARIES = ("torchvision", "timm")  # of PyTorch models

Calibration = str | os.PathLike[str] | Array | Iterable[Any]
Libraries = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Labels = str | os.PathLike[str] | tuple[Any, NDArray[np.integer]]
ShowBudgets = Callable[[list[BudgetRow], str], None]


@dataclass(frozen=True)
class Result:
    """A decoupled model, the plan that made it, and what it gained and lost.

    Attributes:
        model: an `onnx.ModelProto`, or a PyTorch module.
        plan: what was done to every layer.
        report: what that gained and lost.
    """

    model: Any
    plan: Plan
    report: Report
    source: Source = field(repr=False, compare=False)  # the original
    example: Any = field(repr=False, compare=False)  # a few inputs, to time or to export the model with
    inputs: tuple[Path, ...] = field(default=(), repr=False, compare=False)  # the files it was made from

    @classmethod
    def of(cls, module: Module) -> Result:
        """Return the result behind a PyTorch module that `decouple` or `apply_plan` returned.

        Raises:
            ModelError: it was not made in this process; load and decouple the original again.
        """
        result: Result | None = getattr(vars(module).get("decoupling"), "result", None)
        if result is None:
            raise ModelError(
                f"this {type(module).__name__} was not made by netdecouple.decouple in this process"
            )
        return replace(result, model=module)

    def timed(
        self,
        runtimes: Sequence[str] = (),
        threads: Sequence[int] = (1,),
        seconds: float | None = None,
        layers: bool = True,
    ) -> Result:
        """Return the same with times in its report, of the original and of this network.

        What cannot be timed is left out, and the report says why. Times of single layers are measured for
        ONNX models in ONNX Runtime.

        Args:
            runtimes: "onnxruntime", "openvino"; of PyTorch modules also "torch" and "torch.compile". Those
                that need no extra package unless they are named.
            threads: the numbers of threads to time with.
            seconds: how long to measure per runtime and number of threads; None: two.
            layers: whether single layers are timed as well.
        """
        names, seconds = (self.report.model, DECOUPLED), SHORT if seconds is None else seconds
        known = self.report.benchmark or Benchmark(netdecouple=__version__, models=())
        rows, profiles, reasons = list(known.models), list(known.layers), list(self.report.not_timed)
        for name in runtimes or self.source.runtimes:
            try:
                pair = [self.source.executable(model, self.example, name) for model in (None, self.model)]
                models, shape, feeds = [e.model for e in pair], pair[0].shape, pair[0].feeds
                options: dict[str, Any] = {"names": names, "shape": shape, "feeds": feeds, "seconds": seconds}
                libraries = pair[0].custom_ops
                opened = partial(open_for_shapes, feeds=feeds, custom_ops=libraries)
                timed_in = [runtime(name, custom_ops=libraries)]
                rows += benchmark(models, timed_in, opened, threads=threads, **options).models
                if layers and self.source.framework == name == "onnxruntime":
                    options["custom_ops"] = libraries
                    profiles.append(layer_times(models, opened, threads[0], **options))
            except Exception as error:  # the network was made, which is what was asked for
                reasons.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
        times = Benchmark(netdecouple=__version__, models=tuple(rows), layers=tuple(profiles))
        report = replace(self.report, benchmark=times if rows else None, not_timed=tuple(reasons))
        return replace(self, report=report)

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write the report as .html or .json, by the ending; networks are timed for a page, if they were not.

        Raises:
            OutputError: the ending is another one, the place is not writable, or an input is there.
        """
        check_outputs([path], self.inputs)
        save_report(self.report, path, lambda: self.timed().report)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, all of it or nothing: an .onnx file; a PyTorch module also as a folder for `load`.

        Raises:
            OutputError: the place is not writable, or an input is there.
            ModelError: the model cannot be written so, or was not written correctly.
        """
        check_outputs([path], self.inputs)
        self.source.save(self, path)


@dataclass(frozen=True)
class Decoupling:
    """What was done to a PyTorch module, and what it gained and lost: its attribute ``decoupling``."""

    plan: Plan
    report: Report | None  # None: it was saved by another version of netdecouple
    norms: dict[str, str]  # by changed layer, the BatchNorm folded into it
    result: Result | None = field(default=None, repr=False, compare=False)  # `Result.of` adds the module

    def __deepcopy__(self, memo: object) -> Decoupling:
        return self  # nothing in it changes; copies of the module need no copies of the original

    def __reduce__(self) -> tuple[Any, ...]:
        # a pickled module does not take the original with it
        return Decoupling, (self.plan, self.report, self.norms)


def open_model(
    model: Any,
    weights: str | None = None,
    seed: int = 0,
    *,
    device: str = "cpu",
    filter: Callable[[str, Module], bool] | None = None,
    arguments: Callable[[Any], Any] | None = None,
    constants: Mapping[str, Any] | None = None,
    custom_ops: Libraries = (),
    is_exported: bool = False,
) -> Source:
    """Read a network, without running it; every function here takes the result as its ``model``.

    Args:
        model: an .onnx file, an `onnx.ModelProto`, a PyTorch module, or the name of a PyTorch model:
            torchvision:NAME, timm:NAME, or MODULE:FUNCTION that returns one.
        weights: of a named model: "default" (downloaded by its library), "random", or a file.
        seed: of random weights.
        device: as in `decouple`.
        filter: as in `decouple`.
        arguments: as in `decouple`.
        constants: values of an ONNX model's inputs besides the images, by name, the same for all images;
            others are looked for in the .npz file with the images.
        custom_ops: libraries (.so, .dll, .dylib) of the operators that an ONNX model uses.
        is_exported: whether a PyTorch module's result is to be written as ONNX; if that is impossible, the
            error comes before the work.

    Raises:
        ModelError: it cannot be read, or cannot be changed.
        UnavailableError: a package that it needs is not installed.
    """
    is_text = isinstance(model, str | os.PathLike)
    if not is_text and hasattr(model, "check_form"):
        return model  # type: ignore[no-any-return]
    options = {"device": device, "filter": filter, "arguments": arguments, "is_exported": is_exported}
    read: Callable[..., Any] | None = None
    if is_text and is_named(model):
        with _needing_torch():
            from netdecouple.frontends.torch.sources import build
        read = partial(build, os.fspath(model), weights, seed)
    elif _is_module(model):
        read = partial(_torch_source(), model)
    if read is not None:
        if constants:
            raise ModelError("constants= is for ONNX models; of a PyTorch module give arguments=")
        if custom_ops:
            raise ModelError("custom_ops= is for ONNX models; a PyTorch module imports its operators")
        source: Source = read(**options)
        return source
    given = {"device=": device != "cpu", "filter=": filter, "arguments=": arguments, "weights=": weights}
    for name, value in given.items():
        if value:
            kind = model if isinstance(model, str) else "this"
            raise ModelError(f"{name} is for PyTorch models; {kind} is ONNX")
    return OnnxSource(model, constants or {}, _paths(custom_ops))


@overload
def decouple(
    model: ModelSource | Source,
    calib: Calibration | None = None,
    *,
    macs: Share | None = None,
    parameters: Share | None = None,
    latency: Share | None = None,
    max_drop: float | None = None,
    within: str | None = None,
    force: bool = False,
    refine: float | None = None,
    labels: Labels | None = None,
    settings: Settings = ...,
    emit: str | None = None,
    runtime: str | None = None,
    threads: int = 1,
    preprocessing: Preprocessing | None = None,
    samples: int | None = SAMPLES,
    resources: Resources = ...,
    progress: Progress = quiet,
    show_budgets: ShowBudgets | None = None,
) -> Result: ...
@overload
def decouple(
    model: Module,
    calib: Calibration | None = None,
    *,
    macs: Share | None = None,
    parameters: Share | None = None,
    latency: Share | None = None,
    max_drop: float | None = None,
    within: str | None = None,
    force: bool = False,
    refine: float | None = None,
    labels: Labels | None = None,
    settings: Settings = ...,
    emit: str | None = None,
    runtime: str | None = None,
    threads: int = 1,
    preprocessing: Preprocessing | None = None,
    samples: int | None = SAMPLES,
    resources: Resources = ...,
    device: str = "cpu",
    filter: Callable[[str, Module], bool] | None = None,
    arguments: Callable[[Any], Any] | None = None,
    progress: Progress = quiet,
    show_budgets: ShowBudgets | None = None,
) -> Module: ...
def decouple(
    model: Any,
    calib: Calibration | None = None,
    *,
    macs: Share | None = None,
    parameters: Share | None = None,
    latency: Share | None = None,
    max_drop: float | None = None,
    within: str | None = None,
    force: bool = False,
    refine: float | None = None,
    labels: Labels | None = None,
    settings: Settings = Settings(),
    emit: str | None = None,
    runtime: str | None = None,
    threads: int = 1,
    preprocessing: Preprocessing | None = None,
    samples: int | None = SAMPLES,
    resources: Resources = Resources(),
    device: str = "cpu",
    filter: Callable[[str, Module], bool] | None = None,
    arguments: Callable[[Any], Any] | None = None,
    progress: Progress = quiet,
    show_budgets: ShowBudgets | None = None,
) -> Any:
    """Make a network faster, or decouple it to another goal. The network given is not changed.

    Without a goal it becomes as fast as it can in its runtime, on this machine, ``within`` what its outputs
    may change. Other goals are budgets (one or several of ``macs``, ``parameters`` and ``latency``),
    ``max_drop``, and ``settings.rule``. Shares are 0.5, "50%" or "2x" (two times fewer).

    Args:
        model: an .onnx file or `onnx.ModelProto` with one image input, (N, C, H, W) or (N, H, W, C), of
            float32 or float16; a PyTorch module, whatever Python its forward runs; a name like
            "torchvision:resnet18"; or what `open_model` returned.
        calib: unlabelled inputs, a few hundred: a folder of images, FILE.npy, FILE.npz:KEY, MODULE:FUNCTION,
            or arrays: uint8 (N, H, W, C), or floats that are ready for the network. FILE.npz, or a mapping,
            may also have one array per input. For PyTorch modules also batches: tensors, tuples of
            arguments, mappings, a DataLoader. None only if ``settings.data_free``.
        macs: the share of the multiply-adds that may stay; "least": as few as possible ``within`` a limit.
        parameters: the share of the parameters that may stay.
        latency: the share of its time that the network may still take, for one input, in ``runtime``.
        max_drop: points of top-1 accuracy that may be lost on ``labels``; the smallest network is searched
            for.
        within: how much the outputs may change, for new inputs of the same kind: "99%" (the same class),
            "42dB" (PSNR to the original's outputs, for a peak that is their range; "42dB@255" for one of
            255), "kl=0.01" (nats) or "error=0.01" (squared error over variance). It is measured on held-out
            inputs, with a margin for chance. None without a goal: "99%" for classifiers, "42dB" for others,
            "error=0.01" (of boxes and scores) for detectors.
        force: return a network that is not ``within`` the limit, too.
        refine: minutes in which the decoupled layers are trained together until the outputs are the
            original's again, on ``calib``; no labels are needed. ONNX models need PyTorch for it. The time
            decides how far the training gets, so that two results are not the same.
        labels: labelled inputs to measure accuracy on: FILE.npz:IMAGES,LABELS, or a pair (inputs, integers
            (N,)).
        settings: layers to leave alone, families to choose from, how to fit, seed.
        emit: "standard" operators, or "fused": netdecouple's own, which is faster, in the ONNX
            files that are written. ONNX Runtime needs `netdecouple.kernels.register` for it. None: standard,
            but without a goal fused where it can be had.
        runtime: the runtime in which the forms of layers are chosen by measuring: "onnxruntime", "openvino";
            of PyTorch modules also "torch" and "torch.compile". With ``latency`` and None: the network's own.
        threads: to measure with.
        preprocessing: how uint8 pictures become network inputs; None: as the weights of a named model ask
            for, or values / 255.
        samples: calibration inputs to take at most; None takes all.
        resources: where to keep what was computed, so that an ended run goes on; memory; workers.
        device: where a PyTorch module runs; the linear algebra is NumPy's.
        filter: called with every PyTorch layer's name and module; False leaves it alone.
        arguments: makes the arguments of a PyTorch module's forward out of one batch of ``calib``.
        progress: called with a step's name, what is done and what there is to do.
        show_budgets: called once, before solving, with the table of budgets that can be met.

    Returns:
        `Result`. For a PyTorch module (not its name): the new module, ready for use and for training, with
        the attribute ``decoupling`` (``plan``, ``report``); `Result.of` gives its result.

    Raises:
        BudgetError: several goals, or one out of reach.
        QualityError: the network is not ``within`` the limit.
        SpeedError: without a goal: no network within the limit is faster than the original; with
            ``latency``: the network takes longer.
        CalibrationError: the inputs cannot be read or do not fit.
        ModelError: the network cannot be read, run or decoupled.
        UnavailableError: a runtime, or the fused operator, is not installed.
        NetDecoupleError: the base of them all; messages are one line that says what to do.
    """
    tolerance = None if within is None else Tolerance.parse(within)
    goal = parse_goal(macs, parameters, latency, max_drop, labels, settings.rule, tolerance)
    if refine is not None and not 0 < refine < np.inf:
        raise BudgetError(f"refine={refine}: give minutes, more than 0")
    source = open_model(model, device=device, filter=filter, arguments=arguments)
    if emit is None:
        emit = source.fastest_form(runtime) if isinstance(goal, Fastest) else "standard"
    inputs = files_of(source, calib, labels)
    check_outputs((), inputs, resources.work)
    emission = Emission(emit, runtime, threads)
    request = Request(
        source,
        calib,
        labels,
        settings,
        preprocessing,
        samples,
        emission,
        resources,
        progress,
        tolerance,
        force,
        refine,
    )
    with pipeline.opened(request) as work:
        return _given(model, _result(source, pipeline.decouple(work, goal, show_budgets), inputs))


@overload
def apply_plan(
    model: ModelSource | Source,
    plan: Plan,
    calib: Calibration | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    resources: Resources = ...,
    progress: Progress = quiet,
) -> Result: ...
@overload
def apply_plan(
    model: Module,
    plan: Plan,
    calib: Calibration | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    resources: Resources = ...,
    device: str = "cpu",
    arguments: Callable[[Any], Any] | None = None,
    progress: Progress = quiet,
) -> Module: ...
def apply_plan(
    model: Any,
    plan: Plan,
    calib: Calibration | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    resources: Resources = Resources(),
    device: str = "cpu",
    arguments: Callable[[Any], Any] | None = None,
    progress: Progress = quiet,
) -> Any:
    """Apply a saved plan to the network and the calibration inputs that it was made for.

    The result is the same network again; a plan made from an ONNX model also applies to the PyTorch module
    that was exported to it, and the other way round. Arguments and the returned value are those of
    `decouple`.

    Raises:
        PlanError: the plan was made for another network or other inputs.
        NetDecoupleError: as in `decouple`.
    """
    source = open_model(model, device=device, arguments=arguments)
    settings = Settings(data_free=plan.data_free, uniform_rank=plan.uniform_rank, seed=plan.seed)
    samples, emission = plan.samples, Emission()
    inputs = files_of(source, calib)
    check_outputs((), inputs, resources.work)
    request = Request(source, calib, None, settings, preprocessing, samples, emission, resources, progress)
    with pipeline.opened(request, resumes=False) as work:
        return _given(model, _result(source, pipeline.apply_plan(work, plan), inputs))


def sweep(
    model: Any,
    calib: Calibration | None = None,
    macs: Share | Iterable[Share] = (),
    *,
    compare: Sequence[Any] = (),
    labels: Labels | None = None,
    settings: Settings = Settings(),
    emit: str = "standard",
    preprocessing: Preprocessing | None = None,
    samples: int | None = SAMPLES,
    output: str | os.PathLike[str] | None = None,
    resources: Resources = Resources(),
    device: str = "cpu",
    filter: Callable[[str, Module], bool] | None = None,
    arguments: Callable[[Any], Any] | None = None,
    progress: Progress = quiet,
    show: Callable[[SweepPoint], None] | None = None,
) -> Sweep:
    """Decouple a network to several budgets at little more than the price of one, and find the best trade.

    The network is analysed once. The result for each budget is, byte for byte, that of `decouple` for it
    alone. Arguments that are not explained here are those of `decouple`.

    Args:
        macs: the budgets: "80%,60%,2x" or (0.8, 0.6, 0.5).
        compare: results of earlier runs (.onnx files; PyTorch modules or folders), to compare on the same
            inputs. With them ``macs`` may be left out.
        output: a folder to write every network into, as soon as it is there; None: only figures are kept.
        show: called with every point of the curve as soon as it is known.

    Raises:
        NetDecoupleError: as in `decouple`.
    """
    goals = parse_sweep(macs, settings.rule)
    if not goals and not compare:
        raise BudgetError("give budgets to sweep over, like macs=(0.8, 0.6, 0.5), or networks to compare=")
    emission, is_exported = Emission(emit), output is not None and isinstance(model, str | os.PathLike)
    source = open_model(model, device=device, filter=filter, arguments=arguments, is_exported=is_exported)
    inputs = files_of(source, calib, labels, *compare)
    networks = [] if output is None else network_paths(Path(output), source, goals)
    check_outputs(networks, inputs, resources.work)
    paths: Sequence[Path | None] = networks or [None] * len(goals)
    others = [(_name(other), _similar(source, other)) for other in compare]
    request = Request(source, calib, labels, settings, preprocessing, samples, emission, resources, progress)
    points, compared = [], []
    with pipeline.opened(request) as work:
        loss = pipeline.original_loss(work)
        for name, other in others:
            compared.append(pipeline.compared(work, name, other))
            if show is not None:
                show(compared[-1].point)
        for path, outcome in zip(paths, pipeline.sweep(work, goals) if goals else (), strict=True):
            if path is not None:
                _save(_result(source, outcome, inputs), path)
            file = None if path is None else str(path)
            points.append(SweepPoint.of(outcome.report, outcome.plan, file))
            if show is not None:
                show(points[-1])
    return Sweep.of(source.name, loss, points, compared)


def inspect(model: Any, size: tuple[int, int] | None = None, calib: Any = None) -> Inspection:
    """List a network's layers, their costs and principal components.

    Args:
        model: as in `decouple`.
        size: height and width of its images, where the model does not say.
        calib: as in `decouple`, for models whose inputs are no images or not all alike; a few are enough.

    Raises:
        NetDecoupleError: as in `decouple`.
    """
    source = open_model(model)
    with source.session():
        preprocessing = source.preprocessing.resized_for(size)
        inputs = source.calibration(calib, preprocessing, 10, 0).inputs
        return inspection(source.name, tuple(source.open(inputs, Memory()).layers))


def evaluate(
    models: Sequence[Any],
    data: Labels,
    preprocessing: Preprocessing | None = None,
    progress: Progress = quiet,
) -> list[Score]:
    """Measure networks on labelled inputs, and their agreement with the first one.

    Args:
        models: each as in `decouple`.
        data: as ``labels`` in `decouple`, for top-1 and top-5 accuracy; for networks that return images the
            images (N, …) that are right, instead of labels, for their PSNR. uint8 ones are divided by 255. Of
            CTC readers, which are recognised, the texts are compared with those of the first network only.
        preprocessing: as in `decouple`.
        progress: called after every batch of inputs.

    Raises:
        NetDecoupleError: a model or the data cannot be read, do not fit, or the model is no classifier.
    """
    scores: list[Score] = []
    first: Array | None = None
    for model in models:
        source = open_model(model)
        with source.session():
            inputs, right = source.labelled(data, preprocessing)
            outputs = source.outputs(inputs, with_suffix(source.name, progress))[0]
        if first is not None and first.shape != outputs.shape:
            raise ModelError(f"{source.name} has outputs {outputs.shape}, the first model {first.shape}")
        score = _scored_classes if right.ndim == 1 else _scored_images
        if right.ndim == 1 and best_steps([outputs], len(right)) is not None:
            score = _scored_texts
        scores.append(replace(score(outputs, right, first), model=source.name))
        first = outputs if first is None else first
    return scores


def _scored_classes(outputs: Array, labels: NDArray[Any], first: Array | None) -> Score:
    top1, labels = accuracy([outputs], labels), labels[: len(outputs)]
    top5 = None
    if outputs.shape[1] > 5:
        best = np.argsort(-outputs, axis=1, kind="stable")[:, :5]
        top5 = float(np.mean((best == labels[:, None]).any(axis=1)))
    return Score(
        model="",
        images=len(outputs),
        top1=top1,
        top5=top5,
        same_class=None if first is None else agreement(first, outputs),
        kl=None if first is None else divergence([first], [outputs], "kl"),
        majority=majority(labels),
    )


def _scored_texts(outputs: Array, labels: NDArray[Any], first: Array | None) -> Score:
    """Compare what a CTC reader and the first network read; labels say nothing of texts."""
    same = None if first is None else same_texts([first], [outputs], len(labels))
    return Score(model="", images=len(labels), same_text=same)


def _scored_images(outputs: Array, targets: NDArray[Any], first: Array | None) -> Score:
    """Compute the mean PSNR of images; the peak is 1 if the targets are within 0 and 1, else their range."""
    if outputs.shape != targets.shape:
        raise ModelError(f"the outputs are {outputs.shape}, and the images to compare with {targets.shape}")
    peak = 1.0 if targets.min() >= 0 and targets.max() <= 1 else float(np.ptp(targets))

    to_first = None if first is None else mean_psnr(first, outputs, peak)
    psnr = mean_psnr(targets, outputs, peak)
    return Score(model="", images=len(outputs), psnr=psnr, psnr_to_first=to_first)


def bench(
    models: Sequence[Any],
    runtimes: Sequence[str] = ("onnxruntime",),
    *,
    threads: Sequence[int] = (1,),
    shape: tuple[int, ...] | None = None,
    seconds: float = SECONDS,
    layers: bool = False,
    trust: bool = False,
    constants: Mapping[str, Any] = {},
    progress: Progress = quiet,
    custom_ops: Libraries = (),
) -> Benchmark:
    """Time networks against each other, in turns, with random inputs.

    Args:
        models: paths, or what the runtimes open: `onnx.ModelProto`, PyTorch modules, exported programs.
        runtimes: "onnxruntime", "openvino", "torch", "torch.compile".
        threads: the numbers of threads to time with.
        shape: of the input, where the networks leave more than the batch open; None: that of the inputs
            which one of them was decoupled with, if it was.
        seconds: how long to measure, for each runtime and number of threads.
        layers: whether to measure the time per layer too, with ONNX Runtime's profiler.
        trust: whether to open files that can run code of their author, as PyTorch's do.
        constants: values of inputs besides the images, by name; other inputs are random.
        progress: called with the seconds that have passed.
        custom_ops: libraries of the operators that the networks use, for ONNX Runtime.

    Raises:
        ModelError: a network cannot be opened or run, or takes another input than the first.
        UnavailableError: a runtime is not installed.
    """
    libraries = _paths(custom_ops)
    named = [runtime(name, trust=trust, custom_ops=libraries) for name in runtimes]
    opened = partial(open_for_shapes, feeds=constants, custom_ops=libraries)
    if shape is None:
        files = [m for m in models if isinstance(m, onnx.ModelProto) or str(m).endswith(".onnx")]
        shape = next(filter(None, map(noted_shape, files)), None)
    options: dict[str, Any] = {
        "shape": shape,
        "seconds": seconds,
        "constants": constants,
        "progress": progress,
    }
    times = benchmark(models, named, opened, threads=threads, **options)
    if layers:
        options["custom_ops"] = libraries
        profiles = [layer_times(models, opened, count, **options) for count in threads]
        times = replace(times, layers=tuple(profiles))
    return times


def _structures(plan: dict[str, Any]) -> dict[str, Callable[[ConvGeometry], Structure]]:
    """Return, by layer that a plan changes, what makes its structure out of its geometry."""
    rows = [row for row in Plan.from_json(json.dumps(plan)).layers if row.changed]
    try:
        return {row.name: partial(method(row.family).structure, steps=row.steps) for row in rows}
    except ValueError as error:
        raise PlanError(f"{error}; save the module again") from error


def lower(model: ModelSource, path: str | os.PathLike[str]) -> int:
    """Write an ONNX model's fused operators as standard ones, which every runtime has; return their number.

    Raises:
        ModelError: the model cannot be read, or has no fused operators.
        OutputError: the place is not writable, or an input is there.
    """
    check_outputs([path], files_of(model))
    proto, name = read_proto(model)
    count = sum(map(fused.is_fused, nodes_of(proto.graph)))
    if not count:
        raise ModelError(f"{name}: the model has no fused operators; there is nothing to lower")
    write_model(fused.lower(proto), path)
    return count


def save(module: Module, folder: str | os.PathLike[str]) -> None:
    """Write a decoupled module into a folder of its own: ``model.safetensors`` and ``netdecouple.json``.

    What an earlier call wrote there is replaced, at once; a folder with other files in it is refused.

    Raises:
        ModelError: the module was not decoupled, or its state is more than tensors.
        OutputError: the folder cannot be written, or an input is in it.
    """
    decoupling = vars(module).get("decoupling")
    if not isinstance(decoupling, Decoupling):
        raise ModelError(
            f"this {type(module).__name__} was not made by netdecouple.decouple; "
            "of a compiled or distributed module, give the one inside"
        )
    check_outputs([folder], () if decoupling.result is None else decoupling.result.inputs)
    with _needing_torch():
        from netdecouple.frontends.torch.folder import write
    write(module, decoupling, folder)


def load(module: Module, folder: str | os.PathLike[str]) -> Module:
    """Return a copy of the original module, decoupled as the one in a folder was, with that one's weights.

    Args:
        module: built as the original was; its weights do not matter. Modes, types, devices and whether
            gradients are wanted are taken from it. It is not changed.
        folder: that `save` wrote; weights may be in shards, as on the Hugging Face Hub.

    Raises:
        PlanError: the folder's description is missing, damaged or of another version.
        ModelError: the weights are missing or damaged, or of another module than this.
    """
    source: Any = _torch_source()(module)
    from netdecouple.frontends.torch.folder import read

    with source.session():
        saved = read(source.module, folder, _structures)
    plan = Plan.from_json(json.dumps(saved.plan), str(folder))
    report = None if saved.report is None else Report.from_json(json.dumps(saved.report))
    saved.module.decoupling = Decoupling(plan, report, saved.norms)
    return saved.module


def check_replaceable(folder: Path) -> None:
    """Raise OutputError, before the work, if `save` could not write a folder."""
    with _needing_torch():
        from netdecouple.frontends.torch.folder import check_replaceable
    check_replaceable(folder)
    target = folder.resolve()
    # an existing folder is renamed, and the new one moved to its place
    check_writable(target.with_name(f".{target.name}.new") if target.exists() else folder)


def files_of(*given: Any) -> tuple[Path, ...]:
    """Return the files, and the folders of pictures, that models, inputs, labels and plans are read from.

    Of what is in memory there are none. Raises ModelError if a model cannot be read.
    """
    found: list[Path] = []
    for one in given:
        if not isinstance(one, str | os.PathLike):
            found += one.files if hasattr(one, "check_form") else ()
        elif Path(one).suffix == ".onnx" and os.path.isfile(one):
            found += onnxfile.files_of(one)
        elif os.path.isfile(Path(one) / DESCRIPTION):
            found += Path(one).iterdir()
        else:
            found += calibration.files_of(one)
            if Path(one).suffix == ".xml":  # OpenVINO's, with the weights beside it
                found.append(Path(one).with_suffix(".bin"))
    return tuple(path.absolute() for path in found)


def check_outputs(outputs: Sequence[StrPath], inputs: Sequence[Path], work: StrPath | None = None) -> None:
    """Check, before the work, that no result replaces what it is made from: `files_of` says what that is.

    Raises:
        OutputError: one does, two are the same, or one or an input is in the work folder.
    """
    check_apart(outputs, (f for path in inputs for f in (pictures(path) if path.is_dir() else [path])))
    if work is None:
        return
    for path in (*inputs, *outputs):
        place = Path(path).resolve()
        if Path(work).resolve() in (place, *place.parents):
            raise OutputError(f"{path}: is in the work folder, {work}, which is for nothing else; move it")


def is_named(model: str | os.PathLike[str]) -> bool:
    """Tell whether a text names a PyTorch model: torchvision:NAME, timm:NAME, or MODULE:FUNCTION."""
    text = os.fspath(model)
    library, _, name = text.partition(":")
    if Path(text).suffix == ".onnx" or os.path.exists(text) or not name:
        return False
    return library in LIBRARIES or names_function(text)


def _paths(libraries: Libraries) -> tuple[str, ...]:
    alone = isinstance(libraries, str | os.PathLike)
    return tuple(map(os.fspath, [libraries] if alone else libraries))  # type: ignore[arg-type]


def _is_module(model: Any) -> bool:
    torch = sys.modules.get("torch")  # a module can only be given if it has been imported
    return torch is not None and isinstance(model, torch.nn.Module)


@contextmanager
def _needing_torch() -> Iterator[None]:
    """Name the extra where an import fails for want of PyTorch."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "safetensors"):
            raise
        raise UnavailableError(
            f"PyTorch modules need torch and safetensors ({error}); pip install 'netdecouple[torch]'"
        ) from error


def _torch_source() -> Any:
    with _needing_torch():
        from netdecouple.frontends.torch.source import TorchSource
    return TorchSource


def _result(source: Source, outcome: Outcome, inputs: tuple[Path, ...]) -> Result:
    result = Result(outcome.model, outcome.plan, outcome.report, source, outcome.example, inputs)
    if _is_module(outcome.model):
        original = replace(result, model=None)
        outcome.model.decoupling = Decoupling(outcome.plan, outcome.report, outcome.norms, original)
    return result


def _given(model: Any, result: Result) -> Any:
    """Return a module where a module was given, else a result."""
    return result.model if _is_module(model) else result


def _name(model: Any) -> str:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    return type(model).__name__ if _is_module(model) else getattr(model, "name", "") or model.graph.name


def _similar(source: Source, other: Any) -> Source:
    """Read the result of an earlier run on the same network."""
    if isinstance(source, OnnxSource):
        return open_model(other, constants=source.constants, custom_ops=source.model.custom_ops)
    if _is_module(other):
        return open_model(other)
    return open_model(load(source.module, other))  # type: ignore[attr-defined]


def network_paths(folder: Path, source: Source, goals: Sequence[Budgets]) -> list[Path]:
    """Return the files of a sweep's networks, in a folder that need not exist yet.

    Raises OutputError if nothing can be written there.
    """
    is_folder = os.path.isdir(folder)
    if os.path.exists(folder) and not is_folder:
        raise OutputError(
            f"{folder}: is a file; give the name of a folder, which gets one network per budget"
        )
    name, suffix = source.name.rpartition(":")[2].removesuffix(".onnx"), source.suffix
    stem = name.replace("/", "_") or "model"
    check_writable((folder if is_folder else folder.resolve().parent) / f"{stem}{suffix}")
    return [folder / f"{stem}-macs{goal.percent}{suffix}" for goal in goals]


def _save(result: Result, path: Path) -> None:
    """Write one network of a sweep; the first one makes the folder."""
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot make the folder ({error.strerror})") from error
    result.save(path)
