"""The report as data; JSON out and in. `report.text` and `report.html` print it."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from netdecouple import records
from netdecouple.convolution import ConvGeometry, Factorization
from netdecouple.errors import PlanError
from netdecouple.families.base import spreads_terms
from netdecouple.fitting.apply import Applied
from netdecouple.network import Array, Layer
from netdecouple.planning.divergence import agreement, divergence, divergences, log_probabilities
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.planning.solve import BudgetRow
from netdecouple.report.benchmark import Benchmark
from netdecouple.report.files import report_ending, write_text
from netdecouple.runtimes.timing import Timing

ROWS_PER_UNKNOWN = 10  # samples per unknown below which a layer's fit is called short of samples
DISAGREEMENTS = 8  # inputs that are shown, those whose outputs changed most


@dataclass(frozen=True)
class Stage:
    """One plain convolution of what a layer was, or is now."""

    kind: str  # "depthwise", "pointwise" or "convolution"
    reads: int  # channels of its input that it looks at
    n_i: int  # channels it takes, those that it takes more than once included
    n_o: int
    kernel: tuple[int, int]
    groups: int
    macs: int


@dataclass(frozen=True)
class LayerReport:
    """One layer, changed or kept and why. Errors are relative to the variance of the layer's output."""

    name: str
    operator: str
    shape: str  # n_i → n_o, kernel, and what else is not usual
    family: str
    reason: str
    sizes: tuple[int, ...]  # of every application of a family
    terms_per_channel: tuple[int, int] | None  # fewest and most, where the first stage has a choice
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    predicted_error: float | None
    measured_error: float | None  # on held-back inputs, in the decoupled network
    ridge: float | None
    samples: int | None
    samples_wanted: int | None
    inputs: int  # n_i / groups · k², of every group: what each of its outputs is made of
    dependent: int | None  # of these, over all groups, constant or combinations of others in all samples
    before: Stage | None = None  # None: it is no 2-D convolution
    stages: tuple[Stage, ...] = ()  # what it is now; empty if it is kept
    energy: tuple[float, ...] = ()  # of its weights, in the first 1, 2, … components of every slice


@dataclass(frozen=True)
class Agreement:
    """How the decoupled network's outputs compare with the original's, on inputs no fit has seen."""

    images: int
    loss: str  # "kl" (nats) or "relative" (squared error over variance)
    divergence: float
    predicted: float
    same_class: float | None  # share; None if the network is no classifier


def quality_of(plan: Plan, images: int, original: Sequence[Array], new: Sequence[Array]) -> Agreement:
    """Compare a decoupled network's outputs with the original's, as the plan that made it does."""
    is_classifier = plan.loss == "kl"
    measured = divergence(original, new, "kl" if is_classifier else "relative")
    same = agreement(original[0], new[0]) if is_classifier else None
    return Agreement(images, plan.loss, measured, plan.predicted_loss, same)


@dataclass(frozen=True)
class Speed:
    """What a network that was planned for a time takes. Shares are of the original's time."""

    place: str  # runtime, version and threads
    before: Timing
    after: Timing
    share: float  # measured: the median of the two networks' ratios
    foreseen: float  # by the times of the layers alone


@dataclass(frozen=True)
class Answer:
    """What a classifier says about one input."""

    chosen: int  # the class, counted from 0
    probability: float


@dataclass(frozen=True)
class Disagreement:
    """One held-back input on which the two networks differ."""

    sample: int  # its place in the calibration set, counted from 0
    divergence: float
    original: Answer | None  # None unless the network is a classifier
    new: Answer | None


def disagreements_of(
    plan: Plan, places: Sequence[int], original: Sequence[Array], new: Sequence[Array]
) -> tuple[Disagreement, ...]:
    """The held-back inputs whose outputs differ most, worst first; ``places`` are theirs in the whole set."""
    is_classifier = plan.loss == "kl"
    found = divergences(original, new, "kl" if is_classifier else "relative")
    if found is None or len(found) != len(places):  # outputs that are not one per input
        return ()
    answers = [_answers(outputs[0]) if is_classifier else [None] * len(found) for outputs in (original, new)]
    worst = np.argsort(-found, kind="stable")[:DISAGREEMENTS]
    return tuple(
        Disagreement(int(places[i]), float(found[i]), answers[0][i], answers[1][i])
        for i in worst
        if found[i] > 0
    )


