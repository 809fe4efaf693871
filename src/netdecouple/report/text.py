"""Tables for the terminal, from the report's data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from netdecouple.families.base import used_by
from netdecouple.network import Layer
from netdecouple.planning.solve import BudgetRow
from netdecouple.report.benchmark import Benchmark, LayerTimes, TimedModel
from netdecouple.report.report import LayerReport, Report, Score, describe
from netdecouple.report.sweep import Sweep, is_flat
from netdecouple.runtimes.feeds import describe_shape
from netdecouple.runtimes.layers import REORDER, REST
from netdecouple.runtimes.timing import Ratio, Timing

BARS = " ▁▂▃▄▅▆▇█"


def count(number: float) -> str:
    """A count with three digits and a unit: 40.6 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def times(before: float, after: float) -> str:
    """How many times fewer: 2.00×."""
    return f"{before / after:.2f}×" if after else "∞"


def report_table(report: Report) -> Group:
    """The table a run ends with: every layer, then what was gained and what was lost."""
    table = _table(
        f"{report.model}, decoupled to {report.budget}",
        ("layer", "left"),
        ("shape", "left"),
        ("family", "left"),
        ("sizes", "left"),
        ("MACs", "right"),
        ("", "left"),
        ("error", "right"),
        ("", "left"),
        ("note", "left"),
    )
    for layer in report.layers:
        changed = layer.family != "kept"
        table.add_row(
            Text(short_name(layer.name)),
            layer.shape,
            layer.family if changed else "",
            layer_sizes(layer),
            count(layer.macs_before),
            f"→ {count(layer.macs)}" if layer.macs != layer.macs_before else "",
            _number(layer.predicted_error),
            f"→ {_number(layer.measured_error)}" if layer.measured_error is not None else "",
            _note(layer),
            style="" if changed else "dim",
        )
    units = "; ".join(
        f"{family.name}: {family.size_unit}" for family in used_by(layer.family for layer in report.layers)
    )
    legend = Text(f"sizes of every family in turn: {units}\nerror: predicted → measured, on held-back inputs")
    return Group(table, legend, *summary(report))


def layer_sizes(layer: LayerReport) -> str:
    """The sizes of every family in turn, and how terms are spread over the channels."""
    sizes = " ".join(map(str, layer.sizes))
    if layer.terms_per_channel:
        fewest, most = layer.terms_per_channel
        sizes += f" ({fewest}–{most} each)" if fewest < most else f" ({most} each)"
    return sizes


def _note(layer: LayerReport) -> str:
    if layer.family == "kept":
        return f"kept: {layer.reason}"
    return sample_note(layer)


def sample_note(layer: LayerReport) -> str:
    """What was wrong with the samples a layer was fitted to; empty if nothing was."""
    if layer.family != "kept" and layer.samples is None:
        return "fitted from its weights"
    if layer.samples is not None and layer.samples < (layer.samples_wanted or 0):
        return f"{count(layer.samples)} of {count(layer.samples_wanted or 0)} samples wanted"
    if layer.dependent:
        return f"{count(layer.dependent)} of {count(layer.inputs)} inputs constant or dependent"
    return ""


def short_name(name: str, width: int = 26) -> str:
    """A layer's name, its middle left out where it is long: exporters repeat the module path."""
    name = name.removeprefix("/")
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half:]}"


def _table(title: str, *columns: tuple[str, Literal["left", "right"]]) -> Table:
    look = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title=title, pad_edge=False, **look)  # type: ignore[arg-type]
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in ("layer", "note"))
    return table


def summary(report: Report) -> list[Text]:
    """A line each on MACs, parameters, agreement, accuracy, and what to look out for."""
    lines = [
        f"MACs        {count(report.macs_before)} → {count(report.macs)}   "
        f"{times(report.macs_before, report.macs)} fewer",
        f"Parameters  {count(report.parameters_before)} → {count(report.parameters)}   "
        f"{times(report.parameters_before, report.parameters)} fewer",
    ]
    if report.speed:
        s = report.speed
        lines.append(
            f"Time        {s.before.median:.3g} → {s.after.median:.3g} ms   {1 / s.share:.2f}× faster, "
            f"{100 * s.share:.0f}% (the layers' times alone: {100 * s.foreseen:.0f}%) in {s.place}"
        )
    if report.agreement:
        a = report.agreement
        loss = "KL divergence" if a.loss == "kl" else "relative error"
        same = f"same class on {100 * a.same_class:.1f}%, " if a.same_class is not None else ""
        lines.append(
            f"Agreement   {same}{loss} {a.divergence:.3g} (predicted {a.predicted:.3g}), "
            f"on {a.images} held-back images"
        )
    if report.accuracy:
        before, after = report.accuracy
        lines.append(f"Accuracy    {100 * before:.1f}% → {100 * after:.1f}% top-1 on the labelled images")
    lines.append(f"Saved file  differs from the plan's own arithmetic by {report.difference:.1e} (relative)")
    short = sum(la.samples is not None and la.samples < (la.samples_wanted or 0) for la in report.layers)
    plural = "layer had" if short == 1 else "layers had"
    if short:
        lines.append(f"Note        {short} {plural} fewer samples than wanted; more calibration images help")
    if report.skipped:
        names = ", ".join(report.skipped[:3]) + (", …" if len(report.skipped) > 3 else "")
        lines.append(f"Skipped     {len(report.skipped)} unreadable images: {names}")
    return [Text(line) for line in lines]


