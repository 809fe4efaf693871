"""Layout of the charts on a page: scales, ticks and shapes in pixels. The templates draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10, sqrt

import numpy as np

from netdecouple.network import Array
from netdecouple.report.formatting import by, count
from netdecouple.report.model import LayerReport, Stage

SPEEDUPS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100)
BETWEEN = (1.25, 2.5, 4, 7, 15, 30)  # omitted if there are more than seven ticks
ROOM = 84  # width of a label
CROWDED = 70, 15  # of marks nearer than this, across and up, only the first has its label


@dataclass(frozen=True)
class Point:
    """A point in a chart, in its units or in pixels; ``kind`` is its class in the style sheet."""

    x: float
    y: float
    label: str
    kind: str
    side: str = "start"  # text-anchor of its label: "start" is right of the point, "end" left


@dataclass(frozen=True)
class Series:
    """Points joined by a line."""

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A plot over times fewer MACs, in pixels; both axes are logarithmic."""

    title: str
    description: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[tuple[str, str], ...]  # kind, path
    marks: tuple[Point, ...]
    width: int = 440
    height: int = 290
    left: int = 52
    right: int = 424
    top: int = 14
    bottom: int = 244


def plot(
    title: str, description: str, y_title: str, series: Sequence[Series], points: Sequence[Point]
) -> Chart | None:
    """Lay out a plot of positive numbers over times fewer MACs; None if it would be empty."""
    everything = [p for line in series for p in line.points] + [(p.x, p.y) for p in points]
    positive = [y for _, y in everything if y > 0]
    if len(everything) < 2 or not positive:
        return None
    floor_y = min(positive)  # a loss of 0 is drawn here
    low, high = _decades(floor_y, max(positive))
    last = 1.04 * max(1.3, *(x for x, _ in everything))
    left, right, top, bottom = Chart.left, Chart.right, Chart.top, Chart.bottom

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = log10(x) / log10(last), (log10(max(y, floor_y)) - low) / (high - low)
        return round(left + across * (right - left), 1), round(bottom - up * (bottom - top), 1)

    marks: list[Point] = []
    for point in points:
        x, y = place(point.x, point.y)
        near = any(m.label and abs(m.x - x) < CROWDED[0] and abs(m.y - y) < CROWDED[1] for m in marks)
        side = "end" if x > left + ROOM else "start"  # curves rise: there is room above to the left
        marks.append(Point(x, y, "" if near else point.label, point.kind, side))
    marks.sort(key=lambda mark: mark.kind == "run")  # drawn last, above all others
    paths = [" L".join("{} {}".format(*place(x, y)) for x, y in line.points) for line in series]
    lines = tuple((line.kind, f"M{path}") for line, path in zip(series, paths, strict=True) if path)
    shown = [x for x in SPEEDUPS if x <= last]
    shown = shown if len(shown) <= 7 else [x for x in shown if x not in BETWEEN]
    x_ticks = tuple(Tick(place(x, floor_y)[0], f"{x:g}×") for x in shown)
    y_ticks = tuple(Tick(place(1, y)[1], f"{y:g}") for y in _log_ticks(low, high))
    return Chart(title, description, y_title, x_ticks, y_ticks, lines, tuple(marks))


def _decades(low: float, high: float) -> tuple[float, float]:
    """Return the ends of a logarithmic axis, with a margin, at least one decade apart."""
    middle, half = (log10(low) + log10(high)) / 2, (log10(high) - log10(low)) / 2 + 0.08
    return middle - max(half, 0.5), middle + max(half, 0.5)


def _log_ticks(low: float, high: float) -> list[float]:
    digits = (1, 2, 5) if high - low < 2.2 else (1,)
    ticks = [d * 10.0**e for e in range(floor(low), ceil(high) + 1) for d in digits]
    return [y for y in ticks if low <= log10(y) <= high]


@dataclass(frozen=True)
class Bar:
    """The channels between two stages; the height stands for their number."""

    x: float
    y: float
    height: float
    label: str


@dataclass(frozen=True)
class Flow:
    """A stage between two bars: a band if it joins channels, lines if it is depthwise."""

    kind: str
    path: str
    x: float  # of its labels
    kernel: str
    macs: str


@dataclass(frozen=True)
class Row:
    """A chain of stages."""

    name: str
    y: float  # the middle
    bars: tuple[Bar, ...]
    flows: tuple[Flow, ...]


@dataclass(frozen=True)
class Structure:
    """A layer before and after, on one scale."""

    title: str
    description: str
    rows: tuple[Row, ...]
    width: int = 400
    height: int = 180