def _answers(outputs: Array) -> list[Answer | None]:
    shares = np.exp(log_probabilities(outputs))
    return [Answer(int(row.argmax()), float(row.max())) for row in shares]


@dataclass(frozen=True)
class Provenance:
    """What it takes to know where a result comes from, and to make it again."""

    command: str  # empty where it was no command line
    python: str
    versions: tuple[tuple[str, str], ...]  # package, version
    machine: str
    threads: int  # that the process may use
    calibration: str  # where the inputs came from
    samples: int
    held_back: int
    seed: int
    method: str  # how it was fitted and planned
    model_hash: str  # of the operators and weights as read
    calibration_hash: str
    plan_hash: str


@dataclass(frozen=True)
class Report:
    """Everything there is to say about one run."""

    model: str
    netdecouple: str
    budget: str
    layers: tuple[LayerReport, ...]
    agreement: Agreement | None  # None without calibration images
    difference: float  # relative, between the saved network and the plan's own arithmetic
    accuracy: tuple[float, float] | None = None  # before, after; with --labels only
    speed: Speed | None = None  # with a budget in time only
    skipped: tuple[str, ...] = ()  # calibration files that could not be read
    bytes_before: int | None = None  # of the model's file; of a module's parameters and buffers
    bytes: int | None = None
    curve: tuple[
        BudgetRow, ...
    ] = ()  # what other budgets would cost and lose; empty where nothing was planned
    disagreements: tuple[Disagreement, ...] = ()
    provenance: Provenance | None = None
    benchmark: Benchmark | None = None  # the original first, then this one; only where it was asked for
    not_timed: tuple[str, ...] = ()  # what could not be timed, and why
    pictures: tuple[builtins.bytes, ...] = field(
        default=(), repr=False, compare=False
    )  # of the disagreements, PNG; never in JSON

    @property
    def macs_before(self) -> int:
        return sum(layer.macs_before for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters_before(self) -> int:
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def without_pictures(self) -> Report:
        """The same as far as it is kept in files: inputs are nobody else's business."""
        return replace(self, pictures=())

    def to_json(self) -> str:
        """The report as text, totals included, pictures left out."""
        data = {name: getattr(self, name) for name in TOTALS} | asdict(self.without_pictures)
        del data["pictures"]
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            PlanError: it is none, or of another version.
        """
        try:
            data = json.loads(text)
            rest = {name: value for name, value in data.items() if name not in TOTALS}
            return records.read(cls, rest | {"pictures": []})
        except (ValueError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"not a report of this version of netdecouple ({error}); make it again"
            ) from error

    def to_html(self) -> str:
        """The report as one self-contained page."""
        from netdecouple.report.html import report_html  # which prints what is defined here

        return report_html(self)

    def rendered(self, path: str | os.PathLike[str]) -> str:
        """What is to be written to a path that ends in .html or .json.

        Raises:
            OutputError: it ends in something else.
        """
        return self.to_html() if report_ending(path) == ".html" else self.to_json()

    def save(self, path: str | os.PathLike[str], timed: Callable[[], Report] | None = None) -> None:
        """Write the report as .html or .json, as the path ends, all of it or nothing.

        Args:
            path: where to.
            timed: gives the same report with times; a page that has none is written with these.

        Raises:
            OutputError: the ending is another one, or the place is not writable.
        """
        wants = report_ending(path) == ".html" and not (self.benchmark or self.not_timed)
        report = self if timed is None or not wants else timed()
        write_text(path, report.rendered(path))


TOTALS = ("macs_before", "macs", "parameters_before", "parameters")


@dataclass(frozen=True)
class Score:
    """Accuracy of one network, and how it compares with the first one."""

    model: str
    images: int
    top1: float
    top5: float | None  # None with five classes or fewer
    same_class: float | None  # as the first network; None for the first itself
    kl: float | None  # from the first network, nats


def describe(layer: Layer) -> str:
    """A layer's shape in a few characters: 64→128 3×3 @28, with a stride 64→128 3×3 /2 @56, or just 64→10."""
    g = layer.geometry
    if g is None:
        return ""
    if g.is_pointwise and g.groups == 1 and layer.size == (1, 1):
        return f"{g.n_i}→{g.n_o}"
    parts = [f"{g.n_i}→{g.n_o}", f"{g.kh}×{g.kw}"]
    if g.strides != (1, 1):
        parts.append("/" + "×".join(map(str, dict.fromkeys(g.strides))))
    if g.dilations != (1, 1):
        parts.append("dilated " + "×".join(map(str, dict.fromkeys(g.dilations))))
    if g.groups > 1:
        parts.append(f"{g.groups} groups")
    parts.append("@" + "×".join(map(str, dict.fromkeys(layer.size))))
    return " ".join(parts)


def stages_of(layer: Layer, factorization: Factorization) -> tuple[Stage, ...]:
    """What stands in the place of a layer, stage by stage."""
    size, found = layer.size, []
    for stage in factorization.stages:
        reads = stage.geometry.n_i if stage.channels is None else len(np.unique(stage.channels))
        found.append(_stage(stage.geometry, size, reads, layer.maps))
        size = stage.geometry.output_size(*size)
    return tuple(found)


def _stage(g: ConvGeometry, size: tuple[int, int], reads: int, maps: float) -> Stage:
    kind = "pointwise" if g.is_pointwise else "depthwise" if g.groups == g.n_i > 1 else "convolution"
    return Stage(kind, reads, g.n_i, g.n_o, (g.kh, g.kw), g.groups, round(g.macs(*size) * maps))


def layer_report(
    layer: Layer, row: LayerPlan, applied: Applied, costs: tuple[int, int], energy: Sequence[float] = ()
) -> LayerReport:
    """Put what was planned for a layer and what came of it together; ``costs`` are MACs and parameters."""
    samples = applied.samples.get(row.name)
    g = layer.geometry
    unknowns = 0 if g is None else g.unknowns
    return LayerReport(
        row.name,
        row.operator,
        describe(layer),
        row.family,
        row.reason,
        row.sizes,
        _terms_per_channel(layer, row),
        row.macs_before,
        costs[0],
        row.parameters_before,
        costs[1],
        row.predicted_error if row.changed else None,
        applied.errors.get(row.name),
        row.ridge or None,
        samples,
        ROWS_PER_UNKNOWN * unknowns if samples is not None else None,
        0 if g is None else g.groups * unknowns,
        applied.dependent.get(row.name),
        None if g is None else _stage(g, layer.size, g.n_i, layer.maps),
        stages_of(layer, applied.factorizations[row.name]) if row.name in applied.factorizations else (),
        tuple(round(float(share), 6) for share in energy),
    )


def _terms_per_channel(layer: Layer, row: LayerPlan) -> tuple[int, int] | None:
    if not spreads_terms(row.family) or not row.channels or layer.geometry is None:
        return None
    counts = np.bincount(row.channels[0], minlength=layer.geometry.n_i)
    return int(counts.min()), int(counts.max())


def layer_reports(
    layers: Mapping[str, Layer],
    applied: Applied,
    written: Iterable[Layer],
    energies: Mapping[str, Array] | None = None,
) -> tuple[LayerReport, ...]:
    """Report on every layer of a plan, in its order, with the costs of what was ``written`` for it.

    That can be less than was planned: filters go whose outputs nobody reads any more. ``energies`` are
    cumulative shares of the weights' energy by T.
    """
    energies = energies or {}
    costs = {name: [0, 0] for name in layers}
    for part in written:
        name = max((n for n in layers if f"{part.name}/".startswith(f"{n}/")), key=len)
        costs[name][0] += part.macs
        costs[name][1] += part.parameters
    return tuple(
        layer_report(
            layers[row.name],
            row,
            applied,
            (costs[row.name][0], costs[row.name][1]),
            energies.get(row.name, np.zeros(0)).tolist(),
        )
        for row in applied.plan.layers
    )
