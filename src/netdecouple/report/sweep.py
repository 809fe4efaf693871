"""A sweep as data: one network at several budgets, the networks it is compared with, and the knee."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from netdecouple.planning import tradeoff
from netdecouple.planning.plan import Plan
from netdecouple.report.model import Agreement, Report
from netdecouple.version import __version__


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """The costs and the loss of one network on the curve, or of a network that the curve is compared with."""

    budget: str  # as in the plan: "50% MACs"; the file of a compared network
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    predicted_loss: float  # 0 where nothing was predicted
    agreement: Agreement | None  # with the original on held-out inputs; None without calibration images
    accuracy: tuple[float, float] | None  # before, after; with labels only
    file: str | None  # the written network; None if it was not written

    @classmethod
    def of(cls, report: Report, plan: Plan, file: str | None) -> SweepPoint:
        """Return the point of one run."""
        return cls(
            budget=report.budget,
            macs_before=report.macs_before,
            macs=report.macs,
            parameters_before=report.parameters_before,
            parameters=report.parameters,
            predicted_loss=plan.predicted_loss,
            agreement=report.agreement,
            accuracy=report.accuracy,
            file=file,
        )


@dataclass(frozen=True)
class LayerChoice:
    """The family and sizes that an earlier run chose for one layer."""

    layer: str
    family: str  # "kept" if the layer is not changed
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join([self.family, *map(str, self.sizes)])


@dataclass(frozen=True)
class Compared:
    """The result of an earlier run, shown next to the sweep; its layers come from the plan in its file."""

    point: SweepPoint
    layers: tuple[LayerChoice, ...]  # empty if the file holds no plan


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A trade-off curve: points in the order of the budgets, most MACs first."""

    model: str
    netdecouple: str
    loss: str  # as in `report.model.Agreement`
    points: tuple[SweepPoint, ...]
    knee: int | None  # index of the recommended point; None if the curve has no knee
    compared: tuple[Compared, ...] = ()

    @classmethod
    def of(
        cls, model: str, loss: str, points: Sequence[SweepPoint], compared: Sequence[Compared] = ()
    ) -> Sweep:
        """Build the curve and find its knee."""
        return cls(
            model=model,
            netdecouple=__version__,
            loss=loss,
            points=tuple(points),
            knee=tradeoff.knee([p.macs_before / p.macs for p in points], losses_of(points)),
            compared=tuple(compared),
        )

    @property
    def best(self) -> SweepPoint | None:
        """The recommended point, at the knee."""
        return None if self.knee is None else self.points[self.knee]

    @property
    def networks(self) -> tuple[SweepPoint, ...]:
        """All points, those of compared networks last."""
        return (*self.points, *(compared.point for compared in self.compared))

    @property
    def has_classes(self) -> bool:
        return any(p.agreement is not None and p.agreement.same_class is not None for p in self.networks)

    @property
    def has_accuracy(self) -> bool:
        return any(p.accuracy is not None for p in self.networks)

    @property
    def is_flat(self) -> bool:
        """Whether no point has a noticeable loss."""
        return tradeoff.is_flat(losses_of(self.points))

    def side_by_side(self) -> dict[str, list[LayerChoice | None]]:
        """Return every layer's choice in each compared network's plan; None if a plan has no such layer."""
        plans = [{c.layer: c for c in compared.layers} for compared in self.compared if compared.layers]
        names = dict.fromkeys(name for plan in plans for name in plan)
        return {name: [plan.get(name) for plan in plans] for name in names}

    def to_json(self) -> str:
        """Return the sweep as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """Return one line of CSV per point, compared networks last."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(_csv_row(point, point is self.best) for point in self.networks)
        return text.getvalue()


COLUMNS = (
    "budget", "macs_before", "macs", "parameters_before", "parameters", "predicted_loss", "loss",
    "divergence", "same_class", "images", "accuracy_before", "accuracy", "file", "knee",
)  # fmt: skip


def _csv_row(point: SweepPoint, at_knee: bool) -> dict[str, object]:
    before, after = point.accuracy or (None, None)
    agreement = {} if point.agreement is None else vars(point.agreement)
    return vars(point) | agreement | {"accuracy_before": before, "accuracy": after, "knee": int(at_knee)}


def losses_of(points: Sequence[SweepPoint]) -> list[float]:
    """Return the points' losses: measured on held-out inputs, or predicted if one was not measured."""
    measured = [p.agreement.divergence for p in points if p.agreement is not None]
    return measured if len(measured) == len(points) else [p.predicted_loss for p in points]
