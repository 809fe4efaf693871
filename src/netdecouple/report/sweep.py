"""A sweep as data: one network at several budgets, the networks it is compared with, and the knee."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass

from netdecouple.report.report import Agreement


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


@dataclass(frozen=True)
class LayerChoice:
    """What an earlier run did to one layer."""

    layer: str
    family: str  # "kept" if nothing
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Compared:
    """The result of an earlier run, put beside the sweep; the layers are those of the plan in its metadata."""

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
