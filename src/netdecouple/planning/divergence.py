"""How far a network's outputs are from the original's. No labels are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import ModelError
from netdecouple.network import Array
from netdecouple.planning.boxes import layout_of

Loss = Literal["kl", "relative", "boxes"]
WORST = 1e9  # the divergence of outputs that are NaN or Inf: more than any finite outputs have
TINY = float(np.finfo(float).tiny)
APART = 30.0  # times the next smaller scale, from which channels of an output are numbers of another kind
BLOCK = 1 << 18  # numbers that are compared at a time, so that they stay in the cache
CONSTANT = 1e-3  # least scale of a channel, relative to its own size


def loss_kind(outputs: Sequence[Array], count: int, requested: Loss | None = None) -> Loss:
    """Return what is requested, or what fits the outputs for ``count`` inputs.

    That is KL for a classifier (one output (n, classes)), and the weighted error of boxes and scores for a
    detector whose outputs are recognised.

    Raises:
        ModelError: KL is requested, and the network is not a classifier; or boxes, and it is no detector.
    """
    first = outputs[0]
    scores = first.ndim == 2 and first.dtype.kind == "f" and len(first) == count and first.shape[1] > 1
    is_classifier = len(outputs) == 1 and scores
    if requested == "kl" and not is_classifier:
        shapes = ", ".join(str(output.shape) for output in outputs)
        raise ModelError(
            f"loss=kl is for a single output (N, classes), and {count} inputs gave {shapes}; leave it out"
        )
    layout = layout_of(outputs, count) if requested in (None, "boxes") else None
    has_boxes = layout is not None and not layout.is_list
    if requested == "boxes" and not has_boxes:
        raise ModelError("loss=boxes is for outputs that are recognised as a detector's; leave it out")
    return requested or ("kl" if is_classifier else "boxes" if has_boxes else "relative")


@dataclass(frozen=True)
class Comparison:
    """Compares outputs with those of the original network, of which the rest is found out once."""

    original: Sequence[Array]
    loss: Loss

    def divergence(self, other: Sequence[Array]) -> float:
        """Return the mean divergence of a network's outputs from the original's, at most `WORST`."""
        if self._of_boxes is not None and self._are_alike(other):
            return _limited(float(self._box_errors(other).mean()))
        rows = zip(self.original, other, self._weights, strict=True)
        with np.errstate(over="ignore", invalid="ignore"):
            mean = np.mean(
                [
                    max(float(np.mean(_kl(a, b))), 0.0)
                    if self.loss == "kl" and a.shape == b.shape
                    else _relative_error(a, b, weights)
                    for a, b, weights in rows
                ]
            )
        return _limited(float(mean))

    def divergences(self, other: Sequence[Array]) -> Array | None:
        """Return the divergence of every sample (n,), whose mean is about `divergence`.

        None if the outputs' first axes are not the same samples.
        """
        count = len(self.original[0]) if self.original[0].ndim else 0
        if not self._are_alike(other) or not all(
            a.ndim and a.size and len(a) == count for a in self.original
        ):
            return None
        if self._of_boxes is not None:
            return self._box_errors(other)
        per_output = [
            np.maximum(_kl(a, b), 0.0) if self.loss == "kl" else _squares(a, b, weights) * len(a) / a.size
            for a, b, weights in zip(self.original, other, self._weights, strict=True)
        ]
        return np.mean(per_output, axis=0)  # type: ignore[no-any-return]

    @cached_property
    def _weights(self) -> list[Array]:
        return [weights_of(output) for output in self.original]

    @cached_property
    def _of_boxes(self) -> list[Array] | None:
        """The weights of a detector's boxes and scores; None if they are not recognised, or not asked for."""
        if self.loss != "boxes":
            return None
        layout = layout_of(self.original, len(self.original[0]))
        return None if layout is None or layout.is_list else layout.weights(self.original)

    def _are_alike(self, other: Sequence[Array]) -> bool:
        return all(a.shape == b.shape for a, b in zip(self.original, other, strict=True))

    def _box_errors(self, other: Sequence[Array]) -> Array:
        """Every image's weighted error of boxes and scores."""
        rows = zip(self.original, other, self._of_boxes or (), strict=True)
        parts = [_squares(a, b, weights) for a, b, weights in rows if weights.any()]
        return len(self.original[0]) * np.sum(parts, axis=0)  # type: ignore[no-any-return]


