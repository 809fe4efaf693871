"""The one place with the order of steps: open, analyse, plan, refit, build, check, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import (
    BudgetError,
    CalibrationError,
    ModelError,
    PlanError,
    QualityError,
    SpeedError,
    UnavailableError,
)
from netdecouple.execution.memory import Memory
from netdecouple.execution.progress import Progress, with_suffix
from netdecouple.execution.run import Resources, Run
from netdecouple.fitting.apply import Applied, apply, difference
from netdecouple.fitting.sampling import Inputs, shuffled
from netdecouple.fitting.sequential import targets_for
from netdecouple.goal import Budgets, Emission, Fastest, Goal, LatencyBudget, MaxDrop, Within, goal_key
from netdecouple.network import Array, Calibration, Network, Source
from netdecouple.planning.analysis import Analysis, analyze
from netdecouple.planning.candidates import Rule
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.divergence import Comparison, Loss, loss_kind
from netdecouple.planning.latency import Latency, plan_for_latency, with_fused_layers
from netdecouple.planning.plan import Plan
from netdecouple.planning.planner import BudgetRow, budget_rows, plan_within, used
from netdecouple.planning.settings import Settings
from netdecouple.planning.tolerance import Promise, Tolerance
from netdecouple.report.build import (
    busy_warning,
    chance_warning,
    disagreements_of,
    layer_reports,
    quality_of,
    unused_warning,
    warnings_of,
)
from netdecouple.report.inspection import energies
from netdecouple.report.model import Report, Speed
from netdecouple.report.pictures import pictures
from netdecouple.report.provenance import identity, provenance
from netdecouple.report.sweep import Compared, LayerChoice, SweepPoint
from netdecouple.search import EFFORTS, OBJECTIVES, Excess, Trials, least_network
from netdecouple.version import __version__

NOT_FASTER = 0.98  # share of the original's time above which a network is not called faster
MISSED = 0.05  # relative distance from a share of time that is asked for, from which it counts as missed
TIMINGS = 3  # of a network that seems to take more time than was asked for
BUSY = 0.2  # share of the time of timing that other work took, from which it is said
CHECKED = 32  # held-out inputs on which a built network is compared with the plan's arithmetic


@dataclass(frozen=True)
class Request:
    """A network, its inputs, and how to decouple it, whatever the goal."""

    source: Source
    calib: Any
    labels: Any
    settings: Settings
    preprocessing: Preprocessing | None  # None: the source's
    samples: int | None  # at most; None: all
    emission: Emission
    resources: Resources
    progress: Progress
    tolerance: Tolerance | None = None  # for the outputs
    force: bool = False  # return a network that does not keep it, too
    refine: float | None = None  # minutes of training the decoupled layers together; None: they are not


@dataclass(frozen=True)
class Outcome:
    """A decoupled model, the plan that made it, and what it gained and lost."""

    model: Any
    plan: Plan
    report: Report
    norms: dict[str, str]  # by changed layer, the BatchNorm folded into it
    example: Any  # a few inputs, to time or export the model with


@dataclass(frozen=True)
class Work:
    """A request under way: the network is open, its inputs are loaded and split."""

    request: Request
    network: Network
    inputs: Inputs
    calibration: Calibration
    labelled: tuple[Any, NDArray[np.int64]] | None
    run: Run

    @cached_property
    def outputs(self) -> list[Array]:
        """The original's outputs on the held-out inputs."""
        return self.network.run(self.inputs.held_out)

    @cached_property
    def known_outputs(self) -> list[Array]:
        """The original's outputs on all inputs, those that are fitted to as well."""
        return self.network.run(self.inputs.images)

    def promise(self, new: list[Array]) -> Promise | None:
        """Whether outputs on the held-out inputs are within the tolerance; None without one."""
        tolerance = self.request.tolerance
        return None if tolerance is None else tolerance.promise(self.outputs, new, lambda: self.known_outputs)

    @cached_property
    def accuracy(self) -> float:
        """The original's top-1 accuracy on the labelled inputs."""
        assert self.labelled is not None
        return accuracy(self.network.run(self.labelled[0]), self.labelled[1])

    def accuracies(self, run: Callable[[Any], list[Array]]) -> tuple[float, float] | None:
        """The original's accuracy, and that of the outputs of ``run``; None without labelled inputs."""
        if self.labelled is None:
            return None
        return self.accuracy, accuracy(run(self.labelled[0]), self.labelled[1])

    @cached_property
    def energies(self) -> dict[str, Array]:
        """Cumulative energy of the principal components of the original's layers."""
        return energies(self.network.layers)


