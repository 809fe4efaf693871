"""The front door for sweeps of ONNX models: one analysis, many budgets, what each costs and loses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from netdecouple import api
from netdecouple.api import Calibration, Judge
from netdecouple.data.calibration import Preprocessing
from netdecouple.errors import BudgetError, ModelError, OutputError, PlanError
from netdecouple.execution.run import Resources
from netdecouple.execution.scratch import check_writable
from netdecouple.fitting.apply import apply
from netdecouple.fitting.sequential import targets_for
from netdecouple.frontends.onnx.model import ModelSource, load, read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.analysis import Progress, Settings, analyze, quiet
from netdecouple.planning.cost import Budget, Macs, parse_share
from netdecouple.planning.divergence import Loss, agreement, divergence, loss_kind
from netdecouple.planning.plan import Plan
from netdecouple.planning.solve import plan_within
from netdecouple.report.provenance import identity
from netdecouple.report.report import Agreement
from netdecouple.report.sweep import Compared, LayerChoice, Sweep, SweepPoint
from netdecouple.runtimes.onnxfile import size_of

Show = Callable[[SweepPoint], None]


def unseen(point: SweepPoint) -> None:
    """Show nobody a point."""


def sweep(
    model: ModelSource,
    calib: Calibration | None = None,
    macs: str | float | Iterable[str | float] = (),
    *,
    compare: Sequence[ModelSource] = (),
    labels: str | os.PathLike[str] | None = None,
    settings: Settings = Settings(),
    emit: str = "standard",
    preprocessing: Preprocessing = Preprocessing(),
    samples: int | None = api.SAMPLES,
    output: str | os.PathLike[str] | None = None,
    resources: Resources = Resources(),
    progress: Progress = quiet,
    show: Show = unseen,
) -> Sweep:
    """Decouple an ONNX model to several budgets at little more than the price of one.

    The network is analysed once. What a budget gives is, byte for byte, what `decouple` gives for it alone.
    Arguments that are not explained here are those of `api.decouple`.

    Args:
        macs: the budgets: "80%,60%,2x" or (0.8, 0.6, 0.5).
        compare: results of earlier runs, to be judged on the same inputs. With them ``macs`` may be left out.
        labels: FILE.npz:IMAGES,LABELS, to measure top-1 accuracy on.
        output: a folder to write every network into, as soon as it is there; else only figures are kept.
        progress: called with a step's name, what is done and what there is to do.
        show: called with every point of the curve as soon as it is known.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    budgets = budgets_in(macs)
    check_rule(settings)
    if not budgets and not compare:
        raise BudgetError("give budgets to sweep over (--macs 80%,60%,50%), or networks to --compare")
    form = api.first_form(api.place_for(emit, None, 1))
    opened = read_model(model)
    api.check_emit(opened, emit)
    files = None if output is None else Files(Path(output), _stem(model), ".onnx")
    if files is not None:
        files.check(budgets, (model, *compare))
    others = [(source, read_model(source)) for source in compare]
    images = api.load_images(opened, calib, preprocessing, samples, settings)
    labelled = None if labels is None else api.load_labelled(opened, labels, preprocessing, settings.seed)
    resources = resources.beside(size_of(opened.proto), images.images.nbytes)
    network = OnnxNetwork(opened, images.images, resources)
    api.check_classifier(network, labelled)
    inputs, images = api.split(images, settings.seed)
    judge = Judge(network, inputs, images, labelled, calib is not None)
    loss = loss_kind(judge.original, len(inputs.held_back), settings.loss)
    compared = []
    for source, other in others:
        compared.append(_compared(judge, source, OnnxNetwork(other, images.images), loss))
        show(compared[-1].point)
    points = []
    if budgets:
        with resources.opened(identity(network, inputs, settings, "onnxruntime")) as own:
            network.resources = own
            analysis = analyze(network, inputs, settings, progress, own)
            plans = [plan_within(analysis, [budget], form) for budget in budgets]
            targets = targets_for(network, inputs, plans, progress, own)
            for budget, plan in zip(budgets, plans, strict=True):
                applied = apply(network, inputs, plan, named_after(budget, progress), targets, own)
                result = judge.result(applied)
                file = None if files is None else files.save(budget, result.save)
                points.append(SweepPoint.of(result.report, result.plan, file))
                show(points[-1])
    return Sweep.of(opened.origin, loss, points, compared)


