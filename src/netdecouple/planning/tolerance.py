"""How far a network's outputs may be from the original's, and what can be expected of new inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from netdecouple.errors import BudgetError, CalibrationError, ModelError
from netdecouple.fitting.sampling import HELD_OUT
from netdecouple.network import Array
from netdecouple.planning.divergence import (
    WORST,
    Comparison,
    Loss,
    log_probabilities,
    loss_kind,
    parts_of,
)

Kind = Literal["class", "psnr", "kl", "error"]
SAFE = 0.9  # share of the estimates that are on the safe side
MARGIN = 1.28  # the same in standard errors
DRAWS = 200
NARROW = 3  # of so many inputs the one with the narrowest margin shows how margins change where it matters
UNITS: dict[Kind, str] = {
    "class": "the same class on {:.2%} of the inputs",
    "psnr": "a PSNR of {:.2f} dB",
    "kl": "a KL divergence of {:.3g}",
    "error": "a relative error of {:.3g}",
}
SYNTAX = "99% (inputs with the same class), 42dB or 42dB@255 (PSNR, for a peak of 255), kl=0.01 or error=0.01"


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Whether a network keeps a tolerance. Figures are shares of inputs, dB, nats, or relative errors."""

    asked: str
    text: str  # the figures in words
    measured: float  # on held-out inputs
    expected: float  # of new inputs: with a margin for chance
    kept: bool


@dataclass(frozen=True)
class Tolerance:
    """How far outputs may be from the original's: a limit on one figure."""

    kind: Kind
    limit: float
    peak: float | None = None  # of "psnr"; None: the range of the original's outputs

    @classmethod
    def usual(cls, outputs: Sequence[Array], count: int) -> Tolerance:
        """What is asked for unless the user says otherwise, of such outputs for ``count`` held-out inputs.

        Where these are too few to show that 99 % keep their class, it is a KL divergence. ResNet-20 and the
        demo's network had twice this one where they just kept 99 %.
        """
        most, small = cls("class", 0.99), cls("error", 0.01)
        kinds: dict[Loss, Tolerance] = {
            "kl": most if most.can_be_shown(count) else cls("kl", 0.005),
            "boxes": small,
            # the peak of all numbers would hide a part of smaller scale
            "relative": cls("psnr", 42.0) if all(len(parts_of(a)[1]) == 1 for a in outputs) else small,
        }
        return kinds[loss_kind(outputs, count)]

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Read "99%", "42dB", "42dB@255", "kl=0.01" or "error=0.01".

        Raises:
            BudgetError: the text is none of these, or makes no sense.
        """
        number = r"(\d+\.?\d*(?:e-?\d+)?|\.\d+)"
        patterns: dict[Kind, str] = {
            "class": rf"{number}\s*%",
            "psnr": rf"{number}\s*db(?:@{number})?",
            "kl": rf"kl={number}",
            "error": rf"error={number}",
        }
        for kind, pattern in patterns.items():
            if match := re.fullmatch(pattern, str(text).strip(), re.IGNORECASE):
                limit = float(match[1]) / (100 if kind == "class" else 1)
                peak = float(match[2]) if kind == "psnr" and match[2] else None
                if limit > 0 and (kind != "class" or limit <= 1) and peak != 0:
                    return cls(kind, limit, peak)
        raise BudgetError(f"within={text!r}: write {SYNTAX}")

    def __str__(self) -> str:
        peak = "" if self.peak is None else f"@{self.peak:g}"
        return {
            "class": f"{100 * self.limit:g}%",
            "psnr": f"{self.limit:g}dB{peak}",
            "kl": f"kl={self.limit:g}",
            "error": f"error={self.limit:g}",
        }[self.kind]

    def check(self, outputs: Sequence[Array], count: int) -> None:
        """Raise ModelError unless this can be measured on such outputs for ``count`` inputs."""
        is_classifier = loss_kind(outputs, count) == "kl"
        if self.kind in ("class", "kl") and not is_classifier:
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise ModelError(
                f"within={self} is for outputs (N, classes) of a classifier, {count} inputs gave {shapes}; "
                "write a PSNR (42dB) or error=0.01"
            )
        if self.kind == "psnr" and not any(output.dtype.kind == "f" for output in outputs):
            raise ModelError(f"within={self} needs outputs that are floating-point numbers")

    def can_be_shown(self, count: int) -> bool:
        """Whether so many held-out inputs can show that it is kept."""
        return self.kind != "class" or 1 / (count + 1) <= 1 - self.limit + 1e-9

    def check_count(self, count: int) -> None:
        """Raise CalibrationError if so few held-out inputs can never show that it is kept."""
        if self.kind == "class" and self.limit == 1:
            raise CalibrationError("within=100%: no number of inputs can show that; write 99% or less")
        if not self.can_be_shown(count):
            least = HELD_OUT * round(np.ceil(1 / (1 - self.limit) - 1 - 1e-6))
            raise CalibrationError(
                f"within={self} cannot be shown with {count} held-out inputs, a fifth of those that are "
                f"given; give {least} or more, or allow more: within=90%"
            )

    def promise(
        self, original: Sequence[Array], new: Sequence[Array], known: Callable[[], Sequence[Array]]
    ) -> Promise:
        """Compare the outputs of two networks on held-out inputs.

        Args:
            original: the original's outputs.
            new: the other network's outputs.
            known: returns the original's outputs on all inputs there are, held out or not.
        """
        if self.kind == "class":
            share, chance = changed_classes(original[0], new[0], known()[0])
            measured, expected = 1 - share, 1 - chance
        else:
            worst = 0.0 if self.kind == "psnr" else WORST
            losses = self._losses(original, new)
            if losses is None:
                measured = expected = worst
            else:
                margin = MARGIN * losses.std() / np.sqrt(len(losses))
                measured, expected = (self._figure(v) for v in (losses.mean(), losses.mean() + margin))
        unit = UNITS[self.kind]
        text = f"{unit.format(measured)} (held-out inputs), {unit.format(expected)} expected of new inputs"
        kept = self.excess(expected) <= 0
        return Promise(asked=str(self), text=text, measured=measured, expected=expected, kept=kept)

    def excess(self, figure: float) -> float:
        """Return the logarithm of an error over the one that is allowed: 0 or less is within the limit.

        >>> Tolerance("class", 0.99).excess(0.98)  # twice as many changed classes
        0.693...
        """
        if self.kind == "psnr":
            return (self.limit - figure) / 10 * float(np.log(10))
        error, allowed = (figure, self.limit) if self.kind != "class" else (1 - figure, 1 - self.limit)
        return float(np.log(max(error, 1e-20) / max(allowed, 1e-20)))

    def _losses(self, original: Sequence[Array], new: Sequence[Array]) -> Array | None:
        """Return what has a limited mean, for every input; of "psnr" the squared error for a peak of 1."""
        if not all(np.isfinite(output).all() for output in new if output.dtype.kind == "f"):
            return None
        if self.kind != "psnr":
            kind = loss_kind(original, np.atleast_1d(original[0]).shape[0])
            loss = kind if kind == "boxes" or self.kind == "kl" else "relative"
            return Comparison(original, loss).divergences(new)
        return squared_errors(original, new, self.peak)

    def _figure(self, loss: float) -> float:
        return decibels(loss) if self.kind == "psnr" else float(loss)


def decibels(squared_error: float) -> float:
    """Return the PSNR of a mean squared error for a peak of 1; 200 dB at most.

    >>> decibels(0.01)
    20.0
    """
    return float(-10 * np.log10(max(float(squared_error), 1e-20)))


def mean_psnr(original: Array, new: Array, peak: float) -> float:
    """Return the mean of all images' PSNR in dB, of arrays (n, …) of one shape."""
    errors = squared_errors([original], [new], peak)
    assert errors is not None
    return float(np.mean([decibels(error) for error in errors]))