@contextmanager
def opened(request: Request, *, resumes: bool = True) -> Iterator[Work]:
    """Load inputs, open the network and the work folder; whatever happens, both are closed.

    The work folder depends on the settings if the run ``resumes``; not where a saved plan is applied. Raises
    NetDecoupleError if the inputs or the network cannot be used, or the work folder is another run's.
    """
    source, settings = request.source, request.settings
    source.check_form(request.emission.form)
    with source.session():
        if request.calib is None and not settings.data_free:
            raise CalibrationError(
                "give calib= (a folder of images, FILE.npz:KEY, arrays, …), or data_free=True to do without"
            )
        labels, preprocessing = request.labels, request.preprocessing
        calibration = source.calibration(request.calib, preprocessing, request.samples, settings.seed)
        labelled = None if labels is None else source.labelled(labels, preprocessing)
        with (
            request.resources.opened(source.nbytes, calibration.nbytes) as run,
            closing(source.open(calibration.inputs, run.memory)) as network,
        ):
            if labelled is not None:  # a network without classes is refused before the work
                accuracy(network.run(labelled[0][:1]), labelled[1])
            inputs = Inputs.split(calibration.inputs, settings.seed, calibration.fingerprint)
            if not settings.data_free:
                inputs = inputs.with_scales(network, settings.seed, request.progress)
            about = identity(network, inputs, settings if resumes else None, source.framework)
            run.claim({**about, **source.about})
            yield Work(request, network, inputs, calibration, labelled, run)


def decouple(
    work: Work, goal: Goal, show_budgets: Callable[[list[BudgetRow], str], None] | None = None
) -> Outcome:
    """Decouple a network to one goal.

    Raises BudgetError if it is out of reach; QualityError if the tolerance is not kept, and not forced;
    SpeedError if the fastest network is no faster, or one takes more time than was asked for, and not
    forced; ModelError at NaN or Inf, or if `finish` does.
    """
    if isinstance(goal, Fastest) and work.request.tolerance is None:
        usual = Tolerance.usual(work.outputs, len(work.inputs.held_out))
        work = replace(work, request=replace(work.request, tolerance=usual))
    network, request, run = work.network, work.request, work.run
    if request.tolerance is not None:
        if work.calibration.is_noise:
            advice = "a budget" if isinstance(goal, Fastest) else "leave it out"
            raise BudgetError(
                f"what the outputs may change is measured on calibration inputs; give calib=, or {advice}"
            )
        request.tolerance.check(work.outputs, len(work.inputs.held_out))
        if not request.force:
            request.tolerance.check_count(len(work.inputs.held_out))
    if request.refine is not None:
        if work.calibration.is_noise:
            raise BudgetError("refine= trains on calibration inputs; give calib=, or leave it out")
        _refinement().check(network, work.inputs.held_out)
    analysis = analyze(network, work.inputs, request.settings, request.progress, run)
    curve = [] if isinstance(goal, Rule) else budget_rows(analysis)
    if show_budgets is not None and curve:
        show_budgets(curve, analysis.loss)
    latency = None
    if isinstance(goal, LatencyBudget | Fastest) or request.emission.runtime is not None:
        latency = _latency(work, analysis)
    if isinstance(goal, MaxDrop):
        applied = _least(work, analysis, partial(_excess_drop, work, goal.points))
    elif isinstance(goal, Within):
        applied = _least(work, analysis, partial(_excess, work))
    elif isinstance(goal, Fastest):
        applied = _least(work, analysis, partial(_excess, work), latency)
    else:
        applied = _planned(work, analysis, goal, latency)
        if isinstance(goal, Budgets) and _is_over(network, applied, goal):
            applied = _planned(work, analysis, goal, latency, fills=False)
    if request.refine is not None:
        applied = _refined(work, analysis, applied, request.refine)
    most = goal.share * (1 + MISSED) if isinstance(goal, LatencyBudget) else NOT_FASTER
    budgets = goal.budgets if isinstance(goal, Budgets) else ()
    outcome = finish(work, applied, latency=latency, most=most, curve=curve, budgets=budgets)
    promise = outcome.report.promise
    if isinstance(goal, Fastest):
        _check_faster(outcome, applied)
    if isinstance(goal, LatencyBudget):
        outcome = _with_checked_share(outcome, goal.share, request.force)
    if promise is None or request.force:
        return outcome
    if isinstance(goal, Within) and not (promise.kept and applied.factorizations):
        advice = "give more inputs, or allow more"
        raise QualityError(f"no smaller network was found within {promise.asked}; {advice}")
    if not promise.kept:
        advice = "ask for less, give more inputs, or allow more; force=True returns it all the same"
        raise QualityError(f"the network is not within {promise.asked}: {promise.text}; {advice}")
    return outcome


