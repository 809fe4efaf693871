"""The front door for ONNX models: read, plan, apply, check, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx

from netdecouple import kernels, runtimes
from netdecouple.data import calibration
from netdecouple.data.calibration import Preprocessing, Samples
from netdecouple.errors import BudgetError, CalibrationError, ModelError, PlanError
from netdecouple.execution.run import Resources
from netdecouple.fitting.apply import Applied, apply, difference
from netdecouple.fitting.sampling import Inputs, shuffled
from netdecouple.frontends.onnx.emission import form_of
from netdecouple.frontends.onnx.model import ModelSource, OnnxModel, read_model, write_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.network import Array
from netdecouple.planning.analysis import Analysis, Progress, Settings, analyze, quiet
from netdecouple.planning.cost import Budget, Macs, budgets_of, parse_share
from netdecouple.planning.divergence import agreement, divergence
from netdecouple.planning.latency import FUSED, STANDARD, Latency, Place, plan_for_latency, with_kept
from netdecouple.planning.plan import Plan
from netdecouple.planning.solve import (
    BudgetRow,
    FormOf,
    budget_rows,
    make_plan,
    plan_within,
    reachable,
    ruled_plan,
)
from netdecouple.report.inspection import Inspection, energies, inspection
from netdecouple.report.pictures import pictures
from netdecouple.report.provenance import identity, provenance
from netdecouple.report.report import (
    Disagreement,
    Report,
    Score,
    disagreements_of,
    layer_reports,
    quality_of,
)
from netdecouple.runtimes import benchmark
from netdecouple.runtimes.onnxfile import size_of
from netdecouple.version import __version__

SAMPLES = 1000  # calibration images taken unless more or fewer are asked for
TOLERANCE = 1e-3  # relative difference between the saved network and the plan's arithmetic
HALF_TOLERANCE = 3e-2  # the same where numbers between the stages are rounded to float16
SEARCH_STEP = 1.03  # the search for the smallest network ends when two budgets are this close

Calibration = str | os.PathLike[str] | Array | Iterable[Array]


@dataclass(frozen=True)
class Result:
    """A decoupled model, the plan that made it, and what it gained and lost."""

    model: onnx.ModelProto
    plan: Plan
    report: Report
    source: ModelSource  # what it was made of
    shape: tuple[int, ...]  # of one input, as it was calibrated with

    def timed(
        self,
        runtimes: Sequence[str] = ("onnxruntime",),
        threads: Sequence[int] = (1,),
        seconds: float | None = None,
    ) -> Result:
        """The same with times in its report: of the original and of this network, and layer by layer.

        Whatever cannot be timed does not fail, and the report says why.

        Args:
            runtimes: "onnxruntime", "openvino".
            threads: the numbers of threads to time with.
            seconds: how long to measure, for each runtime and number of threads; two unless told.
        """
        networks = (self.source, self.model)
        shape = self.shape
        report = benchmark.timed(self.report, networks, runtimes, threads, seconds, shape=shape, layers=True)
        return replace(self, report=report)

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write the report as .html or .json, as the path ends; for .html it is timed first, if it was not.

        Raises:
            OutputError: the ending is another one, or the place is not writable.
        """
        self.report.save(path, lambda: self.timed().report)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; whatever happens, there is never half a file under ``path``.

        Raises:
            OutputError: the place is not writable.
            ModelError: what was written is not what was to be written.
        """
        write_model(self.model, path)


def decouple(
    model: ModelSource,
    calib: Calibration | None = None,
    *,
    macs: str | float | None = None,
    parameters: str | float | None = None,
    latency: str | float | None = None,
    max_drop: float | None = None,
    labels: str | os.PathLike[str] | None = None,
    settings: Settings = Settings(),
    emit: str = "standard",
    runtime: str | None = None,
    threads: int = 1,
    preprocessing: Preprocessing = Preprocessing(),
    samples: int | None = SAMPLES,
    resources: Resources = Resources(),
    progress: Progress = quiet,
    show_budgets: Callable[[list[BudgetRow], str], None] | None = None,
) -> Result:
    """Decouple an ONNX model to a budget. The model given is not changed.

    Args:
        model: a path or a ModelProto with one image input (N, C, H, W), of float32 or float16, which stays.
        calib: unlabelled inputs: a folder of images, FILE.npy, FILE.npz:KEY, MODULE:FUNCTION, or arrays
            (N, C, H, W) that are ready for the network. May be left out when ``settings.data_free``.
        macs: the share of the MACs that may stay: 0.5, "50%" or "2x" (two times fewer).
        parameters: the share of the parameters that may stay.
        latency: the share of its time that the network may still take, for one input in ``runtime``.
        max_drop: instead of a budget, the points of top-1 accuracy that may be lost on ``labels``
            (FILE.npz:IMAGES,LABELS); the smallest network within them is searched for.
        settings: layers to leave alone, families to choose from or one rule for all layers, how to fit, seed.
        emit: "standard" writes standard operators, "fused" netdecouple's own, which is faster and which ONNX
            Runtime is taught with `netdecouple.kernels.register`.
        runtime: "onnxruntime" or "openvino". Named, or with ``latency``, the standard operators that a layer
            is written with are those that are fastest there, measured with ``threads`` threads.
        preprocessing: how uint8 images become network inputs.
        samples: how many calibration images to take at most; None takes all.
        resources: where to keep what has been found, so that a run that was ended goes on.
        progress: called with a step's name, what is done and what there is to do.
        show_budgets: called once with the table of budgets that can be met, before solving.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    goals = (macs is not None or parameters is not None or latency is not None, max_drop is not None)
    if sum((*goals, settings.rule is not None)) != 1:
        raise BudgetError(
            "give one of: a budget (--macs 50%, --params 2x, --latency 60%), --max-drop with --labels, "
            "or --method"
        )
    if max_drop is not None and not max_drop >= 0:
        raise BudgetError(f"--max-drop {max_drop}: give points of accuracy, 0 or more")
    if max_drop is not None and labels is None:
        raise BudgetError("--max-drop needs --labels FILE.npz:IMAGES,LABELS to measure accuracy on")
    budgets = budgets_of(macs, parameters)
    share = None if latency is None else parse_share(latency)
    place = place_for(emit, runtime, threads)
    opened = read_model(model)
    check_emit(opened, emit)
    images = load_images(opened, calib, preprocessing, samples, settings)
    labelled = None if labels is None else load_labelled(opened, labels, preprocessing, settings.seed)
    resources = resources.beside(size_of(opened.proto), images.images.nbytes)
    network = OnnxNetwork(opened, images.images, resources)
    check_classifier(network, labelled)
    inputs, images = split(images, settings.seed)
    with resources.opened(identity(network, inputs, settings, "onnxruntime")) as own:
        network.resources = own
        analysis = analyze(network, inputs, settings, progress, own)
        curve = budget_rows(analysis) if settings.rule is None else []
        if show_budgets is not None and curve:
            show_budgets(curve, analysis.loss)
        clock, form = None, first_form(place)
        if share is not None or runtime is not None:
            image = network.padded(images.images, slice(0, opened.batch or 1))
            clock = Latency(network, analysis.candidates, place, image, progress=progress)
            form = clock.form
        if max_drop is not None:
            assert labelled is not None
            applied = _search(analysis, max_drop, labelled, form, progress, own)
        else:

            def chosen() -> Plan:
                if share is not None:
                    assert clock is not None
                    return plan_for_latency(analysis, budgets, clock, share)
                plan = ruled_plan(analysis, form) if settings.rule else plan_within(analysis, budgets, form)
                return plan if clock is None else clock.with_neighbours(plan)

            # kept, as times are never the same twice
            goal = own.checkpoint.key("plan", (macs, parameters, latency, emit, runtime, threads))
            applied = apply(network, inputs, own.checkpoint.once(goal, Plan, chosen), progress, resources=own)
    is_calibrated = calib is not None
    judge = Judge(
        network, inputs, images, labelled, is_calibrated, model, preprocessing, settings, tuple(curve)
    )
    return judge.result(applied, clock)


