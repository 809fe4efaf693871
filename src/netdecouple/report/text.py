"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from netdecouple.families.base import used_by
from netdecouple.planning.planner import BudgetRow
from netdecouple.report import formatting as fmt
from netdecouple.report.build import describe
from netdecouple.report.inspection import Inspection
from netdecouple.report.model import Report, Score
from netdecouple.report.sweep import Sweep
from netdecouple.runtimes.benchmark import Benchmark, LayerTimes, TimedModel
from netdecouple.runtimes.feeds import describe_shape
from netdecouple.runtimes.layers import REORDER, REST

BARS = " ▁▂▃▄▅▆▇█"


def report_table(report: Report) -> Group:
    """Return the table that a run ends with: every layer, then a summary of gain and loss."""
    table = _table(
        f"{report.model}, decoupled to {fmt.goal(report)}",
        ["layer", "shape", "family", "sizes", "MACs", "", "error", "", "note"],
        right=("MACs", "error"),
    )
    for layer in report.layers:
        table.add_row(
            Text(short_name(layer.name)),
            layer.shape,
            layer.family if layer.changed else "",
            fmt.layer_sizes(layer),
            fmt.count(layer.macs_before),
            f"→ {fmt.count(layer.macs)}" if layer.macs != layer.macs_before else "",
            fmt.short(layer.predicted_error, 2),
            f"→ {fmt.short(layer.measured_error, 2)}" if layer.measured_error is not None else "",
            fmt.sample_note(layer) if layer.changed else f"kept: {layer.reason}",
            style="" if layer.changed else "dim",
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


def _table(
    title: str, columns: Sequence[str], right: Collection[str], rows: Iterable[Sequence[str]] = ()
) -> Table:
    look = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title=title, pad_edge=False, **look)  # type: ignore[arg-type]
    for name in columns:
        justify: JustifyMethod = "right" if name in right else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in ("layer", "note"))
    for row in rows:
        table.add_row(*row)
    return table


def summary(report: Report) -> list[Text]:
    """Return one line each for time, MACs, parameters, agreement, accuracy and notes."""
    lines = []
    if report.speed:
        s = report.speed
        lines.append(
            f"Time        {s.before:.3g} → {s.after:.3g} ms   {fmt.speedup(s.share)}, "
            f"{100 * s.share:.0f}% (predicted {100 * s.foreseen:.0f}%) in {s.place}"
        )
    elif report.headline:
        lines.append(_time(*report.headline))
        lines += [f"            {advice}" for advice in [fmt.advice(report)] if advice]
    macs, parameters = (report.macs_before, report.macs), (report.parameters_before, report.parameters)
    lines += [
        f"{name:<11} {fmt.count(before)} → {fmt.count(after)}   {fmt.times(before, after)} fewer"
        for name, (before, after) in {"MACs": macs, "Parameters": parameters}.items()
    ]
    if report.agreement:
        a = report.agreement
        loss = fmt.loss_name(a.loss)
        same = f"same class on {fmt.percent(a.same_class)}, " if a.same_class is not None else ""
        same += f"same text in {fmt.percent(a.same_text)}, " if a.same_text is not None else ""
        if a.boxes:
            same += f"{fmt.percent(a.boxes_found)} of {a.boxes} boxes found again, "
        same += f"PSNR {a.psnr:.1f} dB, " if a.psnr is not None else ""
        lines.append(
            f"Agreement   {same}{loss} {fmt.short(a.divergence)} (predicted {fmt.short(a.predicted)}), "
            f"on {a.images} held-out inputs"
        )
    if report.refinement:
        lines.append(f"Refined     {fmt.refinement(report)}")
    if report.accuracy:
        before, after = map(fmt.percent, report.accuracy)
        lines.append(f"Accuracy    {before} → {after} top-1 on the labelled images")
    lines.append(
        f"Saved file  outputs differ by {report.difference:.1e} (relative) from those computed during fitting"
    )
    if report.promise:
        kept = "kept" if report.promise.kept else "NOT kept"
        lines.append(f"Within      {report.promise.asked} is {kept}: {report.promise.text}")
    lines += [f"Note        {note}" for note in [fmt.samples_note(report)] if note]
    lines += [f"Skipped     {note}" for note in [fmt.skipped_note(report)] if note]
    texts = [Text(line) for line in lines]
    return texts + [Text(f"Warning     {warning}", style="bold red") for warning in report.warnings]