def _check_faster(outcome: Outcome, applied: Applied) -> None:
    """Raise SpeedError unless the network measures faster than the original."""
    promise, speed = outcome.report.promise, outcome.report.speed
    assert promise is not None
    assert speed is not None
    if not applied.factorizations or speed.share > NOT_FASTER:
        found = f"; the best takes {speed.share:.0%} of the time" if applied.factorizations else ""
        raise SpeedError(
            f"no network that is faster than the original in {speed.place} was found within {promise.asked}"
            f"{found}; give more inputs, or allow more with within="
        )


def _with_checked_share(outcome: Outcome, share: float, force: bool) -> Outcome:
    """Warn if a network misses its share of the time; SpeedError if it takes more, and not forced."""
    report = outcome.report
    assert report.speed is not None
    off = report.speed.share / share - 1
    if abs(off) <= MISSED:
        return outcome
    place = report.speed.place
    missed = f"{report.speed.share:.0%} of the time in {place}, where {100 * share:.4g}% was asked for"
    if off > 0 and not force:
        raise SpeedError(
            f"{missed}; times change while other programs run: try again, or force=True returns it as it is"
        )
    advice = "run again without other programs" if off > 0 else "a larger share may keep more of the outputs"
    return replace(outcome, report=replace(report, warnings=(*report.warnings, f"{missed}; {advice}")))


def _refinement() -> Any:
    """Import what needs PyTorch, or raise UnavailableError."""
    try:
        from netdecouple.fitting import refinement
    except ImportError as error:
        raise UnavailableError("refine= needs PyTorch; pip install 'netdecouple[torch]'") from error
    return refinement


def _refined(work: Work, analysis: Analysis, applied: Applied, minutes: float) -> Applied:
    """Train the decoupled layers together, once for a work folder: no two trainings end alike."""
    network, run = work.network, work.run
    key = run.checkpoint.key("refined", (applied.plan.to_json(), minutes))
    refine = partial(_refinement().refine, network, work.inputs, applied, analysis.loss, minutes)
    refined: Applied = run.checkpoint.once(key, Applied, lambda: refine(work.request.progress))
    return refined


def sweep(work: Work, goals: Sequence[Budgets]) -> Iterator[Outcome]:
    """Decouple a network to several budgets from one analysis; results and errors are those of `decouple`."""
    network, request, run = work.network, work.request, work.run
    analysis = analyze(network, work.inputs, request.settings, request.progress, run)
    plans = _best(work, analysis, [_plans(work, analysis, goal, None) for goal in goals])
    targets = targets_for(network, work.inputs, plans, request.progress, run)
    for goal, plan in zip(goals, plans, strict=True):
        progress = with_suffix(f"{goal.percent}%", request.progress)
        applied = apply(network, work.inputs, plan, progress, targets, run)
        if _is_over(network, applied, goal):
            applied = _planned(work, analysis, goal, None, fills=False)
        yield finish(work, applied, budgets=goal.budgets)