def squared_errors(
    original: Sequence[Array], new: Sequence[Array], peak: float | None = None
) -> Array | None:
    """Return every input's mean squared error (n,) over the outputs that are numbers, relative to peak².

    ``peak`` None: the range of the original's output. None if the outputs are not one for each input.
    """
    pairs = [(a, b) for a, b in zip(original, new, strict=True) if a.dtype.kind == "f"]
    if not pairs or any(
        a.shape != b.shape or not (a.ndim and a.size) or len(a) != len(pairs[0][0]) for a, b in pairs
    ):
        return None
    errors = []
    for a, b in pairs:
        a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (a, b))
        unit = peak or float(np.ptp(a)) or 1.0
        errors.append(np.square((b - a) / unit).mean(axis=1))
    return np.mean(errors, axis=0)  # type: ignore[no-any-return]


def changed_classes(original: Array, new: Array, known: Array) -> tuple[float, float]:
    """Return the share of inputs that get another class, and the share to expect of new inputs at most.

    Few held-out inputs change their class, so that counting them says little. But all margins (the score of
    the original's class less the best other one) change; those of the inputs with narrow margins change as
    margins do that are near zero. So this change is combined with the margin of every known input. Inputs
    are drawn again and again from these (bootstrap); the share that nine of ten draws stay below is
    expected, but no less than was counted, and at least one of n + 1: that nothing changed for n inputs says
    no more.

    Args:
        original: the original's scores on held-out inputs (n, classes).
        new: another network's scores on the same inputs.
        known: the original's scores on more inputs (N, classes).
    """
    if not np.isfinite(new).all():
        return 1.0, 1.0
    chosen = original.argmax(axis=1)
    counted = float(np.mean(new.argmax(axis=1) != chosen))
    before, after = (_margins(scores, chosen) for scores in (original, new))
    margins = _margins(known, known.argmax(axis=1))
    rng, n = np.random.default_rng(0), len(original)
    draws = [
        _crossing(before[rows], (after - before)[rows], rng.choice(margins, len(margins)))
        for rows in rng.integers(n, size=(DRAWS, n))
    ]
    return counted, max(counted, float(np.quantile(draws, SAFE)), 1 / (n + 1))


def _crossing(margins: Array, changes: Array, known: Array) -> float:
    """Return the share of known margins that end below zero if they change as narrow ones do."""
    narrow = np.argsort(margins, kind="stable")[: -(-len(margins) // NARROW)]
    return float(np.searchsorted(np.sort(changes[narrow]), -known).mean() / len(narrow))


def _margins(scores: Array, chosen: Array) -> Array:
    """Return the log odds (n,) of the chosen classes against the best other ones."""
    logs = log_probabilities(scores)
    rows = np.arange(len(logs))
    of_chosen = logs[rows, chosen]
    logs = logs.copy()
    logs[rows, chosen] = -np.inf
    return of_chosen - logs.max(axis=1)  # type: ignore[no-any-return]
