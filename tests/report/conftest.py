"""Reports of real runs, small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from netdecouple import api
from netdecouple.report.model import Report
from netdecouple.report.sweep import Compared, Sweep, SweepPoint
from tests import networks

HOSTILE = "</title><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>\"'&.onnx"


def hostile(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with layers whose names are markup."""
    for index, node in enumerate(model.graph.node):
        if node.op_type in ("Conv", "Gemm"):
            node.name = f"/{index}/{HOSTILE}"
    return model


def pictures(count: int = 24) -> np.ndarray:
    return np.random.default_rng(0).random((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="session")
def result() -> api.Result:
    """A classifier at half its MACs, timed."""
    return api.decouple(hostile(networks.classifier()), pictures(), macs=0.5).timed(
        threads=(1, 2), seconds=0.02
    )


@pytest.fixture(scope="session")
def full_report(result: api.Result) -> Report:
    """Its report, whose every name is markup, with everything that a report may hold."""
    report = replace(
        result.report, model=HOSTILE, accuracy=(0.915, 0.905), skipped=(f"{HOSTILE}.png",), left_out=HOSTILE
    )
    assert report.provenance is not None
    provenance = replace(report.provenance, command=f"netdecouple run '{HOSTILE}'", calibration=HOSTILE)
    return replace(report, provenance=provenance, not_timed=(f"openvino: {HOSTILE} cannot be opened",))


@pytest.fixture(scope="session")
def sweep(full_report: Report) -> Sweep:
    """Three budgets, the second at the knee, and an earlier result."""
    a = full_report.agreement
    assert a is not None

    def point(budget: str, share: float, loss: float, accuracy: tuple[float, float] | None) -> SweepPoint:
        costs = [int(share * n) for n in (full_report.macs_before, full_report.parameters_before)]
        kept = replace(a, divergence=loss, predicted=0.8 * loss)
        return SweepPoint(
            budget=budget,
            macs_before=full_report.macs_before,
            macs=costs[0],
            parameters_before=full_report.parameters_before,
            parameters=costs[1],
            predicted_loss=0.8 * loss,
            agreement=kept,
            accuracy=accuracy,
            file=None,
        )

    points = (
        point("66.7% MACs", 0.66, 0.001, (0.9, 0.9)),
        replace(point("50% MACs", 0.5, 0.003, None), file=HOSTILE),
        point("25% MACs", 0.25, 0.4, None),
    )
    return Sweep(
        model=HOSTILE,
        netdecouple=full_report.netdecouple,
        loss=a.loss,
        points=points,
        knee=1,
        compared=(Compared(point(HOSTILE, 0.4, 0.2, None), ()),),
    )


@pytest.fixture(scope="session")
def write_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write pages into files of their own."""

    def write(text: str) -> Path:
        path = tmp_path_factory.mktemp("page") / "page.html"
        path.write_text(text, encoding="utf-8")
        return path

    return write