def place_for(emit: str, runtime_name: str | None, threads: int) -> Place:
    """Where the network is to run.

    Raises:
        UnavailableError: a runtime, or the fused operator, is not to be had here.
        ModelError: the two do not go together.
    """
    if emit not in ("standard", "fused"):
        raise ModelError(f"--emit {emit}: there are standard and fused")
    if threads < 1:
        raise ModelError(f"--threads {threads}: give 1 or more")
    name = runtime_name or "onnxruntime"
    if name.startswith("torch"):
        raise ModelError(
            f"--runtime {name} is for PyTorch modules; ONNX models run in onnxruntime or openvino"
        )
    if emit == "fused":
        if name != "onnxruntime":
            raise ModelError(f"--emit fused is for onnxruntime; {name} runs standard operators only")
        kernels.check_available()
    return Place(runtimes.runtime(name), threads, FUSED if emit == "fused" else STANDARD)


def check_emit(model: OnnxModel, emit: str) -> None:
    """Refuse the fused operator where it cannot be.

    Raises:
        ModelError: the model is not of float32.
    """
    if emit == "fused" and model.dtype != np.float32:
        raise ModelError(f"{model.origin}: --emit fused is for float32 models, this one is {model.dtype}")


def check_classifier(network: OnnxNetwork, labelled: tuple[Array, np.ndarray] | None) -> None:
    """Find out before the work that there is no accuracy to be measured on what is ``labelled``.

    Raises:
        ModelError: the network is no classifier.
    """
    if labelled is not None:
        accuracy(network.run(labelled[0][:1])[0], labelled[1][:1])