def _time(original: TimedModel, new: TimedModel) -> str:
    """Return a line of the time before and after."""
    assert new.faster is not None
    ratio = new.faster.median
    change = "no measurable difference" if ratio is None else fmt.speedup(1 / ratio)
    place = f"{new.runtime} {new.version}, {fmt.threads(new.threads)}"
    return f"Time        {original.timing.median:.3g} → {new.timing.median:.3g} ms   {change} in {place}"


def budget_table(rows: Sequence[BudgetRow], loss: str) -> Table:
    """Return the budgets that can be met and the predicted loss of each."""
    lost = "predicted KL" if loss == "kl" else f"predicted {fmt.loss_name(loss)}"
    names = ("fewer MACs", "MACs", "parameters", lost)
    cells = (
        (row.label, fmt.count(row.macs), fmt.count(row.parameters), fmt.short(row.predicted_loss, 2))
        for row in rows
    )
    return _table("Budgets that can be met", names, names, cells)


def inspect_table(inspection: Inspection) -> Table:
    """Return shape, cost and principal components of every layer."""
    names = ("layer", "shape", "MACs", "share", "energy by T", "", "note")
    table = _table(inspection.model, names, right=("MACs", "share"))
    for layer in inspection.layers:
        shares = inspection.energy.get(layer.name, ())
        bars = "".join(BARS[round(8 * float(s))] for s in shares)
        at = next((t for t, s in enumerate(shares, 1) if s >= 0.9), 0)
        table.add_row(
            Text(short_name(layer.name)),
            describe(layer),
            fmt.count(layer.macs),
            fmt.percent(layer.macs / inspection.macs),
            bars,
            f"90% at T = {at}" if at else "",
            layer.reason and f"kept: {layer.reason}",
            style="dim" if layer.reason else "",
        )
    return table


def reach_table(inspection: Inspection) -> Table:
    """Return the range of budgets that can be met."""
    columns = ("", "now", "least", "at most")
    costs = {
        "MACs": (inspection.macs, inspection.least_macs),
        "parameters": (inspection.parameters, inspection.least_parameters),
    }
    rows = (
        (name, fmt.count(now), fmt.count(least), f"{fmt.times(now, least)} fewer")
        for name, (now, least) in costs.items()
    )
    return _table("Budgets that can be met (`netdecouple run` measures the loss)", columns, columns, rows)


def sweep_table(sweep: Sweep) -> Table:
    """Return cost and loss at every budget, the knee marked; compared networks below."""
    lost = "KL" if sweep.loss == "kl" else fmt.loss_name(sweep.loss)
    points = sweep.networks
    measured = next((p.agreement for p in points if p.agreement), None)
    columns = ["MACs", "fewer", "parameters", "fewer", f"predicted {lost}"]
    columns += [lost] if measured else []
    columns += ["same class"] if sweep.has_classes else []
    columns += ["top-1"] if sweep.has_accuracy else []
    title = (
        f"{sweep.model} at {len(sweep.points)} budgets" if sweep.points else f"Compared with {sweep.model}"
    )
    title += f", on {measured.images} held-out inputs" if measured else ""
    table = _table(title, ["budget", *columns, ""], right=columns)
    before = points[0]
    original = [fmt.count(before.macs_before), "", fmt.count(before.parameters_before)]
    if before.accuracy:
        original += [""] * (len(columns) - len(original) - 1) + [fmt.percent(before.accuracy[0])]
    table.add_row("original", *original)
    for index, point in enumerate(points):
        row = [
            fmt.count(point.macs),
            fmt.times(point.macs_before, point.macs),
            fmt.count(point.parameters),
            fmt.times(point.parameters_before, point.parameters),
            fmt.short(point.predicted_loss or None, 2),
        ]
        a = point.agreement
        row += [fmt.short(a.divergence if a else None, 2)] if measured else []
        row += [fmt.percent(a.same_class if a else None)] if sweep.has_classes else []
        row += [fmt.percent(point.accuracy and point.accuracy[1])] if sweep.has_accuracy else []
        at_knee = index == sweep.knee
        table.add_row(
            Text(short_name(point.budget)), *row, "← knee" if at_knee else "", style="bold" if at_knee else ""
        )
        if index == len(sweep.points) - 1:
            table.add_section()
    return table