def divergence(original: Sequence[Array], other: Sequence[Array], loss: Loss) -> float:
    """Return the mean divergence of a network's outputs from the original's, at most `WORST`."""
    return Comparison(original, loss).divergence(other)


def _limited(mean: float) -> float:
    return min(mean, WORST) if np.isfinite(mean) else WORST


def _kl(original: Array, other: Array) -> Array:
    """KL(p ‖ q) of every sample in nats, but for rounding, from logits or probabilities (n, classes)."""
    p, q = log_probabilities(original), log_probabilities(other)
    return np.sum(np.exp(p) * (p - q), axis=-1)  # type: ignore[no-any-return]


def log_probabilities(outputs: Array) -> Array:
    """Return the log-softmax of logits (n, classes), or the logarithm of outputs that are probabilities."""
    outputs = np.asarray(outputs, np.float64)
    if are_probabilities(outputs):
        return np.log(np.maximum(outputs, 1e-12))
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def are_probabilities(outputs: Array) -> bool:
    """Whether a classifier's outputs (n, classes) are probabilities, and no logits."""
    return bool(outputs.min(initial=0.0) >= 0 and np.allclose(outputs.sum(axis=-1), 1, atol=1e-3))


def relative_error(original: Array, other: Array) -> float:
    """Return the mean of |other − original|², relative to the original's variance.

    Where an output's channels have parts of different scale (`parts_of`), it is the mean over the parts.
    Outputs of different shapes (a detector that finds more or fewer boxes) have a relative error of 1.
    """
    return _relative_error(original, other, weights_of(original))


def _relative_error(original: Array, other: Array, weights: Array) -> float:
    if original.shape != other.shape:
        return 1.0
    if not original.size:
        return 0.0
    return float(_squares(np.atleast_1d(original), np.atleast_1d(other), weights).sum() / original.size)


