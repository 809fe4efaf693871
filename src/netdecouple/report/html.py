"""The report, a sweep and an inspection, each as one self-contained page."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import isfunction
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from netdecouple.families.base import REGISTRY, spreads_terms, used_by
from netdecouple.report import formatting as fmt
from netdecouple.report.build import describe
from netdecouple.report.charts import Chart, Point, Series, plot, spectrum, structure
from netdecouple.report.inspection import Inspection
from netdecouple.report.model import Agreement, LayerReport, Report
from netdecouple.report.sweep import Sweep, SweepPoint
from netdecouple.runtimes.benchmark import TimedLayer
from netdecouple.runtimes.layers import REORDER, REST, TOTAL
from netdecouple.version import __version__

RUNTIMES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "PyTorch",
    "torch.compile": "torch.compile",
}
LOSSES = {"kl": "KL divergence (nats)", "relative": "relative error", "boxes": "error of boxes and scores"}
OTHERS = {REORDER: " (between plain and blocked tensors)", REST: " (nodes outside all layers)", TOTAL: ""}
OPEN = 24  # changed layers up to which all drawings are shown at once


@dataclass(frozen=True)
class Fact:
    """One of the numbers at the top of a page."""

    value: str
    label: str
    detail: str  # before and after, and where it was measured
    tone: str = ""  # "gain", "loss", or nothing


def report_html(report: Report) -> str:
    """Return a report as one self-contained page."""
    profiles = report.benchmark.layers[:1] if report.benchmark else ()
    timed = {row.name: row for profile in profiles for row in profile.layers}
    layers = _layer_rows(report, timed)
    return _page(
        "report.html",
        title=f"{report.model}, decoupled",
        report=report,
        verdict=verdict(report),
        gains=gains(report),
        losses=losses(report),
        layers=layers,
        timed_layers=any(any(row["timings"]) for row in layers),
        others=[(timed[name], note) for name, note in OTHERS.items() if name in timed],
        most_macs=max((layer.macs_before for layer in report.layers), default=1) or 1,
        is_open=sum(layer.changed for layer in report.layers) <= OPEN,
        chart=_report_chart(report),
        loss_name=_loss_name(report),
        families=used_by(layer.family for layer in report.layers),
    )


def inspect_html(inspection: Inspection) -> str:
    """Return the layers of a network as one self-contained page."""
    spectra = (spectrum(la.name, inspection.energy.get(la.name, ())) for la in inspection.layers)
    return _page(
        "inspect.html",
        title=f"{inspection.model}, inspected",
        inspection=inspection,
        rows=list(zip(count(1), inspection.layers, spectra, strict=False)),
        most_macs=max((layer.macs for layer in inspection.layers), default=1) or 1,
    )


def sweep_html(sweep: Sweep) -> str:
    """Return a sweep over budgets as one self-contained page: the curve, its knee, and every point."""
    knee = sweep.best
    return _page(
        "sweep.html",
        title=f"{sweep.model}, a sweep over budgets",
        sweep=sweep,
        facts=[] if knee is None else [*_cost_facts(knee), *_agreement_facts(knee.agreement)],
        chart=_sweep_chart(sweep),
        loss_name=LOSSES[sweep.loss],
    )


# --- gain and loss


def gains(report: Report) -> list[Fact]:
    """Return MACs, time, parameters and bytes, before and after."""
    macs, parameters = _cost_facts(report)
    facts = [macs, _time(report), parameters]
    if report.bytes_before and report.bytes:
        sizes = report.bytes_before, report.bytes
        facts.append(_change(*sizes, fmt.size, "smaller in bytes", "larger in bytes"))
    return facts


def _cost_facts(costs: Report | SweepPoint) -> list[Fact]:
    return [
        _change(costs.macs_before, costs.macs, fmt.count, "fewer MACs", "more MACs"),
        _change(costs.parameters_before, costs.parameters, fmt.count, "fewer parameters", "more parameters"),
    ]


def _change(before: int, after: int, shown: Callable[[int], str], less: str, more: str) -> Fact:
    detail = f"{shown(before)} → {shown(after)}"
    if after > before:
        return Fact(fmt.times(after, before), more, detail, "loss")
    return Fact(fmt.times(before, after), less, detail, "gain")


def _time(report: Report) -> Fact:
    timed = report.headline
    if timed is None:
        if report.speed:
            s = report.speed
            detail = f"{fmt.ms(s.before)} → {fmt.ms(s.after)} in {s.place}"
            if s.share > 1:
                return Fact(f"{s.share:.2f}×", "slower", detail, "loss")
            return Fact(f"{1 / s.share:.2f}×", "faster", detail, "gain")
        return Fact("–", "time not measured", (*report.not_timed, "no times were asked for")[0])
    original, new = timed
    assert new.faster is not None
    low, median, high = new.faster.lower, new.faster.median, new.faster.upper
    value, label, tone = "≈", "no measurable difference in time", ""
    if median is not None:
        label, tone = "faster", "gain"
        if median < 1:
            low, median, high, label, tone = 1 / high, 1 / median, 1 / low, "slower", "loss"
        value = f"{median:.2f}×"
    detail = f"{fmt.ms(original.timing.median)} → {fmt.ms(new.timing.median)}, {low:.2f}–{high:.2f}×"
    return Fact(value, label, f"{detail}; {RUNTIMES[new.runtime]}, {fmt.threads(new.threads)}", tone)


def losses(report: Report) -> list[Fact]:
    """Return accuracy, agreement and divergence, as far as they were measured."""
    facts = []
    if report.accuracy:
        before, after = report.accuracy
        points = 100 * (after - before)
        value = f"{points:+.1f}".replace("-", "−") if abs(points) >= 0.05 else "±0.0"
        detail = f"{fmt.percent(before)} → {fmt.percent(after)} top-1, labelled images"
        facts.append(Fact(value, "points of accuracy", detail, "loss" if points < -0.05 else "gain"))
    return facts + _agreement_facts(report.agreement)


def _agreement_facts(a: Agreement | None) -> list[Fact]:
    if a is None:
        return []
    facts = []
    if a.same_class is not None:
        detail = f"{a.changed_classes} of {a.images} held-out inputs"
        facts.append(Fact(fmt.percent(1 - a.same_class), "get another class", detail, "loss"))
    if a.same_text is not None:
        detail = f"CTC output, best class of every step; {a.images} held-out inputs"
        facts.append(Fact(fmt.percent(1 - a.same_text), "are read as another text", detail, "loss"))
    if a.psnr is not None:
        facts.append(
            Fact(f"{a.psnr:.1f} dB", "PSNR between the outputs", f"{a.images} held-out inputs", "loss")
        )
    if a.boxes_found is not None:
        detail = f"of {a.boxes} on {a.images} held-out inputs"
        facts.append(Fact(fmt.percent(1 - a.boxes_found), "of the boxes are not found again", detail, "loss"))
    name = "KL divergence, nats" if a.loss == "kl" else f"{fmt.loss_name(a.loss)} of the outputs"
    detail = f"{fmt.short(a.predicted)} predicted; {a.images} held-out inputs"
    return [*facts, Fact(fmt.short(a.divergence, 2), name, detail, "loss")]


def verdict(report: Report) -> str:
    """Summarise the whole report in one sentence."""
    macs, time, timed = (
        _cost_facts(report)[0],
        _time(report),
        report.headline,
    )
    gained = [f"{macs.value} {macs.label}"]
    if time.value == "≈":
        gained.append(time.label)
    elif time.value != "–":
        where = f" in {RUNTIMES[timed[1].runtime]} on {fmt.threads(timed[1].threads)}" if timed else ""
        gained.append(f"{time.value} {time.label}{where}")
    a = report.agreement
    if a is None:
        lost = "the loss of quality was not measured, as there were no calibration inputs"
    elif a.same_class is not None:
        lost = f"the class is the same for {fmt.percent(a.same_class)} of {a.images} held-out inputs"
    elif a.same_text is not None:
        lost = f"the text read is the same for {fmt.percent(a.same_text)} of {a.images} held-out inputs"
    elif a.boxes_found is not None:
        lost = (
            f"{fmt.percent(a.boxes_found)} of {a.boxes} boxes are found again on {a.images} held-out inputs"
        )
    else:
        lost = f"the outputs' relative error on {a.images} held-out inputs is {fmt.short(a.divergence, 2)}"
    if report.accuracy:
        before, after = report.accuracy
        change = f"goes from {fmt.percent(before)} to" if abs(after - before) >= 5e-4 else "stays at"
        lost += f", and top-1 accuracy {change} {fmt.percent(after)}"
    joint = " but " if time.tone == "loss" else " and "
    return f"{joint.join(gained)}; {lost}."


# --- layers


def _layer_rows(report: Report, timed: Mapping[str, TimedLayer]) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "layer": layer,
            "became": family_words(layer),
            "timings": timed[layer.name].timings[:2] if layer.name in timed else (None, None),
            "structure": structure(layer),
            "spectrum": spectrum(layer.name, layer.energy, _terms(layer)),
            "note": fmt.sample_note(layer),
        }
        for number, layer in enumerate(report.layers, 1)
    ]


def family_words(layer: LayerReport) -> str:
    """What a layer became: the families in words, each with its sizes."""
    names = [REGISTRY[part].label if part in REGISTRY else part for part in layer.family.split("+")]
    if len(names) == 1:
        return f"{names[0]}, {fmt.layer_sizes(layer)}"
    if len(names) == 2:  # the second is applied to every stage of the first that has a kernel
        return f"{names[0]}, {layer.sizes[0]}; then {names[1]}, {' and '.join(map(str, layer.sizes[1:]))}"
    return f"{', then '.join(names)}: {' '.join(map(str, layer.sizes))}"


def _terms(layer: LayerReport) -> float:
    """Components per channel that are kept, on average, where that is what the size means; else 0."""
    if layer.before is None or not layer.sizes or not spreads_terms(layer.family):
        return 0.0
    return layer.sizes[0] * layer.before.groups / layer.before.n_i


# --- curves


def _loss_name(report: Report) -> str:
    return LOSSES[report.agreement.loss] if report.agreement else "predicted loss"


def _report_chart(report: Report) -> Chart | None:
    before, a = report.macs_before, report.agreement
    curve = [(before / row.macs, row.predicted_loss) for row in report.curve if row.predicted_loss > 0]
    if len(curve) < 2:
        return None
    ratio = before / report.macs if report.macs else 1.0
    points = [Point(x, y, "", "plain") for x, y in curve]
    name, measured = _loss_name(report), ""
    if a is not None:
        points.append(Point(ratio, a.divergence, "this run", "run"))
        points.append(Point(ratio, a.predicted, "predicted", "hollow"))
        measured = f" This run: {ratio:.2f} times fewer MACs, measured {fmt.short(a.divergence)}."
    title, description = "Predicted loss at other budgets", f"Predicted {name}{_described(curve)}{measured}"
    return plot(title, description, name, [Series("predicted", tuple(curve))], points)


def _sweep_chart(sweep: Sweep) -> Chart | None:
    def at(p: SweepPoint) -> tuple[float, float]:
        return p.macs_before / p.macs, p.agreement.divergence if p.agreement else p.predicted_loss

    knee = sweep.best
    measured = [p for p in sweep.points if p.agreement]
    points = [Point(*at(p), "", "measured") for p in measured if p is not knee]
    points += [Point(*at(knee), "knee", "run")] if knee else []
    points += [Point(*at(c.point), c.point.budget, "hollow") for c in sweep.compared if c.point.agreement]
    name = LOSSES[sweep.loss]
    said = f" The knee is at {at(knee)[0]:.2f} times fewer MACs." if knee else ""
    predicted = tuple((at(p)[0], p.predicted_loss) for p in sweep.points)
    return plot(
        "Loss at every budget",
        f"{name}{_described([at(p) for p in sweep.points])}{said}",
        name,
        [Series("predicted", predicted), Series("measured", tuple(map(at, measured)))],
        points,
    )


def _described(curve: Sequence[tuple[float, float]]) -> str:
    return " by budget. " + "; ".join(f"{x:.2f} times fewer MACs: {fmt.short(y)}" for x, y in curve) + "."


# --- rendering


def breakable(name: str) -> Markup:
    """Allow line breaks in a layer's name between its modules."""
    return Markup("").join(escape(part) + Markup("<wbr>") for part in re.split(r"(?<=[/.])", name))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {name: filter for name, filter in vars(fmt).items() if isfunction(filter)}
    environment.filters |= filters | {"describe": describe, "breakable": breakable}
    environment.filters["times_fewer"] = lambda after, before: fmt.times(before, after)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    environment.globals["RUNTIMES"] = RUNTIMES
    return environment


def _page(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(version=__version__, **values)