def budget_table(rows: Sequence[BudgetRow], loss: str) -> Table:
    """Which budgets can be met, and what each is predicted to lose."""
    lost = "predicted KL" if loss == "kl" else "predicted relative error"
    names = ("fewer MACs", "MACs", "parameters", lost)
    table = _table("Budgets that can be met", *((name, "right") for name in names))
    for row in rows:
        table.add_row(row.label, count(row.macs), count(row.parameters), _number(row.predicted_loss))
    return table


def inspect_table(name: str, layers: Sequence[Layer], spectra: dict[str, NDArray[np.floating]]) -> Table:
    """Geometry, cost and principal components of every layer; ``spectra`` are cumulative shares by T."""
    total = sum(layer.macs for layer in layers)
    table = _table(
        name,
        ("layer", "left"),
        ("shape", "left"),
        ("MACs", "right"),
        ("share", "right"),
        ("energy by T", "left"),
        ("", "left"),
        ("note", "left"),
    )
    for layer in layers:
        shares = spectra.get(layer.name, np.zeros(0))
        bars = "".join(BARS[round(8 * float(s))] for s in shares)
        at = next((t for t, s in enumerate(shares, 1) if s >= 0.9), 0)
        table.add_row(
            Text(short_name(layer.name)),
            describe(layer),
            count(layer.macs),
            f"{100 * layer.macs / total:.1f}%",
            bars,
            f"90% at T = {at}" if at else "",
            layer.reason and f"kept: {layer.reason}",
            style="dim" if layer.reason else "",
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def reach_table(layers: Sequence[Layer], least_macs: int, least_parameters: int) -> Table:
    """The span of budgets that can be asked for."""
    table = Table(
        title="Budgets that can be met (what they cost in accuracy, `run` tells)", title_justify="left"
    )
    for column in ("", "now", "least", "at most"):
        table.add_column(column, justify="right")
    for name, now, least in (
        ("MACs", sum(layer.macs for layer in layers), least_macs),
        ("parameters", sum(layer.parameters for layer in layers), least_parameters),
    ):
        table.add_row(name, count(now), count(least), f"{times(now, least)} fewer")
    return table


def sweep_table(sweep: Sweep) -> Table:
    """Every budget with what it costs and loses, the knee marked; compared networks below."""
    lost = "KL" if sweep.loss == "kl" else "relative error"
    points = [*sweep.points, *(compared.point for compared in sweep.compared)]
    measured = next((p.agreement for p in points if p.agreement), None)
    is_classifier = any(p.agreement is not None and p.agreement.same_class is not None for p in points)
    columns = ["MACs", "fewer", "parameters", "fewer", f"predicted {lost}"]
    columns += [lost] if measured else []
    columns += ["same class"] if is_classifier else []
    columns += ["top-1"] if any(p.accuracy for p in points) else []
    title = (
        f"{sweep.model} at {len(sweep.points)} budgets" if sweep.points else f"Compared with {sweep.model}"
    )
    title += f", on {measured.images} held-back inputs" if measured else ""
    table = _table(title, ("budget", "left"), *((name, "right") for name in columns), ("", "left"))
    before = points[0]
    original = [count(before.macs_before), "", count(before.parameters_before)]
    if before.accuracy:
        original += [""] * (len(columns) - len(original) - 1) + [_share(before.accuracy[0])]
    table.add_row("original", *original)
    for index, point in enumerate(points):
        row = [
            count(point.macs),
            times(point.macs_before, point.macs),
            count(point.parameters),
            times(point.parameters_before, point.parameters),
            _number(point.predicted_loss or None),
        ]
        a = point.agreement
        row += [_number(None if a is None else a.divergence)] if measured else []
        row += [_share(None if a is None else a.same_class)] if is_classifier else []
        row += [_share(point.accuracy[1] if point.accuracy else None)] if "top-1" in columns else []
        at_knee = index == sweep.knee
        table.add_row(
            Text(short_name(point.budget)), *row, "← knee" if at_knee else "", style="bold" if at_knee else ""
        )
        if index == len(sweep.points) - 1:
            table.add_section()
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def knee_line(sweep: Sweep) -> Text:
    """Which budget is recommended, and by what rule."""
    if sweep.knee is None:
        return Text("Knee        none: no budget stands out; choose by what may be lost")
    point = sweep.points[sweep.knee]
    why = "every further saving costs more than those before"
    if is_flat(sweep.points):
        why = "the fewest MACs, as no budget loses anything that shows"
    return Text(f"Knee        {point.budget}, {times(point.macs_before, point.macs)} fewer MACs: {why}")


def families_table(sweep: Sweep) -> Table:
    """What compared networks' plans did to each layer, side by side."""
    compared = [c for c in sweep.compared if c.layers]
    names = [(short_name(Path(c.point.budget).name, 30), "left") for c in compared]
    table = _table("What was done to each layer", ("layer", "left"), *names)  # type: ignore[arg-type]
    for layer, choices in sweep.side_by_side().items():
        is_kept = all(choice is None or choice.family == "kept" for choice in choices)
        cells = ("–" if choice is None else str(choice) for choice in choices)
        table.add_row(Text(short_name(layer)), *cells, style="dim" if is_kept else "")
    return table


def scores_table(scores: Sequence[Score]) -> Table:
    """Accuracy side by side."""
    names = ("top-1", "top-5", "same class", "KL")
    table = _table(
        f"On {scores[0].images} labelled images", ("network", "left"), *((n, "right") for n in names)
    )
    for score in scores:
        shares = (score.top1, score.top5, score.same_class)
        table.add_row(
            score.model, *("" if s is None else f"{100 * s:.1f}%" for s in shares), _number(score.kl)
        )
    return table


def timing_tables(timed: Benchmark) -> list[Table]:
    """Times side by side, one table per runtime and number of threads."""
    groups = dict.fromkeys((m.runtime, m.version, m.threads, m.shapes) for m in timed.models)
    return [
        _timing_table([m for m in timed.models if (m.runtime, m.version, m.threads, m.shapes) == group])
        for group in groups
    ]


def _timing_table(models: Sequence[TimedModel]) -> Table:
    first = models[0]
    table = _table(
        f"{first.runtime} {first.version}, {threads(first.threads)}, "
        f"input {', '.join(map(describe_shape, first.shapes))}",
        ("network", "left"),
        ("MACs", "right"),
        ("median ms", "right"),
        ("quartiles", "right"),
        ("faster", "left"),
    )
    for model in models:
        time = model.timing
        table.add_row(
            Text(model.model),
            "–" if model.macs is None else count(model.macs),
            f"{time.median:.3f}",
            f"{time.lower:.3f}–{time.upper:.3f}",
            faster(model.faster),
        )
    return table


def faster(ratio: Ratio | None) -> str:
    """How many times faster, with quartiles: 1.97× (1.95–1.99); or that no difference could be measured."""
    if ratio is None:
        return ""
    return ("no measurable difference " if ratio.median is None else "") + _span(ratio).removeprefix("≈ ")


def _span(ratio: Ratio) -> str:
    median = "≈" if ratio.median is None else f"{ratio.median:.2f}×"
    return f"{median} ({ratio.lower:.2f}–{ratio.upper:.2f})"


def layer_times_tables(timed: Benchmark) -> list[Group]:
    """Median times per layer of every network side by side, one table per number of threads."""
    return [_layer_times_table(times) for times in timed.layers]


def _layer_times_table(times: LayerTimes) -> Group:
    title = f"Median ms per layer, onnxruntime {times.version}'s profiler, {threads(times.threads)}"
    first, *others = (short_name(Path(name).name, 20) for name in times.models)
    columns: list[tuple[str, Literal["left", "right"]]] = [("layer", "left"), (first, "right")]
    for name in others:
        columns += [(name, "right"), ("faster", "left")]
    table = _table(title, *columns)
    for layer in times.layers:
        row = [_milliseconds(layer.timings[0])]
        for timing, ratio in zip(layer.timings[1:], layer.faster[1:], strict=True):
            row += [_milliseconds(timing), "" if ratio is None else _span(ratio)]
        table.add_row(Text(short_name(layer.name)), *row)
    note = (
        f"{REORDER}: between ONNX Runtime's plain and its blocked tensors; {REST}: nodes of no layer; "
        "≈: no measurable difference; the profiler itself adds to every node"
    )
    return Group(table, Text(note))


def _milliseconds(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median:.3f}"


def threads(number: int) -> str:
    """1 thread, 2 threads."""
    return "1 thread" if number == 1 else f"{number} threads"