def budgets_in(macs: str | float | Iterable[str | float]) -> list[Budget]:
    """The budgets of a sweep, most MACs first, each once: they are told by four digits, in files' names too.

    Raises:
        BudgetError: one of them is none.
    """
    if not isinstance(macs, Iterable):
        macs = [macs]
    parts = filter(None, macs.split(",")) if isinstance(macs, str) else macs
    found = [Budget(Macs(), share) for share in sorted(map(parse_share, parts), reverse=True)]
    return list({_percent(budget): budget for budget in found}.values())


def check_rule(settings: Settings) -> None:
    """Refuse a rule, which leaves no choice that could meet budgets.

    Raises:
        BudgetError: there is one.
    """
    if settings.rule is not None:
        raise BudgetError("a sweep is over budgets; give no rule in the settings, or decouple by it")


def named_after(budget: Budget, progress: Progress) -> Progress:
    """Say in every step's name which budget it is for."""
    return lambda step, done, total: progress(f"{step} {_percent(budget)}%", done, total)


def _percent(budget: Budget) -> str:
    return f"{100 * budget.share:.4g}"


class Files:
    """Where the networks of a sweep go: a folder that is made when there is something to put into it.

    Raises:
        OutputError: nothing can be written there; that is found out before any work.
    """

    def __init__(self, folder: Path, stem: str, suffix: str) -> None:
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise OutputError(
                f"{folder}: is a file; give the name of a folder, which gets one network per budget"
            )
        check_writable((folder if os.path.isdir(folder) else folder.resolve().parent) / f"{stem}{suffix}")
        self._folder, self._stem, self._suffix = folder, stem, suffix

    def check(self, budgets: Sequence[Budget], sources: Sequence[ModelSource]) -> None:
        """Refuse to write what the networks are read from.

        Raises:
            OutputError: one of the files is one of the ``sources``.
        """
        read = [
            source for source in sources if isinstance(source, str | os.PathLike) and os.path.exists(source)
        ]
        for path in map(self.of, budgets):
            if os.path.exists(path) and any(path.samefile(source) for source in read):
                raise OutputError(
                    f"{path}: is an input, and inputs are never overwritten; choose another folder"
                )

    def of(self, budget: Budget) -> Path:
        """The file, or folder, of one budget."""
        return self._folder / f"{self._stem}-macs{_percent(budget)}{self._suffix}"

    def save(self, budget: Budget, write: Callable[[Path], None]) -> str:
        """Write one budget's network, and tell where it is."""
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self._folder}: cannot make the folder ({error.strerror})") from error
        write(self.of(budget))
        return str(self.of(budget))


def _stem(model: ModelSource) -> str:
    return (
        Path(model).stem
        if isinstance(model, str | os.PathLike)
        else model.graph.name.replace("/", "_") or "model"
    )


def _compared(judge: Judge, source: ModelSource, other: OnnxNetwork, loss: Loss) -> Compared:
    """Judge the result of an earlier run by the original's outputs.

    Raises:
        ModelError: it takes other inputs than the original, or makes other outputs.
    """
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else other.model.origin
    network, shown = judge.network, judge.inputs.held_back
    try:
        new = other.run(shown)
    except ModelError as error:
        raise ModelError(
            f"{name}: {error}; compare networks that were made of {network.model.origin}"
        ) from error
    shapes = [[o.shape for o in outputs] for outputs in (judge.original, new)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"{name}: its outputs are {shapes[1]} and those of {network.model.origin} {shapes[0]}; "
            f"compare networks that were made of it"
        )
    plan = _plan_in(source)
    predicted = 0.0 if plan is None else plan.predicted_loss
    quality = None
    if judge.is_calibrated:
        same = agreement(judge.original[0], new[0]) if loss == "kl" else None
        quality = Agreement(len(shown), loss, divergence(judge.original, new, loss), predicted, same)
    both = None
    if judge.labelled is not None:
        pictures, labels = judge.labelled
        both = judge.original_accuracy, api.accuracy(other.run(pictures)[0], labels)
    macs_before, macs = (sum(la.macs for la in net.layers) for net in (network, other))
    parameters_before, parameters = (sum(la.parameters for la in net.layers) for net in (network, other))
    point = SweepPoint(name, macs_before, macs, parameters_before, parameters, predicted, quality, both, name)
    rows = () if plan is None else plan.layers
    return Compared(point, tuple(LayerChoice(row.name, row.family, row.sizes) for row in rows))


def _plan_in(source: ModelSource) -> Plan | None:
    """The plan that a network was made by, if it says so, and in a way that is still understood."""
    found = {entry.key: entry.value for entry in load(source)[0].metadata_props}
    try:
        return Plan.from_json(found["netdecouple.plan"])
    except (KeyError, PlanError):
        return None