def first_form(place: Place) -> FormOf:
    """The form that is chosen where nothing is measured."""
    return lambda layer, candidate: place.forms[0]


def apply_plan(
    model: ModelSource,
    plan: Plan,
    calib: Calibration | None = None,
    *,
    preprocessing: Preprocessing = Preprocessing(),
    resources: Resources = Resources(),
    progress: Progress = quiet,
) -> Result:
    """Carry out a saved plan on the model and the calibration images it was made for.

    Raises:
        PlanError: the plan is of another model or of other images.
        NetDecoupleError: as in `decouple`.
    """
    opened = read_model(model)
    settings = Settings(data_free=plan.data_free, uniform_rank=plan.uniform_rank, seed=plan.seed)
    images = load_images(opened, calib, preprocessing, plan.samples, settings)
    resources = resources.beside(size_of(opened.proto), images.images.nbytes)
    network = OnnxNetwork(opened, images.images, resources)
    try:
        plan = plan.adopted(network.fingerprint, network.layers)
    except PlanError as error:
        raise PlanError(f"{opened.origin}: {error}, with run --plan-out") from error
    inputs, images = split(images, plan.seed)
    if inputs.fingerprint != plan.images:
        raise PlanError(
            "the plan was made with other calibration images; give the same --calib and preprocessing"
        )
    with resources.opened(identity(network, inputs, None, "onnxruntime")) as own:
        network.resources = own
        applied = apply(network, inputs, plan, progress, resources=own)
    return Judge(network, inputs, images, None, calib is not None, model, preprocessing).result(applied)


def load_images(
    model: OnnxModel,
    calib: Calibration | None,
    preprocessing: Preprocessing,
    samples: int | None,
    settings: Settings,
) -> Samples:
    """Load calibration images for a model; without any, and data-free, noise.

    Raises:
        CalibrationError: they cannot be read or do not fit, or there are none and there should be.
    """
    channels = model.channels or 3
    if calib is None:
        if not settings.data_free:
            raise CalibrationError(
                "give --calib (a folder of images, FILE.npz:KEY, …), or --data-free to do without"
            )
        size = model.size or preprocessing.size
        if size is None:
            raise CalibrationError(f"{model.origin} takes images of any size; say which with --input-size")
        # without inputs, noise tells the shapes of things
        noise = np.random.default_rng(settings.seed).standard_normal((10, channels, *size))
        return Samples(noise.astype(np.float32), calibration.NOISE)
    options = {
        "channels": channels,
        "size": model.size,
        "preprocessing": preprocessing,
        "samples": samples,
        "seed": settings.seed,
    }
    if isinstance(calib, str | os.PathLike):
        return calibration.load(calib, **options)  # type: ignore[arg-type]
    return calibration.from_arrays(calib, **options)  # type: ignore[arg-type]


