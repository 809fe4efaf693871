"""The report as one self-contained page, from its data; and pages of the same make for other data."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from netdecouple.families.base import REGISTRY, spreads_terms, used_by
from netdecouple.report.benchmark import TimedModel
from netdecouple.report.charts import Chart, Point, Series, Spectrum, Structure, plot, spectrum, structure
from netdecouple.report.inspection import Inspection
from netdecouple.report.report import Agreement, LayerReport, Report, describe
from netdecouple.report.sweep import Sweep, SweepPoint
from netdecouple.report.text import count, faster, layer_sizes, sample_note, threads, times
from netdecouple.runtimes.layers import REORDER, REST, TOTAL
from netdecouple.runtimes.timing import Ratio, Timing

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "PyTorch"}
OPEN = 24  # changed layers up to which all drawings are shown at once


@dataclass(frozen=True)
class Fact:
    """A number to be read first: what it is, what it was and is, and where it was measured."""

    value: str
    label: str
    detail: str
    tone: str = ""  # "gain", "loss", or nothing


@dataclass(frozen=True)
class LayerView:
    """A layer of the report, with its times."""

    number: int
    layer: LayerReport
    changed: bool
    became: str
    before: Timing | None
    after: Timing | None
    faster: Ratio | None
    structure: Structure | None
    spectrum: Spectrum | None
    note: str  # what was wrong with the samples it was fitted to


@dataclass(frozen=True)
class OtherTime:
    """Time that is spent outside all layers."""

    name: str
    before: Timing | None
    after: Timing | None


def report_html(report: Report) -> str:
    """Print a report as one self-contained page."""
    layers = layer_views(report)
    return _page(
        "report.html",
        title=f"{report.model}, decoupled",
        report=report,
        verdict=verdict(report),
        gains=gains(report),
        losses=losses(report),
        notes=notes(report),
        layers=layers,
        timed_layers=any(view.before or view.after for view in layers),
        others=_other_times(report),
        others_note={REORDER: "between plain and blocked tensors", REST: "nodes of no layer"},
        most_macs=max((view.layer.macs_before for view in layers), default=1) or 1,
        is_open=sum(view.changed for view in layers) <= OPEN,
        chart=_curve(report),
        loss_name=_loss_name(report.agreement.loss if report.agreement else _planned_loss(report)),
        samples=_samples(report),
        changed_classes=_changed_classes(report.agreement),
        families=used_by(layer.family for layer in report.layers),
    )


def inspect_html(seen: Inspection) -> str:
    """Print what a network is made of as one self-contained page."""
    macs, parameters = (sum(getattr(la, unit) for la in seen.layers) for unit in ("macs", "parameters"))
    rows = [
        {
            "number": index,
            "layer": layer,
            "shape": describe(layer),
            "spectrum": spectrum(layer.name, seen.energy[layer.name].tolist())
            if layer.name in seen.energy
            else None,
        }
        for index, layer in enumerate(seen.layers, 1)
    ]
    return _page(
        "inspect.html",
        title=f"{seen.model}, inspected",
        model=seen.model,
        rows=rows,
        most_macs=max((layer.macs for layer in seen.layers), default=1) or 1,
        macs=macs,
        parameters=parameters,
        facts=[
            Fact(
                count(macs),
                "MACs",
                _least(macs, seen.least_macs),
            ),
            Fact(
                count(parameters),
                "parameters",
                _least(parameters, seen.least_parameters),
            ),
            Fact(
                str(len(rows)), "layers", f"{sum(not r.reason for r in seen.layers)} of them can be decoupled"
            ),
        ],
    )


def _least(now: int, least: int) -> str:
    return f"{count(least)} at the least: {times(now, least)} fewer"


def sweep_html(sweep: Sweep) -> str:
    """Print a sweep over budgets as one self-contained page: the curve, its knee, and every point."""
    knee = None if sweep.knee is None else sweep.points[sweep.knee]
    compared = [c.point for c in sweep.compared]
    return _page(
        "sweep.html",
        title=f"{sweep.model}, a sweep over budgets",
        sweep=sweep,
        knee=knee,
        facts=[] if knee is None else _knee_facts(knee),
        rows=[*((p, p is knee, False) for p in sweep.points), *((p, False, True) for p in compared)],
        chart=_sweep_chart(sweep),
        loss_name=_loss_name(sweep.loss),
        planned=[c.point.budget for c in sweep.compared if c.layers],
        has_classes=any(
            p.agreement and p.agreement.same_class is not None for p in (*sweep.points, *compared)
        ),
        has_accuracy=any(p.accuracy for p in (*sweep.points, *compared)),
    )


# --- what was gained and what was lost


def headline(report: Report) -> TimedModel | None:
    """The time that is told first: the new network's in the first runtime."""
    rows = report.benchmark.models if report.benchmark else ()
    return next((row for row in rows if row.faster is not None), None)