def knee_line(sweep: Sweep) -> Text:
    """Return the recommended budget and the reason."""
    point = sweep.best
    if point is None:
        return Text("Knee        none: no budget stands out; choose by the loss that you accept")
    why = "beyond it, every saving costs more than the savings before"
    if sweep.is_flat:
        why = "the fewest MACs, as no budget has a noticeable loss"
    return Text(f"Knee        {point.budget}, {fmt.times(point.macs_before, point.macs)} fewer MACs: {why}")


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
    if scores[0].psnr is not None:
        columns = ("PSNR, dB", "to the first network, dB")
        figures = ([s.model, fmt.decibels(s.psnr), fmt.decibels(s.psnr_to_first)] for s in scores)
        return _table(f"On {scores[0].images} images", ["network", *columns], columns, figures)
    if scores[0].top1 is None:
        texts = ([s.model, fmt.percent(s.same_text)] for s in scores)
        return _table(f"On {scores[0].images} images", ["network", "same text"], ("same text",), texts)
    names = ("top-1", "top-5", "same class", "KL")
    rows = ((s.model, *map(fmt.percent, (s.top1, s.top5, s.same_class)), fmt.short(s.kl, 2)) for s in scores)
    return _table(f"On {scores[0].images} labelled images", ["network", *names], names, rows)


def timing_tables(timed: Benchmark) -> list[Table]:
    """Return times side by side, one table per runtime and number of threads."""
    tables = {}
    for m in timed.models:
        if m.group not in tables:
            shapes = ", ".join(map(describe_shape, m.shapes))
            title = f"{m.runtime} {m.version}, {fmt.threads(m.threads)}, input {shapes}"
            names = ("network", "MACs", "median ms", "quartiles", "faster")
            tables[m.group] = _table(title, names, right=names[1:4])
        macs = "–" if m.macs is None else fmt.count(m.macs)
        quartiles = f"{m.timing.lower:.3f}–{m.timing.upper:.3f}"
        row = (macs, f"{m.timing.median:.3f}", quartiles, fmt.faster(m.faster))
        tables[m.group].add_row(Text(m.model), *row)
    return list(tables.values())


def layer_times_table(times: LayerTimes) -> Group:
    """Return every network's median times per layer side by side."""
    title = f"Median ms per layer, onnxruntime {times.version}'s profiler, {fmt.threads(times.threads)}"
    names = [short_name(Path(name).name, 20) for name in times.models]
    columns = ["layer", names[0], *(column for name in names[1:] for column in (name, "faster"))]
    table = _table(title, columns, right=names)
    for layer in times.layers:
        row = []
        for timing, ratio in zip(layer.timings, layer.faster, strict=True):
            row += ["" if timing is None else f"{timing.median:.3f}", fmt.faster(ratio, "≈")]
        del row[1]  # nothing is faster than itself
        table.add_row(Text(short_name(layer.name)), *row)
    note = (
        f"{REORDER}: between ONNX Runtime's plain and blocked tensors; {REST}: nodes outside all layers; "
        "≈: no measurable difference; the profiler itself adds time to every node"
    )
    return Group(table, Text(note))
