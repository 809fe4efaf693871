"""Compute the parts of a report from what was planned and applied, and from both networks' outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from netdecouple.convolution import ConvGeometry, Factorization
from netdecouple.fitting.apply import Applied
from netdecouple.network import Array, Layer
from netdecouple.planning.boxes import found_again, layout_of
from netdecouple.planning.cost import Budget
from netdecouple.planning.divergence import (
    TINY,
    Comparison,
    Loss,
    agreement,
    divergence,
    log_probabilities,
    same_texts,
)
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.planning.planner import used
from netdecouple.planning.tolerance import decibels, squared_errors
from netdecouple.report.formatting import by
from netdecouple.report.model import Agreement, Answer, Disagreement, LayerReport, Stage

ROWS_PER_UNKNOWN = 10  # samples per unknown below which a layer's fit is called short of samples
# share of inputs, dB, share of boxes, relative error: beyond, outputs changed a lot
SAME_CLASS, PSNR, BOXES, ERROR = 0.95, 35.0, 0.9, 0.05
SURPRISE = 3.0  # times the predicted divergence
MUCH = 0.9  # share of a budget that is used, below which a report says so
NEGLIGIBLE = 1e-3  # divergence of which no one is warned
DISAGREEMENTS = 8  # inputs shown in a report, those whose outputs changed most


def quality_of(
    loss: Loss, predicted: float, images: int, original: Sequence[Array], new: Sequence[Array]
) -> Agreement:
    """Compare both networks' outputs on ``images`` held-out inputs by a loss."""
    is_classifier = loss == "kl"
    errors = squared_errors(original, new) if all(map(_is_picture, original)) else None
    boxes, boxes_found = _boxes(images, original, new)
    return Agreement(
        images=images,
        loss=loss,
        divergence=divergence(original, new, loss),
        predicted=predicted,
        same_class=agreement(original[0], new[0]) if is_classifier else None,
        boxes=boxes,
        boxes_found=boxes_found,
        psnr=None if errors is None else decibels(float(errors.mean())),
        same_text=same_texts(original, new, images),
    )


def _boxes(images: int, original: Sequence[Array], new: Sequence[Array]) -> tuple[int | None, float | None]:
    """Count a detector's boxes, and the share that is found again; None if they are not recognised."""
    layout = layout_of(original, images)
    if layout is None or any(a.shape != b.shape for a, b in zip(original, new, strict=True)):
        return None, None
    hits, boxes, _ = found_again(layout.detections(original), layout.detections(new))
    return boxes, hits / boxes if boxes else None


def _is_picture(output: Array) -> bool:
    return (
        output.ndim == 4
        and output.dtype.kind == "f"
        and (output.shape[1] in (1, 3) or output.shape[3] in (1, 3))
    )


def chance_warning(accuracy: float, majority: float) -> tuple[str, ...]:
    """Warn if the original is no more often right than one answer for all inputs would be."""
    if accuracy > majority:
        return ()
    return (
        f"the original is right for {accuracy:.1%} of the labelled inputs, one answer for all would be for "
        f"{majority:.1%}; check the labels and the preprocessing",
    )


def unused_warning(
    budgets: Sequence[Budget], layers: Sequence[Layer], written: Sequence[Layer]
) -> tuple[str, ...]:
    """Say what a written network uses of its budgets if that is little."""
    budget = max(budgets, key=lambda b: used(b, layers, written), default=None)
    if budget is None or (use := used(budget, layers, written)) >= MUCH:
        return ()
    left = f"{100 * use * budget.share:.3g}% {budget.cost.unit}"
    return (f"{left} are left, where {budget} was asked for; no plan with more is predicted to lose less",)


def busy_warning(lost: float) -> str:
    """Warn that times were measured beside other work, which took a share of the time."""
    return (
        f"other work took {lost:.0%} of the processor while times were measured; they were corrected for it, "
        "and are more exact without it"
    )


def warnings_of(a: Agreement) -> tuple[str, ...]:
    """Warn of outputs that changed a lot, or far more than predicted."""
    changes = []
    if a.same_class is not None and a.same_class < SAME_CLASS:
        changes.append(f"another class for {a.changed_classes} of {a.images} held-out inputs")
    elif a.same_text is not None and a.same_text < SAME_CLASS:
        changes.append(
            f"another text for {round((1 - a.same_text) * a.images)} of {a.images} held-out inputs"
        )
    elif a.psnr is not None and a.psnr < PSNR:
        changes.append(f"a PSNR of {a.psnr:.1f} dB between the outputs")
    elif a.boxes_found is not None and a.boxes_found < BOXES:
        changes.append(f"{a.boxes_found:.0%} of {a.boxes} boxes are found again")
    elif a.same_class is a.psnr is a.boxes_found is a.same_text is None and a.divergence > ERROR:
        changes.append(f"a relative error of {a.divergence:.2g} of the outputs")
    if a.divergence > max(SURPRISE * a.predicted, NEGLIGIBLE):
        changes.append(f"{a.divergence / max(a.predicted, TINY):.1f} times the change that was predicted")
    advice = "ask for a larger budget, give more inputs, or say with `within` what must be kept"
    return tuple(f"the outputs changed a lot: {change}; {advice}" for change in changes)


