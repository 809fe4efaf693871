"""The report as data; JSON out. `report.text` prints it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from netdecouple.application import Applied
from netdecouple.frontends import Array, Layer
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.planning.sensitivity import agreement, divergence
from netdecouple.runtimes.timing import Timing

ROWS_PER_UNKNOWN = 10  # samples per unknown below which a layer's fit is called short of samples


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

    def to_json(self) -> str:
        """The report as text, totals included."""
        totals = {
            "macs_before": self.macs_before,
            "macs": self.macs,
            "parameters_before": self.parameters_before,
            "parameters": self.parameters,
        }
        return json.dumps(totals | asdict(self), indent=1, ensure_ascii=False) + "\n"


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


def layer_report(layer: Layer, row: LayerPlan, applied: Applied, costs: tuple[int, int]) -> LayerReport:
    """Put what was planned for a layer and what came of it together; ``costs`` are MACs and parameters."""
    samples = applied.samples.get(row.name)
    g = layer.geometry
    unknowns = 0 if g is None else g.n_i // g.groups * g.kh * g.kw
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
    )


def _terms_per_channel(layer: Layer, row: LayerPlan) -> tuple[int, int] | None:
    if row.family != "nd-dp" or not row.channels or layer.geometry is None:
        return None
    counts = np.bincount(row.channels[0], minlength=layer.geometry.n_i)
    return int(counts.min()), int(counts.max())


def layer_reports(
    layers: Mapping[str, Layer], applied: Applied, written: Iterable[Layer]
) -> tuple[LayerReport, ...]:
    """Report on every layer of a plan, in its order, with the costs of what was ``written`` for it.

    That can be less than was planned: filters go whose outputs nobody reads any more.
    """
    costs = {name: [0, 0] for name in layers}
    for part in written:
        name = max((n for n in layers if f"{part.name}/".startswith(f"{n}/")), key=len)
        costs[name][0] += part.macs
        costs[name][1] += part.parameters
    return tuple(
        layer_report(layers[row.name], row, applied, (costs[row.name][0], costs[row.name][1]))
        for row in applied.plan.layers
    )