def _baseline(report: Report, row: TimedModel) -> TimedModel:
    assert report.benchmark is not None
    place = (row.runtime, row.version, row.threads, row.shapes)
    rows = report.benchmark.models
    return next(r for r in rows if (r.runtime, r.version, r.threads, r.shapes) == place and r.faster is None)


def gains(report: Report) -> list[Fact]:
    """MACs, time, parameters and bytes, before and after."""
    facts = [
        _fewer("MACs", report.macs_before, report.macs, count),
        _time(report),
        _fewer("parameters", report.parameters_before, report.parameters, count),
    ]
    if report.bytes_before and report.bytes:
        before, after = report.bytes_before, report.bytes
        ratio, way = (before / after, "smaller") if after <= before else (after / before, "larger")
        detail = f"{_bytes(before)} → {_bytes(after)}"
        facts.append(Fact(f"{ratio:.2f}×", f"{way} in bytes", detail, "gain" if way == "smaller" else "loss"))
    return facts


def _fewer(unit: str, before: int, after: int, shown: Any) -> Fact:
    detail = f"{shown(before)} → {shown(after)}"
    if after > before:
        return Fact(times(after, before), f"more {unit}", detail, "loss")
    return Fact(times(before, after), f"fewer {unit}", detail, "gain")


def _time(report: Report) -> Fact:
    row = headline(report)
    if row is None or row.faster is None:
        if report.speed:
            s = report.speed
            detail = f"{_ms(s.before.median)} → {_ms(s.after.median)} in {s.place}"
            return Fact(f"{1 / s.share:.2f}×", "faster" if s.share <= 1 else "as fast", detail, "gain")
        why = report.not_timed[0] if report.not_timed else "no times were asked for"
        return Fact("–", "time not measured", why)
    before, after = _baseline(report, row).timing, row.timing
    place = f"{runtime_words(row.runtime)}, {threads(row.threads)}"
    detail = f"{_ms(before.median)} → {_ms(after.median)}"
    low, median, high = row.faster.lower, row.faster.median, row.faster.upper
    if median is None:
        return Fact("≈", "no measurable difference in time", f"{detail}, {low:.2f}–{high:.2f}×; {place}")
    if median < 1:
        low, median, high = 1 / high, 1 / median, 1 / low
        return Fact(f"{median:.2f}×", "slower", f"{detail}, {low:.2f}–{high:.2f}×; {place}", "loss")
    return Fact(f"{median:.2f}×", "faster", f"{detail}, {low:.2f}–{high:.2f}×; {place}", "gain")


def losses(report: Report) -> list[Fact]:
    """Accuracy, agreement and divergence."""
    facts = []
    if report.accuracy:
        before, after = report.accuracy
        points = 100 * (after - before)
        value = f"{points:+.1f}".replace("-", "−") if abs(points) >= 0.05 else "±0.0"
        detail = f"{100 * before:.1f}% → {100 * after:.1f}% top-1, labelled images"
        facts.append(Fact(value, "points of accuracy", detail, "loss" if points < -0.05 else "gain"))
    if report.agreement:
        facts += _agreement_facts(report.agreement)
    return facts


def _agreement_facts(a: Agreement) -> list[Fact]:
    facts = []
    if a.same_class is not None:
        changed = _changed_classes(a)
        facts.append(
            Fact(
                f"{100 * (1 - a.same_class):.1f}%",
                "get another class",
                f"{changed} of {a.images} held-back inputs; {100 * a.same_class:.1f}% keep theirs",
                "loss",
            )
        )
    name = "KL divergence, nats" if a.loss == "kl" else "relative error of the outputs"
    detail = f"{_short(a.predicted)} predicted; {a.images} held-back inputs"
    facts.append(Fact(_brief(a.divergence), name, detail, "loss"))
    return facts


def _changed_classes(a: Agreement | None) -> int | None:
    return None if a is None or a.same_class is None else round((1 - a.same_class) * a.images)


