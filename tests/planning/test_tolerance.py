"""How far outputs may be from the original's, and what to expect of new inputs."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.errors import BudgetError, CalibrationError, ModelError
from netdecouple.planning.tolerance import Tolerance, changed_classes, squared_errors


@pytest.mark.parametrize(
    ("text", "kind", "limit", "peak"),
    [
        ("99%", "class", 0.99, None),
        (" 99.5 % ", "class", 0.995, None),
        ("kl=1e-6", "kl", 1e-6, None),
        ("42dB", "psnr", 42.0, None),
        ("42.5 db@255", "psnr", 42.5, 255.0),
        ("kl=.01", "kl", 0.01, None),
        ("error=0.02", "error", 0.02, None),
    ],
)
def test_limits_are_read_and_written(text: str, kind: str, limit: float, peak: float | None) -> None:
    tolerance = Tolerance.parse(text)
    assert (tolerance.kind, tolerance.limit, tolerance.peak) == (kind, pytest.approx(limit), peak)
    assert Tolerance.parse(str(tolerance)) == tolerance


@pytest.mark.parametrize(
    "text", ["", "99", "101%", "0%", "-3dB", "42", "42dB@0", "kl", "kl=0", "psnr=42", "nan%", "1e9%", 0.99]
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="write 99%"):
        Tolerance.parse(text)


def scores(rng: np.random.Generator, count: int) -> np.ndarray:
    return 4 * rng.standard_normal((count, 10))


def test_new_inputs_change_class_no_more_often_than_expected() -> None:
    """In nine of ten cases, for noise that changes a few classes of a hundred, or of a thousand."""
    for size in (0.02, 0.1, 0.4):
        kept = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            known, fresh = scores(rng, 1000), scores(rng, 20_000)
            new, later = (s + size * rng.standard_normal(s.shape) for s in (known[:200], fresh))
            counted, expected = changed_classes(known[:200], new, known)
            share = np.mean(later.argmax(1) != fresh.argmax(1))
            kept += share <= expected
            assert counted <= expected <= 4 * share + 0.02
        assert kept >= 36


def test_few_inputs_promise_little() -> None:
    """Where no class changes, the next one may be the first."""
    known = scores(np.random.default_rng(0), 500)
    for count in (9, 99):
        assert changed_classes(known[:count], known[:count], known) == (0.0, 1 / (count + 1))


def test_what_so_few_inputs_cannot_show_is_refused() -> None:
    limit = Tolerance.parse("99%")
    limit.check_count(99)
    with pytest.raises(CalibrationError, match=r"99% cannot be shown with 98 held-out .*give 495"):
        limit.check_count(98)
    Tolerance.parse("90%").check_count(9)
    with pytest.raises(CalibrationError, match="no number of inputs"):
        Tolerance.parse("100%").check_count(10**9)
    Tolerance.parse("42dB").check_count(2)


def test_psnr_is_for_the_range_of_the_original_or_a_peak() -> None:
    """An error of a hundredth of the peak is 40 dB; inputs with equal errors leave nothing to chance."""
    rng = np.random.default_rng(0)
    original = rng.uniform(0, 1, (12, 1, 8, 8))
    original[0, 0, 0, :2] = 0, 1
    new = [original + 0.01]
    for text, kept in (("39.9dB", True), ("40.1dB", False), ("88dB@255", True), ("88.3dB@255", False)):
        promise = Tolerance.parse(text).promise([original], new, lambda: [original])
        assert promise.kept is kept
    assert promise.measured == pytest.approx(20 * np.log10(25500))
    new[0][0] += 0.1
    promise = Tolerance.parse("20dB").promise([original], new, lambda: [original])
    assert promise.expected < promise.measured - 1  # one input of twelve has most of the error


def test_errors_are_those_of_divergence() -> None:
    rng = np.random.default_rng(0)
    original = rng.standard_normal((400, 3, 4))
    new = [original + 0.1 * rng.standard_normal(original.shape)]
    promise = Tolerance.parse("error=0.0105").promise([original], new, lambda: [original])
    assert promise.measured == pytest.approx(0.01, rel=0.05)
    assert promise.measured < promise.expected < 1.05 * promise.measured
    assert promise.kept


@pytest.mark.parametrize("text", ["1%", "1dB", "kl=1000", "error=1000"])
@pytest.mark.parametrize("worst", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_keep_nothing(text: str, worst: float) -> None:
    known = scores(np.random.default_rng(0), 20)
    new = known.copy()
    new[3, 2] = worst
    promise = Tolerance.parse(text).promise([known], [new], lambda: [known])
    assert not promise.kept
    assert np.isfinite([promise.measured, promise.expected]).all()


def test_limits_are_for_outputs_that_have_them() -> None:
    pictures, classes = [np.zeros((5, 3, 8, 8), np.float32)], [np.zeros((5, 10), np.float32)]
    for text in ("99%", "kl=0.1"):
        Tolerance.parse(text).check(classes, 5)
        with pytest.raises(ModelError, match=r"is for outputs \(N, classes\) of a classifier"):
            Tolerance.parse(text).check(pictures, 5)
    with pytest.raises(ModelError, match="floating-point"):
        Tolerance.parse("40dB").check([np.zeros((5, 4), np.int64)], 5)
    for text in ("40dB", "error=0.1"):
        Tolerance.parse(text).check(pictures, 5)


def test_outputs_that_are_not_one_per_input_have_no_squared_errors() -> None:
    boxes = [np.zeros((5, 4)), np.zeros((7, 4))]
    assert squared_errors(boxes, boxes) is None
    assert squared_errors([boxes[0]], [boxes[1]]) is None
