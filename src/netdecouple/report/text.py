"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from netdecouple.families.base import used_by
from netdecouple.network import Layer
from netdecouple.planning.planner import BudgetRow
from netdecouple.report.build import describe
from netdecouple.report.formatting import (
    count,
    faster,
    layer_sizes,
    percent,
    sample_note,
    samples_note,
    short,
    skipped_note,
    threads,
    times,
)
from netdecouple.report.model import Report, Score
from netdecouple.report.sweep import Sweep, is_flat
from netdecouple.runtimes.benchmark import Benchmark, LayerTimes, TimedModel
from netdecouple.runtimes.feeds import describe_shape
from netdecouple.runtimes.layers import REORDER, REST

BARS = " ▁▂▃▄▅▆▇█"


def report_table(report: Report) -> Group:
    """Return the table that a run ends with: every layer, then a summary of gain and loss."""
    table = _table(
        f"{report.model}, decoupled to {report.budget}",
        ["layer", "shape", "family", "sizes", "MACs", "", "error", "", "note"],
        right=("MACs", "error"),
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
            short(layer.predicted_error, 2),
            f"→ {short(layer.measured_error, 2)}" if layer.measured_error is not None else "",
            sample_note(layer) if changed else f"kept: {layer.reason}",
            style="" if changed else "dim",
        )
    units = "; ".join(
        f"{family.name}: {family.size_unit}" for family in used_by(layer.family for layer in report.layers)
    )
    legend = Text(f"sizes of every family in turn: {units}\nerror: predicted → measured, on held-out inputs")
    return Group(table, legend, *summary(report))


def short_name(name: str, width: int = 26) -> str:
    """Shorten a long layer name in the middle: exporters repeat the module path at both ends."""
    name = name.removeprefix("/")
    half = (width - 1) // 2
    return name if len(name) <= width else f"{name[:half]}…{name[-half:]}"


def _table(title: str, columns: Sequence[str], right: Collection[str]) -> Table:
    look = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title=title, pad_edge=False, **look)  # type: ignore[arg-type]
    for name in columns:
        justify: JustifyMethod = "right" if name in right else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in ("layer", "note"))
    return table


def summary(report: Report) -> list[Text]:
    """Return one line each for MACs, parameters, time, agreement, accuracy and notes."""
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
            f"{100 * s.share:.0f}% (predicted {100 * s.foreseen:.0f}%) in {s.place}"
        )
    if report.agreement:
        a = report.agreement
        loss = "KL divergence" if a.loss == "kl" else "relative error"
        same = f"same class on {percent(a.same_class)}, " if a.same_class is not None else ""
        lines.append(
            f"Agreement   {same}{loss} {short(a.divergence)} (predicted {short(a.predicted)}), "
            f"on {a.images} held-out inputs"
        )
    if report.accuracy:
        before, after = map(percent, report.accuracy)
        lines.append(f"Accuracy    {before} → {after} top-1 on the labelled images")
    lines.append(
        f"Saved file  outputs differ by {report.difference:.1e} (relative) from those computed during fitting"
    )
    lines += [f"Note        {note}" for note in [samples_note(report)] if note]
    lines += [f"Skipped     {note}" for note in [skipped_note(report)] if note]
    return [Text(line) for line in lines]


def budget_table(rows: Sequence[BudgetRow], loss: str) -> Table:
    """Return the budgets that can be met and the predicted loss of each."""
    lost = "predicted KL" if loss == "kl" else "predicted relative error"
    names = ("fewer MACs", "MACs", "parameters", lost)
    table = _table("Budgets that can be met", names, right=names)
    for row in rows:
        table.add_row(row.label, count(row.macs), count(row.parameters), short(row.predicted_loss, 2))
    return table


def inspect_table(name: str, layers: Sequence[Layer], spectra: dict[str, NDArray[np.floating]]) -> Table:
    """Return shape, cost and principal components of every layer; ``spectra`` are cumulative shares by T."""
    total = sum(layer.macs for layer in layers)
    names = ("layer", "shape", "MACs", "share", "energy by T", "", "note")
    table = _table(name, names, right=("MACs", "share"))
    for layer in layers:
        shares = spectra.get(layer.name, np.zeros(0))
        bars = "".join(BARS[round(8 * float(s))] for s in shares)
        at = next((t for t, s in enumerate(shares, 1) if s >= 0.9), 0)
        table.add_row(
            Text(short_name(layer.name)),
            describe(layer),
            count(layer.macs),
            percent(layer.macs / total),
            bars,
            f"90% at T = {at}" if at else "",
            layer.reason and f"kept: {layer.reason}",
            style="dim" if layer.reason else "",
        )
    return table


