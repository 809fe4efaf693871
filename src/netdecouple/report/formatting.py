"""Short texts for numbers, layers and notes, the same in terminal tables and on pages."""

from __future__ import annotations

import re
from collections.abc import Iterable

from netdecouple.report.model import LayerReport, Report
from netdecouple.runtimes.layers import TOTAL
from netdecouple.runtimes.timing import Ratio

LOST = 3  # layers that are named where a network is not faster


def count(number: float) -> str:
    """Format a count with three digits and a unit: 40.6 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def size(number: int) -> str:
    """Format a number of bytes: 40.6 MB."""
    return f"{count(number)}B" if number >= 1000 else f"{number} bytes"


def ms(value: float) -> str:
    """Format milliseconds with three digits, zeros at the end included, so that columns line up."""
    if value < 0.1:  # the profiler measures in whole microseconds
        return f"{1000 * value:.0f} µs"
    number, unit = (value, "ms") if value < 1000 else (value / 1000, "s")
    return f"{number:#.3g}".removesuffix(".") + f" {unit}"


def by(sizes: Iterable[int]) -> str:
    """Format sizes along axes: 3×3."""
    return "×".join(map(str, sizes))


def times(before: float, after: float) -> str:
    """Format how many times smaller ``after`` is than ``before``: 2.00×."""
    return f"{before / after:.2f}×" if after else "∞"


def short(value: float | None, digits: int = 3) -> str:
    """Format a number with some digits, and without an exponent from 1e-4 on."""
    if value is None or value == 0:
        return "" if value is None else "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:.0f}"


def percent(share: float | None) -> str:
    """Format a share: 98.5%."""
    return "" if share is None else f"{100 * share:.1f}%"


def threads(number: int) -> str:
    """Format a number of threads: 1 thread, 2 threads."""
    return "1 thread" if number == 1 else f"{number} threads"


def faster(ratio: Ratio | None, equal: str = "no measurable difference") -> str:
    """Format a ratio of times with its quartiles, 1.97× (1.95–1.99); ``equal`` stands for no median."""
    if ratio is None:
        return ""
    median = equal if ratio.median is None else f"{ratio.median:.2f}×"
    return f"{median} ({ratio.lower:.2f}–{ratio.upper:.2f})"


def speedup(share: float) -> str:
    """Format a share of the original's time: 1.97× faster, or 1.05× slower."""
    return f"{1 / share:.2f}× faster" if share <= 1 else f"{share:.2f}× slower"


def slower_layers(report: Report) -> list[tuple[str, float]]:
    """Return the layers that take longer than in the original beyond noise, with milliseconds, most first."""
    profiles = report.benchmark.layers[:1] if report.benchmark else ()
    lost = [
        (row.name, new.median - old.median)
        for row in (row for profile in profiles for row in profile.layers if row.name != TOTAL)
        for (old, new), ratio in [(row.timings[:2], row.faster[1])]
        if old and new and ratio and ratio.median is not None and ratio.median < 1
    ]
    return sorted(lost, key=lambda row: -row[1])


def advice(report: Report) -> str:
    """Say what loses time and what to do where a network is not faster; empty if it is, or was not timed."""
    if report.headline is None:
        return ""
    ratio = report.headline[1].faster
    if ratio is None or (ratio.median is not None and ratio.median >= 1):
        return ""
    lost = slower_layers(report)
    most = ", ".join(f"{name} ({ms(more)} more)" for name, more in lost[:LOST])
    rest = f" and others ({len(lost) - LOST})" if len(lost) > LOST else ""
    found = f"slower than in the original: {most}{rest}; " if lost else ""
    return f"{found}without a budget the network becomes as fast as it can, or is not written"


def layer_sizes(layer: LayerReport) -> str:
    """Format the sizes of every family in turn, and the range of terms per channel."""
    sizes = " ".join(map(str, layer.sizes))
    if layer.terms_per_channel:
        fewest, most = layer.terms_per_channel
        sizes += f" ({fewest}–{most} each)" if fewest < most else f" ({most} each)"
    return sizes


def decibels(value: float | None) -> str:
    """Format a PSNR in dB, "–" if there is none."""
    return "–" if value is None else f"{value:.2f}"


def goal(report: Report) -> str:
    """Return the budget; of a time, the share that was measured instead of the predicted one."""
    if report.speed is None:
        return report.budget
    return re.sub(r"^[\d.]+(?=% latency)", f"{100 * report.speed.share:.0f}", report.budget)


def sample_note(layer: LayerReport) -> str:
    """Describe a shortage of samples or dependent inputs in the fit of a layer; empty if there is none."""
    if layer.changed and layer.samples is None:
        return "fitted from its weights"
    if layer.lacks_samples:
        return f"{count(layer.samples or 0)} of {count(layer.samples_wanted or 0)} samples wanted"
    if layer.dependent:
        return f"{count(layer.dependent)} of {count(layer.inputs)} inputs constant or dependent"
    return ""


def refinement(report: Report) -> str:
    """Say what training the layers together has brought; empty if they were not."""
    if report.refinement is None:
        return ""
    r = report.refinement
    minutes = f"{r.seconds / 60:.1f} min"
    if r.loss >= r.loss_before:
        return f"{r.steps} steps of training in {minutes} brought nothing, and none is kept"
    loss = loss_name(report.agreement.loss if report.agreement else "")
    return f"{loss} {short(r.loss_before)} → {short(r.loss)} in {r.steps} steps of training, {minutes}"


def loss_name(loss: str) -> str:
    """Name a divergence in a sentence."""
    return {"kl": "KL divergence", "boxes": "error of boxes and scores"}.get(loss, "relative error")


def samples_note(report: Report) -> str:
    """Say how many layers lack samples; empty if none does."""
    number = sum(layer.lacks_samples for layer in report.layers)
    layers = "layer had" if number == 1 else "layers had"
    return f"{number} {layers} fewer samples than wanted; more calibration inputs help" if number else ""


def left_out_note(report: Report) -> str:
    """Name what no output needs; empty if there is nothing."""
    return f"Left out: {report.left_out}" if report.left_out else ""


def skipped_note(report: Report) -> str:
    """Name the first calibration files that could not be read; empty if all could."""
    names = ", ".join(report.skipped[:3]) + (", …" if len(report.skipped) > 3 else "")
    images = "image" if len(report.skipped) == 1 else "images"
    return f"{len(report.skipped)} unreadable {images}: {names}" if names else ""