def verdict(report: Report) -> str:
    """The whole report in one sentence."""
    macs = _fewer("MACs", report.macs_before, report.macs, count)
    time = _time(report)
    gained = [f"{macs.value} {macs.label}"]
    row = headline(report)
    if time.value == "≈":
        gained.append("no measurable difference in time")
    elif time.value != "–":
        where = f" in {runtime_words(row.runtime)} on {threads(row.threads)}" if row else ""
        gained.append(f"{time.value} {time.label}{where}")
    a = report.agreement
    if a is None:
        lost = "what that costs in quality was not measured, as there were no calibration inputs"
    elif a.same_class is not None:
        lost = f"the class is the same for {100 * a.same_class:.1f}% of {a.images} held-back inputs"
    else:
        lost = f"the outputs' relative error on {a.images} held-back inputs is {_brief(a.divergence)}"
    if report.accuracy:
        before, after = report.accuracy
        goes = f"goes from {_percent(before)} to {_percent(after)}"
        lost += (
            f", and top-1 accuracy {goes if abs(after - before) >= 5e-4 else f'stays at {_percent(after)}'}"
        )
    joint = " but " if time.tone == "loss" else " and "
    return f"{joint.join(gained)}; {lost}."


def notes(report: Report) -> list[str]:
    """What to look out for."""
    found = []
    short = sum(la.samples is not None and la.samples < (la.samples_wanted or 0) for la in report.layers)
    if short:
        layers = "layer was" if short == 1 else "layers were"
        found.append(f"{short} {layers} fitted to fewer samples than wanted; more calibration inputs help.")
    if report.skipped:
        names = ", ".join(report.skipped[:3]) + (", …" if len(report.skipped) > 3 else "")
        found.append(f"{len(report.skipped)} calibration files could not be read: {names}.")
    row = headline(report)
    if row is not None and row.faster is not None and row.faster.median is not None and row.faster.median < 1:
        found.append(
            "Fewer MACs did not mean less time here: standard operators send what lies between the stages "
            "through memory. Try --emit fused, or a budget in time (--latency)."
        )
    found += [f"Not timed: {why}" for why in report.not_timed]
    found.append(
        f"The written network differs from the plan's own arithmetic by {report.difference:.1e} (relative)."
    )
    return found


# --- layers


def layer_views(report: Report) -> list[LayerView]:
    """Every layer with its times and drawings."""
    timed = {row.name: row for times in _layer_times(report) for row in times}
    views = []
    for index, layer in enumerate(report.layers, 1):
        row = timed.get(layer.name)
        views.append(
            LayerView(
                index,
                layer,
                layer.family != "kept",
                family_words(layer),
                row.timings[0] if row else None,
                row.timings[1] if row else None,
                row.faster[1] if row else None,
                structure(layer),
                spectrum(layer.name, layer.energy, _terms(layer)),
                sample_note(layer),
            )
        )
    return views


def _layer_times(report: Report) -> list[tuple[Any, ...]]:
    profiles = report.benchmark.layers if report.benchmark else ()
    return [profile.layers for profile in profiles[:1]]


def _other_times(report: Report) -> list[OtherTime]:
    rows = {row.name: row for times in _layer_times(report) for row in times}
    names = [name for name in (REORDER, REST, TOTAL) if name in rows]
    return [OtherTime(name, *rows[name].timings[:2]) for name in names]


def family_words(layer: LayerReport) -> str:
    """What a layer became: the families in words, each with its sizes."""
    names = [REGISTRY[part].label if part in REGISTRY else part for part in layer.family.split("+")]
    if len(names) == 1:
        return f"{names[0]}, {layer_sizes(layer)}"
    if len(names) == 2:  # the second is applied to every stage of the first that has a kernel
        return f"{names[0]}, {layer.sizes[0]}; then {names[1]}, {' and '.join(map(str, layer.sizes[1:]))}"
    return f"{', then '.join(names)}: {' '.join(map(str, layer.sizes))}"


def _terms(layer: LayerReport) -> float | None:
    """Components per channel that are kept, on average, where that is what the size means."""
    if layer.before is None or not layer.sizes:
        return None
    if spreads_terms(layer.family):
        return layer.sizes[0] * layer.before.groups / layer.before.n_i
    return None


# --- curves


def _planned_loss(report: Report) -> str:
    return "kl" if any(d.original for d in report.disagreements) else ""


def _loss_name(loss: str) -> str:
    return {"kl": "KL divergence (nats)", "relative": "relative error"}.get(loss, "predicted loss")


def _curve(report: Report) -> Chart | None:
    rows = [row for row in report.curve if row.predicted_loss > 0]
    if len(rows) < 2:
        return None
    before, a = report.macs_before, report.agreement
    ratio = before / report.macs if report.macs else 1.0
    points = [Point(before / row.macs, row.predicted_loss, "", "plain") for row in rows]
    if a is not None:
        points.append(Point(ratio, a.divergence, "this run", "run"))
        points.append(Point(ratio, a.predicted, "predicted", "hollow"))
    name = _loss_name(a.loss if a else "")
    said = "; ".join(f"{before / r.macs:.2f} times fewer MACs: {_short(r.predicted_loss)}" for r in rows)
    measured = f" This run: {ratio:.2f} times fewer MACs, measured {_short(a.divergence)}." if a else ""
    return plot(
        "What other budgets would lose",
        f"Predicted {name} by budget. {said}.{measured}",
        "times fewer MACs",
        name,
        [Series("predicted", tuple((before / row.macs, row.predicted_loss) for row in rows))],
        points,
    )