def apply_plan(work: Work, plan: Plan) -> Outcome:
    """Apply a saved plan to the network and the inputs that it was made for; PlanError if they are others."""
    network = work.network
    try:
        plan = plan.adopted(network.fingerprint, network.layers)
    except PlanError as error:
        raise PlanError(f"{network.name}: {error}") from error
    if work.inputs.fingerprint != plan.images:
        raise PlanError(
            "the plan was made with other calibration inputs; give the same calib= and preprocessing"
        )
    applied = apply(network, work.inputs, plan, work.request.progress, run=work.run)
    return finish(work, applied, is_saved=True)


def _first_form(emission: Emission) -> Callable[..., str]:
    return lambda layer, candidate: emission.forms[0]


def _latency(work: Work, analysis: Analysis) -> Latency:
    """Measure the layers in the runtime that the network is meant for."""
    emission = work.request.emission
    runtime = emission.runtime or work.request.source.runtimes[0]
    timer = work.request.source.timer(work.network, runtime, emission.threads, emission.forms)
    return Latency(analysis, timer, progress=work.request.progress)


def _plans(
    work: Work, analysis: Analysis, goal: Goal, latency: Latency | None, fills: bool = True
) -> list[Plan]:
    """Make a plan for every objective; one where the settings leave nothing to choose or nothing is measured.

    For a latency there is one plan, too, as many networks are timed for each.
    """
    objectives = EFFORTS[analysis.settings.effort].objectives
    if not (isinstance(goal, Budgets) and _is_tried(analysis)):
        objectives = OBJECTIVES[:1]
    return [_plan(work, analysis.with_objective(choice), goal, latency, fills) for choice in objectives]


def _planned(
    work: Work, analysis: Analysis, goal: Goal, latency: Latency | None, fills: bool = True
) -> Applied:
    """Apply the best plan for a goal; it is kept in the work folder, as times are never the same twice."""
    checkpoint = work.run.checkpoint
    key = checkpoint.key("plan", (goal_key(goal, work.request.emission), fills))
    plan = checkpoint.once(
        key, Plan, lambda: _best(work, analysis, [_plans(work, analysis, goal, latency, fills)])[0]
    )
    return apply(work.network, work.inputs, plan, work.request.progress, run=work.run)


def _is_over(network: Network, applied: Applied, goal: Budgets) -> bool:
    """Return whether a network costs more than its budgets: its fit may read other channels than its plan."""
    built = network.build(applied.factorizations, {}, {})
    written = network.layers_of(built, applied.factorizations)
    return any(used(budget, network.layers, written) > 1 for budget in goal.budgets)


def _is_tried(analysis: Analysis) -> bool:
    return analysis.settings.procedure == "planned" and not analysis.settings.data_free


def _trials(work: Work, analysis: Analysis) -> Trials:
    comparison = Comparison(work.outputs, analysis.loss)
    return Trials(work.network, work.inputs, comparison, work.request.progress, work.run)


def _best(work: Work, analysis: Analysis, goals: Sequence[Sequence[Plan]]) -> list[Plan]:
    """Return every goal's best plan by trials; its first one if nothing may be measured."""
    return _trials(work, analysis).best(goals) if _is_tried(analysis) else [plans[0] for plans in goals]


def _plan(work: Work, analysis: Analysis, goal: Goal, latency: Latency | None, fills: bool) -> Plan:
    emission = work.request.emission
    form = _first_form(emission) if latency is None else latency.form
    if isinstance(goal, LatencyBudget):
        assert latency is not None
        advice = "ask for less"
        if emission.form == "standard" and work.request.source.runtimes[0] == "onnxruntime":
            advice = "emit='fused' goes further, or ask for less"
        return plan_for_latency(latency, goal.budgets, goal.share, advice)
    budgets = goal.budgets if isinstance(goal, Budgets) else ()
    plan = plan_within(analysis, budgets, form, fills=fills)
    return plan if latency is None else latency.with_fused_neighbours(plan)