def split(images: Samples, seed: int) -> tuple[Inputs, Samples]:
    """Shuffle images and hold some back; the samples come back with these, so that there is one copy."""
    inputs = Inputs.split(images.images, seed)
    return inputs, replace(images, images=inputs.images)


def load_labelled(
    model: OnnxModel, source: str | os.PathLike[str], preprocessing: Preprocessing, seed: int
) -> tuple[Array, np.ndarray]:
    """Load images and their labels for a model.

    Raises:
        CalibrationError: they cannot be read, or do not fit.
    """
    images, labels = calibration.load_labelled(
        source,
        channels=model.channels or 3,
        size=model.size,
        preprocessing=preprocessing,
        samples=None,
        seed=seed,
    )
    return images.images, labels


def accuracy(outputs: Array, labels: np.ndarray) -> float:
    """Top-1 accuracy of (n, classes) outputs.

    Raises:
        ModelError: the network is no classifier.
    """
    if outputs.ndim != 2:
        raise ModelError(f"accuracy needs outputs (N, classes), these are {outputs.shape}")
    if len(outputs) > len(labels):
        raise ModelError(f"accuracy needs one output per image; {len(labels)} images gave {outputs.shape}")
    return float(np.mean(outputs.argmax(axis=1) == labels[: len(outputs)]))


def _search(
    analysis: Analysis,
    max_drop: float,
    labelled: tuple[Array, np.ndarray],
    form: FormOf,
    progress: Progress,
    resources: Resources,
) -> Applied:
    """Bisect the budget for the smallest network that loses at most ``max_drop`` points of accuracy."""
    network, inputs = analysis.network, analysis.inputs
    assert isinstance(network, OnnxNetwork)
    images, labels = labelled
    wanted = accuracy(network.run(images)[0], labels) - max_drop / 100
    total = sum(layer.macs for layer in network.layers)
    # shares: `low` is too small or unknown, `high` is known to do
    low, high = reachable(analysis, [Budget(Macs(), 1.0)])[0] / total, 1.0
    best = apply(network, inputs, make_plan(analysis, [Budget(Macs(), 1.0)], form), resources=resources)
    steps = int(np.ceil(np.log2(max(np.log(high / low) / np.log(SEARCH_STEP), 1.0))))
    for step in range(steps):
        progress("Searching the budget", step, steps)
        share = float(np.sqrt(low * high))
        plan = make_plan(analysis, [Budget(Macs(), share)], form)
        applied = apply(network, inputs, plan, resources=resources)
        outputs = network.run_model(network.decoupled(applied.factorizations), images)
        if accuracy(outputs[0], labels) >= wanted:
            best, high = applied, share
        else:
            low = share
    progress("Searching the budget", steps, steps)
    return best


