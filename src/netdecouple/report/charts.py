"""Where things stand in the charts of a page: scales, ticks and shapes. The templates draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, floor, log10, sqrt

from netdecouple.report.model import LayerReport, Stage
from netdecouple.report.text import count

SPEEDUPS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100)
BETWEEN = (1.25, 2.5, 4, 7, 15, 30)  # those that go first where there are too many
ROOM = 84  # for a label beside its mark
CROWDED = 15  # marks nearer than this share a label, that of the first


@dataclass(frozen=True)
class Point:
    """A point in a chart's own units; ``kind`` is its class in the style sheet."""

    x: float
    y: float
    label: str
    kind: str


@dataclass(frozen=True)
class Series:
    """Points that a line joins."""

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point in place, its label to the left or the right of it."""

    x: float
    y: float
    label: str
    kind: str
    side: str  # "start" or "end", as in text-anchor


@dataclass(frozen=True)
class Chart:
    """A plot in place; both axes are logarithmic."""

    title: str
    description: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[tuple[str, str], ...]  # kind, path
    marks: tuple[Mark, ...]
    width: int = 440
    height: int = 290
    left: int = 52
    right: int = 424
    top: int = 14
    bottom: int = 244


def plot(
    title: str,
    description: str,
    x_title: str,
    y_title: str,
    series: Sequence[Series],
    points: Sequence[Point],
) -> Chart | None:
    """Lay out a plot of positive numbers over times fewer MACs; None if there is nothing to draw."""
    everything = [p for line in series for p in line.points] + [(p.x, p.y) for p in points]
    positive = [y for _, y in everything if y > 0]
    if len(everything) < 2 or not positive:
        return None
    floor_y = min(positive)  # what loses nothing is drawn on the lowest line
    low, high = _decades(floor_y, max(positive))
    last = 1.04 * max(1.3, *(x for x, _ in everything))
    frame = Chart(title, description, x_title, y_title, (), (), (), ())

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = log10(x) / log10(last), (log10(max(y, floor_y)) - low) / (high - low)
        return (
            round(frame.left + across * (frame.right - frame.left), 1),
            round(frame.bottom - up * (frame.bottom - frame.top), 1),
        )

    marks: list[Mark] = []
    for point in points:
        x, y = place(point.x, point.y)
        near = any(m.label and abs(m.x - x) < 70 and abs(m.y - y) < CROWDED for m in marks)
        side = "end" if x > frame.left + ROOM else "start"  # curves rise: there is room up to the left
        marks.append(Mark(x, y, "" if near else point.label, point.kind, side))
    marks.sort(key=lambda mark: mark.kind == "run")  # drawn last, above all others
    lines = tuple(
        (line.kind, "M" + " L".join(f"{x} {y}" for x, y in (place(*p) for p in line.points)))
        for line in series
        if line.points
    )
    shown = [x for x in SPEEDUPS if x <= last]
    shown = shown if len(shown) <= 7 else [x for x in shown if x not in BETWEEN]
    x_ticks = tuple(Tick(place(x, floor_y)[0], f"{x:g}×") for x in shown)
    y_ticks = tuple(Tick(place(1, y)[1], f"{y:g}") for y in _log_ticks(low, high))
    return replace(frame, x_ticks=x_ticks, y_ticks=y_ticks, lines=lines, marks=tuple(marks))


def _decades(low: float, high: float) -> tuple[float, float]:
    """The ends of a logarithmic axis, with some room, at least one decade."""
    start, end = log10(low) - 0.08, log10(high) + 0.08
    if end - start < 1:
        middle = (start + end) / 2
        start, end = middle - 0.5, middle + 0.5
    return start, end


def _log_ticks(low: float, high: float) -> list[float]:
    digits = (1, 2, 5) if high - low < 2.2 else (1,)
    found = [d * 10.0**e for e in range(floor(low), ceil(high) + 1) for d in digits]
    return [y for y in found if low <= log10(y) <= high]


@dataclass(frozen=True)
class Bar:
    """The channels between two stages, a bar as high as they are many."""

    x: float
    y: float
    height: float
    label: str


@dataclass(frozen=True)
class Flow:
    """A stage between two bars: a band that joins all channels, lines where each stays alone."""

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
    """A layer before and after, drawn to one scale."""

    title: str
    description: str
    rows: tuple[Row, ...]
    width: int = 400
    height: int = 180


LEFT, RIGHT, BAR = 44, 382, 6  # of the drawing of a structure
ROWS = (48, 136)  # their middles
LEAST, MOST = 7, 46  # heights of bars
LINES = 9  # at most, for stages whose channels stay alone


def structure(layer: LayerReport) -> Structure | None:
    """Draw a layer before and after; None if it was kept, or is nothing that can be drawn."""
    if layer.before is None or not layer.stages:
        return None
    chains = {"was": (layer.before,), "now": layer.stages}
    most = max(n for stages in chains.values() for s in stages for n in (s.n_i, s.n_o))
    rows = tuple(
        _row(name, stages, middle, layer.before.n_i, most)
        for (name, stages), middle in zip(chains.items(), ROWS, strict=True)
    )
    told = {name: ", then ".join(map(describe_stage, stages)) for name, stages in chains.items()}
    return Structure(
        f"Structure of {layer.name} before and after", f"It was {told['was']}. It is now {told['now']}.", rows
    )


def describe_stage(stage: Stage) -> str:
    """A stage in words: a 3×3 depthwise convolution, 16 to 38 channels, 350 k MACs."""
    kernel = "×".join(map(str, stage.kernel))
    kind = "depthwise convolution" if stage.kind == "depthwise" else "convolution"
    groups = f" in {stage.groups} groups" if stage.kind != "depthwise" and stage.groups > 1 else ""
    return f"a {kernel} {kind}{groups}, {stage.reads} to {stage.n_o} channels, {count(stage.macs)} MACs"


def _row(name: str, stages: Sequence[Stage], middle: float, n_i: int, most: int) -> Row:
    channels = [n_i, *(stage.n_o for stage in stages)]
    step = (RIGHT - LEFT - BAR) / len(stages)
    bars = []
    for index, number in enumerate(channels):
        height = LEAST + (MOST - LEAST) * sqrt(number / most)
        bars.append(
            Bar(round(LEFT + index * step, 1), round(middle - height / 2, 1), round(height, 1), str(number))
        )
    flows = tuple(
        _flow(stage, left, right) for stage, (left, right) in zip(stages, pairwise(bars), strict=True)
    )
    return Row(name, middle, tuple(bars), flows)


def _flow(stage: Stage, left: Bar, right: Bar) -> Flow:
    start, end = left.x + BAR, right.x
    alone = stage.kind == "depthwise" or stage.groups > 1
    parts = min(stage.groups, LINES) if alone else 1
    shapes = []
    for index in range(parts):
        a, b = (index + (0.5 if stage.kind == "depthwise" else 0.08)) / parts, (index + 0.92) / parts
        upper = left.y + a * left.height, right.y + a * right.height
        if stage.kind == "depthwise":
            shapes.append(f"M{start} {upper[0]:.1f} L{end} {upper[1]:.1f}")
        else:
            lower = left.y + b * left.height, right.y + b * right.height
            shapes.append(
                f"M{start} {upper[0]:.1f} L{end} {upper[1]:.1f} V{lower[1]:.1f} L{start} {lower[0]:.1f} Z"
            )
    kernel = "×".join(map(str, stage.kernel))
    if stage.kind == "depthwise":
        kernel += " dw"
    elif stage.groups > 1:
        kernel += f" /{stage.groups}"
    kind = "lines" if stage.kind == "depthwise" else "band"
    return Flow(kind, " ".join(shapes), round((start + end) / 2, 1), kernel, count(stage.macs))


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


def spectrum(name: str, energy: Sequence[float], taken: float | None = None) -> Spectrum | None:
    """Draw the shares of every component; those that are ``taken`` on average stand out."""
    if not energy:
        return None
    shares = [b - a for a, b in zip((0.0, *energy), energy, strict=False)]
    left, right, base, top = 8, 152, Spectrum.base, 40
    step = (right - left) / len(shares)
    bars = []
    for index, share in enumerate(shares):
        height = max(share / max(shares), 0.0) * (base - top)
        kind = "taken" if taken is not None and index + 0.5 <= taken else "rest"
        bars.append(
            (round(left + index * step + step * 0.12, 1), round(base - height, 1), round(step * 0.76, 1),
             round(height, 1), kind)
        )  # fmt: skip
    most = next(t for t, e in enumerate((*energy, 1.0), 1) if e >= 0.9 or t == len(energy))
    caption = f"{100 * energy[most - 1]:.0f}% in {most} of {len(energy)}"
    told = ", ".join(f"{100 * s:.1f}%" for s in shares[:12]) + (", …" if len(shares) > 12 else "")
    labels = tuple(Tick(round(left + (t - 0.5) * step, 1), str(t)) for t in dict.fromkeys((1, len(shares))))
    return Spectrum(
        f"Principal components of {name}",
        f"Shares of the energy of its weights, component by component: {told}. {caption}.",
        tuple(bars),
        labels,
        caption,
    )
