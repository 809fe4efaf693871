"""How much the network's output changes when one layer is approximated. No labels are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import ModelError

Array = NDArray[np.floating]
Loss = Literal["kl", "relative"]
LOST = 1e9  # the divergence of outputs that are no numbers any more: more than any that are


def loss_kind(outputs: Sequence[Array], count: int, wanted: Loss | None = None) -> Loss:
    """KL for a classifier (one output (n, classes) for n inputs), relative squared error for all else.

    Raises:
        ModelError: KL is wanted, and the network is no classifier.
    """
    first = outputs[0]
    scores = first.ndim == 2 and first.dtype.kind == "f" and len(first) == count and first.shape[1] > 1
    is_classifier = len(outputs) == 1 and scores
    if wanted == "kl" and not is_classifier:
        shapes = ", ".join(str(output.shape) for output in outputs)
        raise ModelError(
            f"--loss kl is for a single output (N, classes), and {count} inputs gave {shapes}; leave it out"
        )
    return wanted or ("kl" if is_classifier else "relative")


def divergence(original: Sequence[Array], other: Sequence[Array], loss: Loss) -> float:
    """Mean divergence of a network's outputs from the original's, at most `LOST`."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.mean(
            [
                _mean_kl(a, b) if loss == "kl" and a.shape == b.shape else relative_error(a, b)
                for a, b in zip(original, other, strict=True)
            ]
        )
    return min(float(found), LOST) if np.isfinite(found) else LOST


def divergences(original: Sequence[Array], other: Sequence[Array], loss: Loss) -> Array | None:
    """The divergence on every sample (n,), of which `divergence` is about the mean.

    None where it cannot be told apart: outputs whose first axes are not the same samples.
    """
    pairs = list(zip(original, other, strict=True))
    if any(a.shape != b.shape or not (a.ndim and a.size) or len(a) != len(original[0]) for a, b in pairs):
        return None
    found = [_kl(a, b) if loss == "kl" else _relative(a, b) for a, b in pairs]
    return np.mean(found, axis=0)  # type: ignore[no-any-return]


def _kl(original: Array, other: Array) -> Array:
    """KL(p ‖ q) of every sample in nats, from logits or probabilities (n, classes)."""
    p, q = log_probabilities(original), log_probabilities(other)
    return np.maximum(np.sum(np.exp(p) * (p - q), axis=-1), 0.0)  # type: ignore[no-any-return]


def _relative(original: Array, other: Array) -> Array:
    """Every sample's share in `relative_error`, times their number."""
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (original, other))
    return np.square(a - b).mean(axis=1) / max(a.var(), 1e-12 * np.square(a).mean(), np.finfo(float).tiny)  # type: ignore[no-any-return]


def _mean_kl(original: Array, other: Array) -> float:
    """Mean KL(p ‖ q) in nats, from logits or probabilities (n, classes)."""
    p, q = log_probabilities(original), log_probabilities(other)
    return max(float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1))), 0.0)


def log_probabilities(outputs: Array) -> Array:
    """Log-softmax of logits (n, classes); outputs that are probabilities already are only logged."""
    outputs = np.asarray(outputs, np.float64)
    if outputs.min(initial=0.0) >= 0 and np.allclose(outputs.sum(axis=-1), 1, atol=1e-3):
        return np.log(np.maximum(outputs, 1e-12))
    shifted = outputs - outputs.max(axis=-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs


def relative_error(original: Array, other: Array) -> float:
    """|other − original|² relative to the original's variance.

    Outputs of differing shapes (a detector that found more or fewer boxes) count as 1, all lost.
    """
    if original.shape != other.shape:
        return 1.0
    if not original.size:
        return 0.0
    a, b = np.asarray(original, np.float64), np.asarray(other, np.float64)
    return float(np.square(a - b).mean() / max(a.var(), 1e-12 * np.square(a).mean(), np.finfo(float).tiny))


def rounding(original: Sequence[Array], other: Sequence[Array]) -> float:
    """The largest RMS difference of an output, relative to its own RMS: 1e-6 where only rounding differs.

    Whole numbers (classes, indices), and outputs whose sizes depend on the numbers, can change by more with
    any rounding; they are looked at only if there are no others.
    """
    pairs = list(zip(original, other, strict=True))
    steady = [(a, b) for a, b in pairs if a.dtype.kind == "f" and a.shape == b.shape]
    return max((_rounding(a, b) for a, b in steady or pairs if a.size), default=0.0)


def _rounding(original: Array, other: Array) -> float:
    if original.shape != other.shape:
        return np.inf
    a, b = np.asarray(original, np.float64), np.asarray(other, np.float64)
    found = np.sqrt(np.square(a - b).mean() / max(np.square(a).mean(), np.finfo(float).tiny))
    return float(found) if np.isfinite(found) else np.inf


def agreement(original: Array, other: Array) -> float:
    """Share of samples on which two classifiers choose the same class."""
    return float(np.mean(original.argmax(axis=-1) == other.argmax(axis=-1)))