def _squares(original: Array, other: Array, weights: Array) -> Array:
    """Return the weighted sum of squared differences of every sample (n,); the weights broadcast."""
    count = len(original)
    weights = np.broadcast_to(weights, (*[1] * (original.ndim - weights.ndim), *weights.shape))
    together = tuple(axis for axis in range(1, original.ndim) if weights.shape[axis] == 1)
    step = max(BLOCK * count // original.size, 1)
    sums = np.zeros(count)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        squares = np.square(np.subtract(other[rows], original[rows], dtype=np.float64))
        weighted = squares.sum(axis=together, keepdims=True) * (
            weights if len(weights) == 1 else weights[rows]
        )
        sums[rows] = weighted.reshape(len(squares), -1).sum(axis=1)
    return sums


def weights_of(output: Array) -> Array:
    """Return the weight of every number in the mean of squares that is a relative error; it broadcasts."""
    axis, parts = parts_of(output)
    if len(parts) == 1:
        return np.array(1 / _variance(output))
    columns = np.moveaxis(output, axis, 0)
    weights = np.ones((len(columns), *[1] * (output.ndim - 1)))
    for part in parts:
        numbers = columns[part]
        variance = max(_variance(numbers), CONSTANT**2 * float(np.square(numbers, dtype=np.float64).mean()))
        weights[part] = len(columns) / (len(parts) * len(part) * variance)
    return np.moveaxis(weights, 0, axis)


def parts_of(output: Array) -> tuple[int, list[NDArray[np.int64]]]:
    """Return an output's axis of channels, and the channels of every part of it that has a scale of its own.

    Only outputs (N, cells, channels) or (N, channels, cells) have several: boxes in pixels, say, with scores
    and masks' coefficients beside them. Channels that are between 0 and 1 are taken for scores, and have one
    scale, so that a class that is never seen makes no part of its own.
    """
    axis = 1 if output.ndim != 3 or output.shape[1] < output.shape[2] else 2
    if output.ndim != 3 or output.dtype.kind != "f" or not output.size:
        return axis, [np.arange(1)]
    numbers = np.moveaxis(output, axis, 0).reshape(output.shape[axis], -1).astype(np.float64)
    scales = np.maximum(numbers.std(axis=1), CONSTANT * np.sqrt(np.square(numbers).mean(axis=1)))
    are_scores = (numbers.min(axis=1) >= 0) & (numbers.max(axis=1) <= 1)
    scales[are_scores] = np.sqrt(np.square(scales[are_scores]).mean()) if are_scores.any() else 0.0
    order = np.argsort(scales, kind="stable")
    smaller, larger = scales[order][:-1], scales[order][1:]
    return axis, np.split(order, np.flatnonzero((larger > APART * smaller) & (smaller > 0)) + 1)


def _variance(a: Array) -> float:
    """The variance of an output, or of its rounding where it is constant."""
    power = float(np.square(a, dtype=np.float64).mean())
    return max(float(a.var(dtype=np.float64)), 1e-12 * power, TINY)


def rounding(original: Sequence[Array], other: Sequence[Array]) -> float:
    """Return the largest RMS difference of an output, relative to its own RMS: 1e-6 is float32 rounding.

    Integers (classes, indices) and outputs whose shape depends on the values can change by more if anything
    is rounded otherwise; they count only if there are no other outputs.
    """
    pairs = list(zip(original, other, strict=True))
    steady = [(a, b) for a, b in pairs if a.dtype.kind == "f" and a.shape == b.shape]
    return max((_rounding(a, b) for a, b in steady or pairs if a.size), default=0.0)


def _rounding(original: Array, other: Array) -> float:
    if original.shape != other.shape:
        return np.inf
    a, b = np.asarray(original, np.float64), np.asarray(other, np.float64)
    rms = np.sqrt(np.square(a - b).mean() / max(np.square(a).mean(), TINY))
    return float(rms) if np.isfinite(rms) else np.inf


def agreement(original: Array, other: Array) -> float:
    """Return the share of samples for which two classifiers choose the same class."""
    return float(np.mean(original.argmax(axis=-1) == other.argmax(axis=-1)))


Text = tuple[int, ...]  # classes, one for each letter


def best_steps(outputs: Sequence[Array], count: int) -> Array | None:
    """Return the best class of every step (n, steps) for ``count`` inputs of a CTC reader (Graves 2006).

    None unless the only output is (n, steps, classes) or, for one input, (steps, 1, classes), and has
    probabilities over the classes, or their logarithms.
    """
    scores = outputs[0]
    if len(outputs) != 1 or scores.ndim != 3 or scores.dtype.kind != "f" or not scores.size:
        return None
    if scores.shape[1] == 1 and len(scores) % count == 0:  # the steps of all inputs, one after the other
        scores = scores.reshape(count, -1, scores.shape[2])
    with np.errstate(over="ignore"):
        is_softmax = are_probabilities(scores) or are_probabilities(np.exp(scores.astype(np.float64)))
    _, steps, classes = scores.shape
    return scores.argmax(axis=-1) if is_softmax and len(scores) == count and steps > 1 < classes - 1 else None


def texts(best: Array, blank: int) -> list[Text]:
    """Read the texts off the best class of every step (n, steps): repeats are merged, then blanks dropped."""
    starts = np.diff(best, axis=1, prepend=-1) != 0
    return [tuple(row[new & (row != blank)].tolist()) for row, new in zip(best, starts, strict=True)]


def same_texts(original: Sequence[Array], other: Sequence[Array], count: int) -> float | None:
    """Return the share of inputs in which two readers read the same text; None if they are no readers.

    Blank is the first or the last class, whichever the original chooses more often.
    """
    known, new = best_steps(original, count), best_steps(other, count)
    ends = (0, original[0].shape[-1] - 1) if known is not None else ()
    often = {blank: np.count_nonzero(known == blank) for blank in ends}
    if known is None or not max(often.values()):
        return None
    blank = max(often, key=lambda end: often[end])
    if new is None:
        return 0.0
    return float(np.mean([a == b for a, b in zip(texts(known, blank), texts(new, blank), strict=True)]))