@dataclass(frozen=True)
class Judge:
    """What decoupled networks are held against: the original's outputs, which are computed once."""

    network: OnnxNetwork
    inputs: Inputs
    images: Samples  # shuffled, as the inputs are
    labelled: tuple[Array, np.ndarray] | None
    is_calibrated: bool  # or else the inputs are noise
    source: ModelSource | None = None  # what was read; None: the network as it was read
    preprocessing: Preprocessing = field(
        default_factory=Preprocessing
    )  # of the images, if they were pictures
    settings: Settings | None = None  # None where a saved plan is carried out
    curve: tuple[BudgetRow, ...] = ()  # what other budgets would lose

    @cached_property
    def original(self) -> list[Array]:
        """The original's outputs on the inputs that are held back."""
        return self.network.run(self.inputs.held_back)

    @cached_property
    def original_accuracy(self) -> float:
        """The original's accuracy on the labelled images."""
        assert self.labelled is not None
        return accuracy(self.network.run(self.labelled[0])[0], self.labelled[1])

    @cached_property
    def energies(self) -> dict[str, Array]:
        """The principal components of the original's layers."""
        return energies(self.network.layers)

    def result(self, applied: Applied, clock: Latency | None = None) -> Result:
        """Build the decoupled model, hold it against the plan's own arithmetic and the original."""
        network, plan, shown = self.network, applied.plan, self.inputs.held_back
        metadata = {"netdecouple.version": __version__, "netdecouple.plan": plan.to_json(indent=None)}
        forms = {row.name: form_of(row.form) for row in plan.layers if row.changed}
        layers = {layer.name: layer for layer in network.layers}
        model = network.decoupled(*with_kept(plan, layers, applied.factorizations, forms), metadata)
        new = network.run_model(model, shown)
        few = shown[:32]
        halves = any(layer.weight.dtype == np.float16 for layer in network.layers)
        tolerance = HALF_TOLERANCE if halves else TOLERANCE
        off = difference(network, applied, few, network.run_model(model, few), tolerance)
        quality = quality_of(plan, len(shown), self.original, new)
        both = None
        if self.labelled is not None:
            labelled, labels = self.labelled
            both = self.original_accuracy, accuracy(network.run_model(model, labelled)[0], labels)
        rows = layer_reports(layers, applied, network.layers_of(model), self.energies)
        images = self.images
        found: tuple[Disagreement, ...] = ()
        places = shuffled(len(images.images), plan.seed)[self.inputs.fitted :].tolist()
        if self.is_calibrated:
            found = disagreements_of(plan, places, self.original, new)
        report = Report(
            network.model.origin,
            __version__,
            plan.budget,
            rows,
            quality if self.is_calibrated else None,
            off,
            both,
            None if clock is None else clock.speed(model, plan),
            images.skipped,
            network.model.bytes,
            size_of(model),
            self.curve,
            found,
            provenance(plan, self.inputs, images.origin, self.settings),
            pictures=pictures([shown[places.index(d.sample)] for d in found], self.preprocessing),
        )
        source = network.model.proto if self.source is None else self.source
        return Result(model, plan, report, source, (network.model.batch or 1, *images.images.shape[1:]))


def inspect(model: ModelSource, size: tuple[int, int] | None = None) -> Inspection:
    """Look at a network without calibration images; ``size`` (h, w) is needed if the model leaves it open."""
    opened = read_model(model)
    settings = Settings(data_free=True)
    noise = load_images(opened, None, Preprocessing(size=size), None, settings)
    return inspection(opened.origin, OnnxNetwork(opened, noise.images).layers)


def evaluate(
    models: Sequence[ModelSource],
    data: str | os.PathLike[str],
    preprocessing: Preprocessing = Preprocessing(),
) -> list[Score]:
    """Measure top-1 and top-5 accuracy of networks on FILE.npz:IMAGES,LABELS, and agreement with the first.

    Raises:
        NetDecoupleError: a model or the data cannot be read, do not fit, or the model is no classifier.
    """
    scores: list[Score] = []
    first: Array | None = None
    for source in models:
        model = read_model(source)
        images, labels = load_labelled(model, data, preprocessing, 0)
        network = OnnxNetwork(model, images)
        outputs = network.run(images)[0]
        top1, labels = accuracy(outputs, labels), labels[: len(outputs)]
        top5 = None
        if outputs.shape[1] > 5:
            best = np.argpartition(-outputs, 5, axis=1)[:, :5]
            top5 = float(np.mean((best == labels[:, None]).any(axis=1)))
        if first is not None and first.shape != outputs.shape:
            raise ModelError(f"{model.origin} has outputs {outputs.shape}, the first model {first.shape}")
        same = None if first is None else agreement(first, outputs)
        kl = None if first is None else divergence([first], [outputs], "kl")
        first = outputs if first is None else first
        scores.append(Score(model.origin, len(outputs), top1, top5, same, kl))
    return scores