def reach_table(layers: Sequence[Layer], least_macs: int, least_parameters: int) -> Table:
    """Return the range of budgets that can be met."""
    columns = ("", "now", "least", "at most")
    table = _table("Budgets that can be met (`netdecouple run` measures the loss)", columns, right=columns)
    for name, now, least in (
        ("MACs", sum(layer.macs for layer in layers), least_macs),
        ("parameters", sum(layer.parameters for layer in layers), least_parameters),
    ):
        table.add_row(name, count(now), count(least), f"{times(now, least)} fewer")
    return table


def sweep_table(sweep: Sweep) -> Table:
    """Return cost and loss at every budget, the knee marked; compared networks below."""
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
    title += f", on {measured.images} held-out inputs" if measured else ""
    table = _table(title, ["budget", *columns, ""], right=columns)
    before = points[0]
    original = [count(before.macs_before), "", count(before.parameters_before)]
    if before.accuracy:
        original += [""] * (len(columns) - len(original) - 1) + [percent(before.accuracy[0])]
    table.add_row("original", *original)
    for index, point in enumerate(points):
        row = [
            count(point.macs),
            times(point.macs_before, point.macs),
            count(point.parameters),
            times(point.parameters_before, point.parameters),
            short(point.predicted_loss or None, 2),
        ]
        a = point.agreement
        row += [short(a.divergence if a else None, 2)] if measured else []
        row += [percent(a.same_class if a else None)] if is_classifier else []
        row += [percent(point.accuracy and point.accuracy[1])] if "top-1" in columns else []
        at_knee = index == sweep.knee
        table.add_row(
            Text(short_name(point.budget)), *row, "← knee" if at_knee else "", style="bold" if at_knee else ""
        )
        if index == len(sweep.points) - 1:
            table.add_section()
    return table


def knee_line(sweep: Sweep) -> Text:
    """Return the recommended budget and the reason."""
    if sweep.knee is None:
        return Text("Knee        none: no budget stands out; choose by the loss that you accept")
    point = sweep.points[sweep.knee]
    why = "beyond it, every saving costs more than the savings before"
    if is_flat(sweep.points):
        why = "the fewest MACs, as no budget has a noticeable loss"
    return Text(f"Knee        {point.budget}, {times(point.macs_before, point.macs)} fewer MACs: {why}")


def families_table(sweep: Sweep) -> Table:
    """Return each layer's family and sizes in the compared networks, side by side."""
    compared = [c for c in sweep.compared if c.layers]
    names = [short_name(Path(c.point.budget).name, 30) for c in compared]
    table = _table("What was done to each layer", ["layer", *names], right=())
    for layer, choices in sweep.side_by_side().items():
        is_kept = all(choice is None or choice.family == "kept" for choice in choices)
        cells = ("–" if choice is None else str(choice) for choice in choices)
        table.add_row(Text(short_name(layer)), *cells, style="dim" if is_kept else "")
    return table


def scores_table(scores: Sequence[Score]) -> Table:
    """Return the accuracy of several networks, side by side."""
    names = ("top-1", "top-5", "same class", "KL")
    table = _table(f"On {scores[0].images} labelled images", ["network", *names], right=names)
    for score in scores:
        shares = (score.top1, score.top5, score.same_class)
        table.add_row(score.model, *map(percent, shares), short(score.kl, 2))
    return table


def timing_tables(timed: Benchmark) -> list[Table]:
    """Return times side by side, one table per runtime and number of threads."""
    groups = dict.fromkeys(model.group for model in timed.models)
    return [_timing_table([m for m in timed.models if m.group == group]) for group in groups]


def _timing_table(models: Sequence[TimedModel]) -> Table:
    first = models[0]
    table = _table(
        f"{first.runtime} {first.version}, {threads(first.threads)}, "
        f"input {', '.join(map(describe_shape, first.shapes))}",
        ["network", "MACs", "median ms", "quartiles", "faster"],
        right=("MACs", "median ms", "quartiles"),
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


def layer_times_tables(timed: Benchmark) -> list[Group]:
    """Return every network's median times per layer side by side, one table per number of threads."""
    return [_layer_times_table(times) for times in timed.layers]


def _layer_times_table(times: LayerTimes) -> Group:
    title = f"Median ms per layer, onnxruntime {times.version}'s profiler, {threads(times.threads)}"
    names = [short_name(Path(name).name, 20) for name in times.models]
    columns = ["layer", names[0], *(column for name in names[1:] for column in (name, "faster"))]
    table = _table(title, columns, right=names)
    for layer in times.layers:
        row = []
        for timing, ratio in zip(layer.timings, layer.faster, strict=True):
            row += ["" if timing is None else f"{timing.median:.3f}", faster(ratio, "≈")]
        del row[1]  # nothing is faster than itself
        table.add_row(Text(short_name(layer.name)), *row)
    note = (
        f"{REORDER}: between ONNX Runtime's plain and blocked tensors; {REST}: nodes outside all layers; "
        "≈: no measurable difference; the profiler itself adds time to every node"
    )
    return Group(table, Text(note))