def _sweep_chart(sweep: Sweep) -> Chart | None:
    def at(p: SweepPoint) -> float:
        return p.macs_before / p.macs

    measured = [p for p in sweep.points if p.agreement]
    compared = [c.point for c in sweep.compared if c.point.agreement]
    knee = None if sweep.knee is None else sweep.points[sweep.knee]
    name = _loss_name(sweep.loss)
    points = [
        Point(at(p), p.agreement.divergence, "knee" if p is knee else "", "run" if p is knee else "measured")
        for p in measured
        if p.agreement
    ]
    points += [Point(at(p), p.agreement.divergence, p.budget, "hollow") for p in compared if p.agreement]
    if knee is not None and not knee.agreement:
        points.append(Point(at(knee), knee.predicted_loss, "knee", "run"))
    told = "; ".join(
        f"{at(p):.2f} times fewer MACs: "
        + _short(p.agreement.divergence if p.agreement else p.predicted_loss)
        for p in sweep.points
    )
    return plot(
        "What is lost at every budget",
        f"{name} by budget. {told}." + (f" The knee is at {at(knee):.2f} times fewer MACs." if knee else ""),
        "times fewer MACs",
        name,
        [
            Series("predicted", tuple((at(p), p.predicted_loss) for p in sweep.points)),
            Series("measured", tuple((at(p), p.agreement.divergence) for p in measured if p.agreement)),
        ],
        points,
    )


def _knee_facts(knee: SweepPoint) -> list[Fact]:
    facts = [
        _fewer("MACs", knee.macs_before, knee.macs, count),
        _fewer("parameters", knee.parameters_before, knee.parameters, count),
    ]
    return facts + (_agreement_facts(knee.agreement) if knee.agreement else [])


# --- inputs


@dataclass(frozen=True)
class SampleView:
    """One input on which the networks differ."""

    sample: int
    divergence: float
    picture: str  # as a data address; empty if it is none
    original: str
    new: str
    changed: bool


def _samples(report: Report) -> list[SampleView]:
    pictures = [*report.pictures, *([b""] * (len(report.disagreements) - len(report.pictures)))]
    found = []
    for d, picture in zip(report.disagreements, pictures, strict=True):
        told = [f"class {a.chosen} ({100 * a.probability:.0f}%)" if a else "" for a in (d.original, d.new)]
        changed = bool(d.original and d.new and d.original.chosen != d.new.chosen)
        address = f"data:image/png;base64,{base64.b64encode(picture).decode()}" if picture else ""
        found.append(SampleView(d.sample, d.divergence, address, told[0], told[1], changed))
    return found


# --- printing


def _short(value: float | None) -> str:
    """Three digits, and no exponent where it can be done without."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:.2e}" if abs(value) < 1e-4 else f"{value:.3g}"


def runtime_words(name: str) -> str:
    """What a runtime calls itself."""
    return RUNTIMES.get(name, name)


def _brief(value: float) -> str:
    """Two digits."""
    return "0" if value == 0 else f"{value:.1e}" if abs(value) < 1e-4 else f"{value:.2g}"


def _ms(value: float) -> str:
    """Three digits, noughts at the end included, so that columns line up."""
    if value < 0.1:  # what a profiler tells, in whole microseconds
        return f"{1000 * value:.0f} µs"
    number, unit = (value, "ms") if value < 1000 else (value / 1000, "s")
    return f"{number:#.3g}".removesuffix(".") + f" {unit}"


def _breakable(name: str) -> Markup:
    """A layer's name that may be broken between the modules it stands in."""
    return Markup("").join(escape(part) + Markup("<wbr>") for part in re.split(r"(?<=[/.])", name))


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} bytes"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


FILTERS: Mapping[str, Any] = {
    "count": count,
    "short": _short,
    "ms": _ms,
    "bytes": _bytes,
    "percent": _percent,
    "faster": faster,
    "threads": threads,
    "breakable": _breakable,
    "runtime": runtime_words,
    "times_fewer": lambda after, before: times(before, after),
}


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment


def _page(template: str, **values: Any) -> str:
    from netdecouple.version import __version__

    return _environment().get_template(template).render(version=__version__, **values)