def _least(work: Work, analysis: Analysis, excess: Excess, latency: Latency | None = None) -> Applied:
    """Search for the least network in MACs or in time."""
    form = _first_form(work.request.emission) if latency is None else latency.form
    trials = _trials(work, analysis)
    if latency is None:
        return least_network(trials, analysis, Macs(), form, excess)
    return least_network(trials, analysis, latency, form, excess, latency.with_fused_neighbours)


def _excess_drop(work: Work, points: float, applied: Applied, outputs: list[Array]) -> float:
    """Infinite if more than so many points of accuracy are lost on the labelled inputs, else minus infinite.

    Accuracy goes up and down in steps: how far it is from a limit does not tell where it is reached.
    """
    network = work.network
    assert work.labelled is not None
    samples, labels = work.labelled
    outputs = network.run_built(network.build(applied.factorizations, {}, {}), samples)
    return -np.inf if accuracy(outputs, labels) >= work.accuracy - points / 100 else np.inf


def _excess(work: Work, applied: Applied, outputs: list[Array]) -> float:
    """How far the network's outputs are beyond the tolerance: see `Tolerance.excess`."""
    promise, tolerance = work.promise(outputs), work.request.tolerance
    assert promise is not None
    assert tolerance is not None
    return tolerance.excess(promise.expected)


