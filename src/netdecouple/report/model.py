"""The report as data; JSON out and in.

`report.build` computes its parts; `report.text` and `report.html` print it.
"""

from __future__ import annotations

import builtins
import json
from dataclasses import asdict, dataclass, field, replace

from netdecouple import records
from netdecouple.errors import PlanError
from netdecouple.fitting.apply import Refinement
from netdecouple.planning.planner import BudgetRow
from netdecouple.planning.tolerance import Promise
from netdecouple.runtimes.benchmark import Benchmark, TimedModel


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One plain convolution of a layer, before or after it is changed."""

    kind: str  # "depthwise", "pointwise" or "convolution"
    reads: int  # distinct channels of the layer's input or of the stage before that it uses
    n_i: int  # channels it takes; a channel that it takes twice counts twice
    n_o: int
    kernel: tuple[int, int]
    groups: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer, changed or kept and why. Errors are relative to the variance of the layer's output."""

    name: str
    operator: str
    shape: str  # n_i → n_o, kernel, and what else is not usual
    family: str  # "kept" if it is not changed
    reason: str  # why it is kept; else empty
    sizes: tuple[int, ...]  # of every application of a family
    terms_per_channel: tuple[int, int] | None  # fewest and most, where the first stage has a choice
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    predicted_error: float | None
    measured_error: float | None  # on held-out inputs, in the decoupled network
    ridge: float | None
    samples: int | None  # that it was fitted to; None if it was computed from the weights alone
    samples_wanted: int | None
    inputs: int  # columns of its patches x: n_i · k²
    dependent: int | None  # of these, constant or linear combinations of others in all samples
    before: Stage | None = None  # None if it is not a 2-D convolution
    stages: tuple[Stage, ...] = ()  # its new convolutions; empty if it is kept
    energy: tuple[float, ...] = ()  # of its weights, in the first 1, 2, … components of every slice

    @property
    def changed(self) -> bool:
        return self.family != "kept"

    @property
    def lacks_samples(self) -> bool:
        """Whether the layer was fitted to fewer samples than wanted."""
        return self.samples is not None and self.samples < (self.samples_wanted or 0)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the decoupled network's outputs compare with the original's, on inputs that no fit has used."""

    images: int
    loss: str  # "kl" (nats), "relative" (squared error over variance), "boxes" (see `Layout.weights`)
    divergence: float
    predicted: float
    same_class: float | None  # share of inputs; None if the network is not a classifier
    boxes: int | None = None  # that the original finds; None if the outputs are not a detector's
    boxes_found: float | None = None  # the share of them that is found again
    psnr: float | None = None  # dB, for the range of the original's outputs; None if these are no pictures
    same_text: float | None = None  # share of inputs that are read alike; None if this is no CTC reader

    @property
    def changed_classes(self) -> int | None:
        """How many inputs get another class."""
        return None if self.same_class is None else round((1 - self.same_class) * self.images)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The time of a network that was planned for a latency. Shares are of the original's time."""

    place: str  # runtime, version and threads
    before: float  # milliseconds
    after: float
    share: float  # measured
    foreseen: float  # predicted: the sum of the layers' times


@dataclass(frozen=True)
class Answer:
    """The most probable class that a classifier returns for one input."""

    chosen: int  # the class, counted from 0
    probability: float


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """One held-out input for which the two networks' outputs differ."""

    sample: int  # its position in the calibration set, counted from 0
    divergence: float
    original: Answer | None  # None unless the network is a classifier
    new: Answer | None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a result: everything that is needed to produce it again."""

    command: str  # empty if the run was started from Python
    python: str
    versions: tuple[tuple[str, str], ...]  # package, version
    machine: str
    threads: int  # that the process may use
    calibration: str  # source of the inputs
    samples: int
    held_back: int
    seed: int
    method: str  # how it was fitted and planned
    model_hash: str  # of the operators and weights as read
    calibration_hash: str
    plan_hash: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of one run: what was gained, what was lost, and how each layer was changed."""

    model: str
    netdecouple: str  # version
    budget: str
    layers: tuple[LayerReport, ...]
    agreement: Agreement | None  # None without calibration images
    difference: float  # relative, between the outputs of the written network and of the fitted layers
    promise: Promise | None = None  # None if no limit was asked for
    refinement: Refinement | None = None  # None if the layers were not trained together
    warnings: tuple[str, ...] = ()  # of outputs that have changed a lot
    accuracy: tuple[float, float] | None = None  # top-1 before, after; None without labels
    speed: Speed | None = None  # None unless the budget is a latency
    left_out: str = ""  # what no output needs: neither network is counted with it
    skipped: tuple[str, ...] = ()  # calibration files that could not be read
    bytes_before: int | None = None  # of the model's file; of a module's parameters and buffers
    bytes: int | None = None
    curve: tuple[BudgetRow, ...] = ()  # costs and predicted losses of other budgets; empty without a planner
    disagreements: tuple[Disagreement, ...] = ()
    provenance: Provenance | None = None
    benchmark: Benchmark | None = None  # the original first, then the new network; None if not timed
    not_timed: tuple[str, ...] = ()  # what could not be timed, and why
    # of the disagreements, PNG; never in JSON
    pictures: tuple[builtins.bytes, ...] = field(default=(), repr=False, compare=False)

    @property
    def headline(self) -> tuple[TimedModel, TimedModel] | None:
        """The times that are quoted first: the original's and the new network's; None if they are unknown."""
        return self.benchmark.headline if self.benchmark else None

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
        """A copy without the input pictures, which saved reports omit for privacy."""
        return replace(self, pictures=())

    def to_json(self) -> str:
        """Return the report as JSON text, totals included, pictures omitted."""
        data = {name: getattr(self, name) for name in TOTALS} | asdict(self.without_pictures)
        del data["pictures"]
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            PlanError: the text is not a report, or a report of another version.
        """
        try:
            data = json.loads(text)
            rest = {name: value for name, value in data.items() if name not in TOTALS}
            return records.read(cls, rest | {"pictures": []})
        except (ValueError, AttributeError, RecursionError) as error:
            message = f"not a report of this version of netdecouple ({error}); make it again"
            raise PlanError(message) from error


TOTALS = ("macs_before", "macs", "parameters_before", "parameters")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy or PSNR of one network, and its agreement with the first network of the same evaluation."""

    model: str
    images: int
    top1: float | None = None  # None where images are evaluated
    top5: float | None = None  # None with five classes or fewer
    same_class: float | None = None  # share of images; None for the first network
    kl: float | None = None  # divergence from the first network, nats; None for the first network
    majority: float | None = None  # share of the most frequent label: the accuracy of one answer for all
    psnr: float | None = None  # dB, the mean of all images; None where classes are evaluated
    psnr_to_first: float | None = None  # between its outputs and those of the first network
    same_text: float | None = None  # share of images that a CTC reader and the first network read alike