def disagreements_of(
    plan: Plan, places: Sequence[int], original: Sequence[Array], new: Sequence[Array]
) -> tuple[Disagreement, ...]:
    """List the held-out inputs whose outputs differ most, worst first.

    ``places`` are the positions of the held-out inputs in the calibration set. The list is empty if the
    outputs are not one per input.
    """
    is_classifier = plan.loss == "kl"
    losses = Comparison(original, plan.loss).divergences(new)
    if losses is None or len(losses) != len(places):
        return ()
    answers = [_answers(outputs[0]) if is_classifier else [None] * len(losses) for outputs in (original, new)]
    worst = np.argsort(-losses, kind="stable")[:DISAGREEMENTS]
    columns = zip(places, losses.tolist(), *answers, strict=True)
    rows = [Disagreement(sample=int(n), divergence=d, original=was, new=now) for n, d, was, now in columns]
    return tuple(rows[i] for i in worst if losses[i] > 0)


def _answers(outputs: Array) -> list[Answer | None]:
    probabilities = np.exp(log_probabilities(outputs))
    return [Answer(chosen=int(row.argmax()), probability=float(row.max())) for row in probabilities]


def layer_reports(
    layers: Mapping[str, Layer], applied: Applied, written: Iterable[Layer], energies: Mapping[str, Array]
) -> tuple[LayerReport, ...]:
    """Report on every layer of a plan, in its order.

    Args:
        layers: the original network's layers by name.
        applied: the plan with its fitted layers.
        written: the layers of the written network, named after the layer they replace: conv1/pointwise1.
            Their costs are reported: they can be less than planned, as unread filters are removed.
        energies: per layer, cumulative shares of the weights' energy by T.
    """
    macs, parameters = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    for part in written:
        name = max((n for n in layers if f"{part.name}/".startswith(f"{n}/")), key=len)
        macs[name] += part.macs
        parameters[name] += part.parameters
    rows = []
    for row in applied.plan.layers:
        layer, g, samples = layers[row.name], layers[row.name].geometry, applied.samples.get(row.name)
        fitted = applied.factorizations.get(row.name)
        unknowns = 0 if g is None else g.unknowns
        rows.append(
            LayerReport(
                name=row.name,
                operator=row.operator,
                shape=describe(layer),
                family=row.family,
                reason=row.reason,
                sizes=row.sizes,
                terms_per_channel=_terms_per_channel(layer, row),
                macs_before=row.macs_before,
                macs=macs[row.name],
                parameters_before=row.parameters_before,
                parameters=parameters[row.name],
                predicted_error=row.predicted_error if row.changed else None,
                measured_error=applied.errors.get(row.name),
                ridge=row.ridge or None,
                samples=samples,
                samples_wanted=None if samples is None else ROWS_PER_UNKNOWN * unknowns,
                inputs=0 if g is None else g.groups * unknowns,
                dependent=applied.dependent.get(row.name),
                before=None if g is None else _stage(g, layer.size, g.n_i, layer.maps),
                stages=() if fitted is None else _stages(layer, fitted),
                energy=tuple(round(float(share), 6) for share in energies.get(row.name, ())),
            )
        )
    return tuple(rows)


def _terms_per_channel(layer: Layer, row: LayerPlan) -> tuple[int, int] | None:
    if row.family != "nd-dp" or not row.channels or layer.geometry is None:
        return None
    counts = np.bincount(row.channels[0], minlength=layer.geometry.n_i)
    return int(counts.min()), int(counts.max())


def _stages(layer: Layer, factorization: Factorization) -> tuple[Stage, ...]:
    """Describe the convolutions that replace a layer, in order."""
    size, stages = layer.size, []
    for stage in factorization.stages:
        reads = stage.geometry.n_i if stage.channels is None else len(np.unique(stage.channels))
        stages.append(_stage(stage.geometry, size, reads, layer.maps))
        size = stage.geometry.output_size(*size)
    return tuple(stages)


def _stage(g: ConvGeometry, size: tuple[int, int], reads: int, maps: float) -> Stage:
    return Stage(
        kind="pointwise" if g.is_pointwise else "depthwise" if g.groups == g.n_i > 1 else "convolution",
        reads=reads,
        n_i=g.n_i,
        n_o=g.n_o,
        kernel=(g.kh, g.kw),
        groups=g.groups,
        macs=round(g.macs(*size) * maps),
    )


def describe(layer: Layer) -> str:
    """Return a layer's shape as a short text: 64→128 3×3 @28, with a stride 64→128 3×3 /2 @56, or 64→10."""
    g = layer.geometry
    if g is None:
        return ""
    if g.is_pointwise and g.groups == 1 and layer.size == (1, 1):
        return f"{g.n_i}→{g.n_o}"
    parts = [f"{g.n_i}→{g.n_o}", by((g.kh, g.kw))]
    if g.strides != (1, 1):
        parts.append(f"/{by(dict.fromkeys(g.strides))}")
    if g.dilations != (1, 1):
        parts.append(f"dilated {by(dict.fromkeys(g.dilations))}")
    if g.groups > 1:
        parts.append(f"{g.groups} groups")
    parts.append(f"@{by(dict.fromkeys(layer.size))}")
    return " ".join(parts)