LEFT, RIGHT, BAR = 44, 382, 6  # edges of the drawing of a structure, width of a bar
MIDDLES = {"was": 48, "now": 136}  # of the two rows
LEAST, MOST = 7, 46  # heights of bars
LINES = 9  # at most, for a depthwise or grouped stage


def structure(layer: LayerReport) -> Structure | None:
    """Lay out a layer before and after; None if it was kept or is not a 2-D convolution."""
    if layer.before is None or not layer.stages:
        return None
    chains = {"was": (layer.before,), "now": layer.stages}
    most = max(n for stages in chains.values() for s in stages for n in (s.n_i, s.n_o))
    rows = tuple(_row(name, stages, layer.before.n_i, most) for name, stages in chains.items())
    was, now = (", then ".join(map(_described, stages)) for stages in chains.values())
    return Structure(f"Structure of {layer.name} before and after", f"It was {was}. It is now {now}.", rows)


def _described(stage: Stage) -> str:
    """Describe a stage: a 3×3 depthwise convolution, 16 to 38 channels, 350 k MACs."""
    kind = "depthwise convolution" if stage.kind == "depthwise" else "convolution"
    groups = f" in {stage.groups} groups" if stage.kind != "depthwise" and stage.groups > 1 else ""
    channels = f"{stage.reads} to {stage.n_o} channels"
    return f"a {by(stage.kernel)} {kind}{groups}, {channels}, {count(stage.macs)} MACs"


def _row(name: str, stages: Sequence[Stage], n_i: int, most: int) -> Row:
    middle = MIDDLES[name]
    channels = [n_i, *(stage.n_o for stage in stages)]
    step = (RIGHT - LEFT - BAR) / len(stages)
    heights = [LEAST + (MOST - LEAST) * sqrt(number / most) for number in channels]
    bars = [
        Bar(round(LEFT + i * step, 1), round(middle - height / 2, 1), round(height, 1), str(channels[i]))
        for i, height in enumerate(heights)
    ]
    flows = [_flow(stage, *ends) for stage, ends in zip(stages, pairwise(bars), strict=True)]
    return Row(name, middle, tuple(bars), tuple(flows))


def _flow(stage: Stage, left: Bar, right: Bar) -> Flow:
    start, end = left.x + BAR, right.x
    depthwise = stage.kind == "depthwise"
    parts = min(stage.groups, LINES)
    shapes = []
    for index in range(parts):
        a, b = (index + (0.5 if depthwise else 0.08)) / parts, (index + 0.92) / parts
        shape = f"M{start} {left.y + a * left.height:.1f} L{end} {right.y + a * right.height:.1f}"
        if not depthwise:
            shape += f" V{right.y + b * right.height:.1f} L{start} {left.y + b * left.height:.1f} Z"
        shapes.append(shape)
    kernel = by(stage.kernel) + (" dw" if depthwise else f" /{stage.groups}" if stage.groups > 1 else "")
    middle, kind = round((start + end) / 2, 1), "lines" if depthwise else "band"
    return Flow(kind, " ".join(shapes), middle, kernel, count(stage.macs))


@dataclass(frozen=True)
class Spectrum:
    """Shares of a layer's energy by component."""

    title: str
    description: str
    bars: tuple[tuple[float, float, float, float, str], ...]  # x, y, width, height, kind
    labels: tuple[Tick, ...]
    caption: str
    width: int = 160
    height: int = 180
    base: int = 146


def spectrum(name: str, energy: Sequence[float] | Array, taken: float = 0.0) -> Spectrum | None:
    """Lay out the shares of all components; the first ``taken``, an average, are highlighted.

    ``energy`` are cumulative shares. Without any, the result is None.
    """
    if not len(energy):
        return None
    shares = np.diff(energy, prepend=0.0).tolist()
    left, right, base, top = 8, 152, Spectrum.base, 40
    step = (right - left) / len(shares)
    bars = []
    for index, share in enumerate(shares):
        height = max(share / max(shares), 0.0) * (base - top)
        kind = "taken" if index + 0.5 <= taken else "rest"
        x, y = left + index * step + step * 0.12, base - height
        bars.append((round(x, 1), round(y, 1), round(step * 0.76, 1), round(height, 1), kind))
    most = next((t for t, e in enumerate(energy, 1) if e >= 0.9), len(energy))
    caption = f"{100 * energy[most - 1]:.0f}% in {most} of {len(energy)}"
    listed = ", ".join(f"{100 * s:.1f}%" for s in shares[:12]) + (", …" if len(shares) > 12 else "")
    description = f"Shares of the energy of its weights, component by component: {listed}. {caption}."
    ends = sorted({1, len(shares)})
    labels = tuple(Tick(round(left + (t - 0.5) * step, 1), str(t)) for t in ends)
    return Spectrum(f"Principal components of {name}", description, tuple(bars), labels, caption)
