"""A sweep as data: one network at several budgets, the networks it is compared with, and the knee."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from netdecouple.planning import tradeoff
from netdecouple.planning.plan import Plan
from netdecouple.report.report import Agreement, Report
from netdecouple.version import __version__


@dataclass(frozen=True)
class SweepPoint:
    """One network on the curve: what it costs and what it loses. It is a budget's, or one compared with."""

    budget: str  # as the plan says it: "50% MACs"; a compared network's file
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    predicted_loss: float  # 0 where nothing was predicted
    agreement: Agreement | None  # with the original on held-back inputs; None without calibration images
    accuracy: tuple[float, float] | None  # before, after; with labels only
    file: str | None  # where the network is; None if it was not kept

    @classmethod
    def of(cls, report: Report, plan: Plan, file: str | None) -> SweepPoint:
        """Take from a run's report what the curve needs."""
        return cls(
            report.budget,
            report.macs_before,
            report.macs,
            report.parameters_before,
            report.parameters,
            plan.predicted_loss,
            report.agreement,
            report.accuracy,
            file,
        )


@dataclass(frozen=True)
class LayerChoice:
    """What an earlier run did to one layer."""

    layer: str
    family: str  # "kept" if nothing
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join([self.family, *map(str, self.sizes)])


@dataclass(frozen=True)
class Compared:
    """The result of an earlier run, put beside the sweep; its layers are told by the plan in its metadata."""

    point: SweepPoint
    layers: tuple[LayerChoice, ...]  # empty if the file holds no plan


@dataclass(frozen=True)
class Sweep:
    """A trade-off curve: points in the order of the budgets, most MACs first."""

    model: str
    netdecouple: str
    loss: str  # "kl" (nats) or "relative" (squared error over variance)
    points: tuple[SweepPoint, ...]
    knee: int | None  # the point that is recommended; None if the curve has none
    compared: tuple[Compared, ...] = ()

    @classmethod
    def of(
        cls, model: str, loss: str, points: Sequence[SweepPoint], compared: Sequence[Compared] = ()
    ) -> Sweep:
        """Put the curve together and find its knee."""
        knee = tradeoff.knee([p.macs_before / p.macs for p in points], losses_of(points))
        return cls(model, __version__, loss, tuple(points), knee, tuple(compared))

    def side_by_side(self) -> dict[str, list[LayerChoice | None]]:
        """By layer, what the plans of compared networks did to it; ``None``: a plan has no such layer."""
        choices = [{c.layer: c for c in compared.layers} for compared in self.compared if compared.layers]
        return {
            name: [own.get(name) for own in choices] for name in dict.fromkeys(n for c in choices for n in c)
        }

    def to_json(self) -> str:
        """The sweep as text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """One line per point, compared networks last."""
        text = io.StringIO()
        rows = [(p, i == self.knee) for i, p in enumerate(self.points)]
        rows += [(c.point, False) for c in self.compared]
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_csv_row(point, at_knee) for point, at_knee in rows)
        return text.getvalue()


COLUMNS = (
    "budget",
    "macs_before",
    "macs",
    "parameters_before",
    "parameters",
    "predicted_loss",
    "loss",
    "divergence",
    "same_class",
    "images",
    "accuracy_before",
    "accuracy",
    "file",
    "knee",
)


def _csv_row(point: SweepPoint, at_knee: bool) -> dict[str, object]:
    a = point.agreement
    before, after = point.accuracy or (None, None)
    return {
        "budget": point.budget,
        "macs_before": point.macs_before,
        "macs": point.macs,
        "parameters_before": point.parameters_before,
        "parameters": point.parameters,
        "predicted_loss": point.predicted_loss,
        "loss": None if a is None else a.loss,
        "divergence": None if a is None else a.divergence,
        "same_class": None if a is None else a.same_class,
        "images": None if a is None else a.images,
        "accuracy_before": before,
        "accuracy": after,
        "file": point.file,
        "knee": int(at_knee),
    }


def losses_of(points: Sequence[SweepPoint]) -> list[float]:
    """What every point loses: measured on held-back inputs, or predicted where nothing was measured."""
    measured = [p.agreement.divergence for p in points if p.agreement is not None]
    return measured if len(measured) == len(points) else [p.predicted_loss for p in points]


def is_flat(points: Sequence[SweepPoint]) -> bool:
    """Whether no point loses anything that shows."""
    return tradeoff.is_flat(losses_of(points))