def accuracy(outputs: Sequence[Array], labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy of a classifier's outputs [(n, classes)]; of equal scores the first counts.

    Raises ModelError if the network is no classifier, CalibrationError if a label is no class of it.
    """
    first = outputs[0]
    if labels.ndim != 1:
        raise CalibrationError("labels= needs class labels (N,) here; these are images")
    if first.ndim != 2:
        raise ModelError(f"accuracy needs outputs (N, classes), these are {first.shape}; leave out labels=")
    if len(first) > len(labels):
        raise ModelError(f"accuracy needs one output per image; {len(labels)} images gave {first.shape}")
    classes = first.shape[1]
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise CalibrationError(
            f"the labels go from {labels.min()} to {labels.max()}, and the network's classes from 0 to "
            f"{classes - 1}; number the labels as the network's outputs are"
        )
    return float(np.mean(first.argmax(axis=1) == labels[: len(first)]))


def majority(labels: NDArray[np.int64]) -> float:
    """The share of the most frequent label.

    >>> majority(np.array([1, 0, 1, 1]))
    0.75
    """
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def finish(
    work: Work,
    applied: Applied,
    *,
    latency: Latency | None = None,
    most: float = np.inf,
    curve: Sequence[BudgetRow] = (),
    budgets: Sequence[Budget] = (),
    is_saved: bool = False,
) -> Outcome:
    """Build the decoupled model, and report on it; ModelError if it does not compute what its plan says.

    It is timed again if it seems to take more than a share ``most`` of the original's time.
    """
    network, plan, request = work.network, applied.plan, work.request
    layers = {layer.name: layer for layer in network.layers}
    factorizations, forms = with_fused_layers(plan, layers, applied.factorizations)
    model = network.build(factorizations, forms, plan.metadata(getattr(network.example, "shape", None)))
    held_out = work.inputs.held_out
    new = network.run_built(model, held_out)
    few = held_out[:CHECKED]
    off = difference(network, applied, few, network.run_built(model, few), network.tolerance)
    both = work.accuracies(partial(network.run_built, model))
    written = network.layers_of(model, applied.factorizations)
    warnings = network.notes
    if both is not None and work.labelled is not None:
        warnings += chance_warning(both[0], majority(work.labelled[1]))
    speed = None if latency is None else _speed(latency, model, plan, most)
    if latency is not None and latency.timer.lost > BUSY:
        warnings += (busy_warning(latency.timer.lost),)
    unused = unused_warning(budgets, network.layers, written)
    measured: dict[str, Any] = {"agreement": None, "warnings": warnings + unused}
    if not work.calibration.is_noise:
        quality = quality_of(plan.loss, plan.predicted_loss, len(held_out), work.outputs, new)
        places = shuffled(len(work.inputs.images), plan.seed)[work.inputs.fitted :].tolist()
        worst = disagreements_of(plan, places, work.outputs, new)
        drawn = network.pictures(held_out[np.array([places.index(d.sample) for d in worst], np.int64)])
        measured = {
            "agreement": quality,
            "promise": work.promise(new),
            "warnings": warnings + warnings_of(quality) + unused,
            "disagreements": worst,
            "pictures": pictures(drawn, request.preprocessing or request.source.preprocessing),
        }
    settings = None if is_saved else request.settings
    report = Report(
        model=network.name,
        netdecouple=__version__,
        budget=plan.budget,
        layers=layer_reports(layers, applied, written, work.energies),
        difference=off,
        accuracy=both,
        speed=speed,
        left_out=request.source.left_out,
        skipped=work.calibration.skipped,
        bytes_before=network.size_of(),
        bytes=network.size_of(model),
        curve=tuple(curve),
        refinement=applied.refinement,
        provenance=provenance(plan, work.inputs, work.calibration.origin, settings),
        **measured,
    )
    norms = {name: network.norms[name] for name in applied.factorizations if name in network.norms}
    return Outcome(model, plan, report, norms, network.example)


def _speed(latency: Latency, model: Any, plan: Plan, most: float) -> Speed:
    """Time a plan's network against the original; a few times if it seems to take more than ``most``.

    Other programs disturb single measurements, and hours of work are not given up for one of them.
    """
    for _ in range(TIMINGS):
        before, after = map(float, latency.timer.network_times([model]))
        if after <= most * before:
            break
    foreseen = latency.predicted_share(plan)
    return Speed(
        place=latency.timer.name, before=before, after=after, share=after / before, foreseen=foreseen
    )


def compared(work: Work, name: str, other: Source) -> Compared:
    """Compare the result of an earlier run with the original, on the same held-out inputs.

    Raises ModelError if it takes other inputs than the original, or has other outputs.
    """
    network, held_out = work.network, work.inputs.held_out
    advice = f"compare networks that were made of {network.name}"
    try:
        with closing(other.open(work.inputs.images, Memory())) as opened_other:
            new = opened_other.run(held_out)
            macs, parameters = _costs(opened_other)
            both = work.accuracies(opened_other.run)
    except ModelError as error:
        raise ModelError(f"{name}: {error}; {advice}") from error
    shapes = [[output.shape for output in outputs] for outputs in (work.outputs, new)]
    if shapes[0] != shapes[1]:
        raise ModelError(f"{name}: its outputs are {shapes[1]}, the original's {shapes[0]}; {advice}")
    plan = None
    with suppress(PlanError):  # a plan of another version
        plan = None if other.plan_text is None else Plan.from_json(other.plan_text)
    predicted = 0.0 if plan is None else plan.predicted_loss
    quality = None
    if not work.calibration.is_noise:
        quality = quality_of(original_loss(work), predicted, len(held_out), work.outputs, new)
    macs_before, parameters_before = _costs(network)
    point = SweepPoint(
        budget=name,
        macs_before=macs_before,
        macs=macs,
        parameters_before=parameters_before,
        parameters=parameters,
        predicted_loss=predicted,
        agreement=quality,
        accuracy=both,
        file=name,
    )
    rows = () if plan is None else plan.layers
    return Compared(point, tuple(LayerChoice(row.name, row.family, row.sizes) for row in rows))


def _costs(network: Network) -> tuple[int, int]:
    """Sum up the MACs and the parameters of a network."""
    return sum(layer.macs for layer in network.layers), sum(layer.parameters for layer in network.layers)


def original_loss(work: Work) -> Loss:
    """How outputs of this network are compared."""
    return loss_kind(work.outputs, len(work.inputs.held_out), work.request.settings.loss)
