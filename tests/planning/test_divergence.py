"""Divergences between outputs, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.errors import ModelError
from netdecouple.planning.divergence import (
    BLOCK,
    WORST,
    Comparison,
    Loss,
    agreement,
    divergence,
    log_probabilities,
    loss_kind,
    parts_of,
    relative_error,
    rounding,
    same_texts,
    texts,
)


def test_kl_is_the_textbook_formula_on_logits_and_on_probabilities() -> None:
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.5, 0.25, 0.25]])
    expected = (p * np.log(p / q)).sum()
    assert divergence([p], [q], "kl") == pytest.approx(expected)
    assert divergence([np.log(p) + 3], [np.log(q) - 50], "kl") == pytest.approx(expected)


def test_kl_survives_logits_that_overflow_exp() -> None:
    assert np.isfinite(divergence([np.array([[1e4, -1e4]])], [np.array([[-1e4, 1e4]])], "kl"))
    assert log_probabilities(np.array([[1e4, 0.0]]))[0, 0] == 0


def test_relative_error_is_in_units_of_the_original_variance() -> None:
    a = np.array([1.0, 2, 3, 4])
    assert relative_error(a, a) == 0
    assert relative_error(a, np.full(4, a.mean())) == pytest.approx(1)
    assert relative_error(a, a[:3]) == 1.0
    assert np.isfinite(relative_error(np.zeros(3), np.zeros(3)))


def _poses(seed: int = 0) -> dict[str, np.ndarray]:
    """Parts of a pose detector's output (3, channels, 400): pixels, scores, and points with visibility."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 640, (3, 6, 400))
    points[:, 2::3] = rng.random((3, 2, 400)) ** 8
    return {
        "boxes": rng.uniform(0, 640, (3, 4, 400)),
        "scores": rng.random((3, 2, 400)) ** 20,
        "points": points,
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_another_scale_count_by_themselves(transposed: bool) -> None:
    """Scores that are lost are not hidden by boxes in pixels; every part counts alike."""
    known, lost = _poses(), _poses()
    lost["scores"] = np.zeros_like(lost["scores"])
    axes = (0, 2, 1) if transposed else (0, 1, 2)
    a, b = (np.concatenate(list(parts.values()), axis=1).transpose(axes) for parts in (known, lost))
    axis, parts = parts_of(a)
    assert axis == (2 if transposed else 1)
    assert [sorted(part) for part in parts] == [[4, 5, 8, 11], [0, 1, 2, 3, 6, 7, 9, 10]]
    assert relative_error(a, b) > 0.1
    everything_moved = np.broadcast_to(a.mean(axis=(0, 3 - axis), keepdims=True), a.shape)
    assert relative_error(a, everything_moved) == pytest.approx(1, abs=0.1)


def test_channels_that_say_nothing_make_no_part() -> None:
    """A class that is never seen, channels that are 0, and features whose sizes differ as theirs do."""
    rng = np.random.default_rng(0)
    scores = rng.random((3, 5, 400)) ** 20
    scores[:, 3] *= 1e-9
    pixels = rng.uniform(0, 640, (3, 4, 400))
    output = np.concatenate([pixels, scores, np.zeros((3, 1, 400))], axis=1)
    assert [sorted(part) for part in parts_of(output)[1]] == [[4, 5, 6, 7, 8, 9], [0, 1, 2, 3]]
    other = output.copy()
    other[:, 7] *= 100  # still nothing
    assert relative_error(output, other) < 1e-9
    pixels[:, 2] = 5.0
    assert relative_error(pixels, pixels + np.float32(1e-6)) < 1e-6
    for features in (rng.standard_normal((3, 40, 12)), rng.standard_normal((3, 40, 6, 6)) * 10):
        features[:, ::2] /= 10
        assert len(parts_of(features)[1]) == 1
        assert relative_error(features, features * 1.1) == pytest.approx(
            0.01 * np.square(features).mean() / features.var()
        )


def test_outputs_of_nothing_lose_nothing() -> None:
    nothing = np.zeros((0, 4))
    assert divergence([nothing], [nothing], "relative") == 0
    assert rounding([nothing], [nothing]) == 0


def test_rounding_is_told_from_a_difference() -> None:
    """In units of the output itself, be it one number only; of whole numbers if there is nothing else."""
    one = np.array([[3.0]])
    assert rounding([one], [one * (1 + 1e-6)]) == pytest.approx(1e-6, rel=1e-3)
    assert rounding([one, np.array([1])], [one, np.array([2])]) == 0
    assert rounding([np.array([2])], [np.array([3])]) == pytest.approx(0.5)
    assert rounding([one, np.zeros((4, 2))], [one, np.zeros((5, 2))]) == 0
    assert rounding([np.zeros((4, 2))], [np.zeros((5, 2))]) == np.inf
    assert rounding([one, one], [one, np.array([[np.nan]])]) == np.inf


def test_several_outputs_weigh_alike() -> None:
    a, b = np.array([0.0, 2]), np.array([1.0, 1])
    assert divergence([a, a * 100], [b, a * 100], "relative") == pytest.approx(0.5)


def test_a_single_table_of_scores_is_taken_for_a_classifier() -> None:
    assert loss_kind([np.zeros((5, 10))], 5) == "kl"
    assert loss_kind([np.zeros((5, 1))], 5) == "relative"
    assert loss_kind([np.zeros((5, 3, 8, 8))], 5) == "relative"
    assert loss_kind([np.zeros((5, 10)), np.zeros((5, 4))], 5) == "relative"
    assert loss_kind([np.zeros((17, 7))], 5) == "relative"  # boxes
    assert loss_kind([np.zeros((5, 3), np.int64)], 5) == "relative"  # indices


def test_agreement_is_the_share_of_equal_choices() -> None:
    a, b = np.eye(4), np.eye(4)[[0, 1, 3, 2]]
    assert agreement(a, b) == 0.5


@pytest.mark.parametrize("loss", ["kl", "relative"])
def test_outputs_that_are_no_numbers_are_the_worst_there_is(loss: Loss) -> None:
    """And so is what overflows; outputs of another shape count as in `relative_error`."""
    a = np.arange(6.0).reshape(2, 3)
    for broken in (np.full((2, 3), np.nan), np.full((2, 3), np.inf), 1e300 * np.eye(2, 3)):
        assert divergence([a], [broken], loss) == WORST
    assert divergence([a], [a[:1]], loss) == 1.0


def test_scores_may_be_said_to_be_numbers_and_maps_not_to_be_scores() -> None:
    scores, maps = np.zeros((4, 10)), np.zeros((4, 21, 8, 8))
    assert loss_kind([scores], 4, "relative") == "relative"
    assert loss_kind([scores], 4, "kl") == "kl"
    with pytest.raises(ModelError, match=r"loss=kl is for a single output .*\(4, 21, 8, 8\)"):
        loss_kind([maps], 4, "kl")


PLACES = np.array([[0, 1, 1, 0, 1, 2], [0, 0, 0, 0, 0, 0], [2, 2, 1, 0, 0, 1]])  # best class of every step


def scores_of(places: np.ndarray, blank: int = 0) -> np.ndarray:
    """Probabilities of four classes (n, steps, 4), counted from the class that is blank."""
    return np.float32(0.7 * np.eye(4)[(places + blank) % 4] + 0.3 / 4)


def test_texts_are_read_greedily() -> None:
    """Repeats are merged unless a blank is between them."""
    assert texts(PLACES, 0) == [(1, 1, 2), (), (2, 1, 1)]
    assert texts(PLACES, 2) == [(0, 1, 0, 1), (0,), (1, 0, 1)]


@pytest.mark.parametrize(
    "outputs",
    [
        [scores_of(PLACES)] * 2,
        [scores_of(PLACES)[0]],
        [5 * scores_of(PLACES)],
        [scores_of(PLACES)[:, :1]],
        [scores_of(PLACES)[:2]],
        [scores_of(np.ones_like(PLACES))],
        [scores_of(PLACES).astype(int)],
    ],
    ids=["two", "two axes", "no softmax", "one step", "too few", "no blank", "integers"],
)
def test_other_outputs_are_no_texts(outputs) -> None:
    assert same_texts(outputs, outputs, 3) is None


@pytest.mark.parametrize("blank", [0, 3])
@pytest.mark.parametrize(
    "change", [np.array, np.log, lambda p: p.reshape(-1, 1, 4)], ids=["p", "log", "flat"]
)
def test_texts_are_compared_as_wholes(blank: int, change) -> None:
    """One other letter makes another text, other steps do not; blank is the first class or the last."""
    moved = PLACES.copy()
    moved[0] = [1, 0, 1, 1, 2, 2]
    moved[2, 0] = 1
    original, other = (change(scores_of(places, blank)) for places in (PLACES, moved))
    assert same_texts([original], [other], 3) == 2 / 3
    assert same_texts([original], [np.full_like(other, np.nan)], 3) == 0


@pytest.mark.parametrize("shape", [(3,), (5, 7), (6, 4, 11, 13), (2, BLOCK), (3, 300, 2000), (7, 500, 6)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_large_outputs_are_compared_as_small_ones_are(shape: tuple[int, ...], dtype: type) -> None:
    """Block by block: the mean square of the differences over the variance, of every sample and of all."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(5, 3, shape).astype(dtype) for _ in range(2))
    errors = np.square(a.astype(np.float64) - b).reshape(shape[0], -1).mean(axis=1) / a.astype(float).var()
    comparison = Comparison([a], "relative")
    of_samples = comparison.divergences([b])
    assert of_samples is not None
    np.testing.assert_allclose(of_samples, errors, rtol=1e-5)
    assert comparison.divergence([b]) == pytest.approx(errors.mean(), rel=1e-5)
