"""A detector's outputs: which are recognised, which boxes they hold, and which numbers count."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.planning.boxes import Boxes, found_again, layout_of, overlaps
from netdecouple.planning.divergence import Comparison, divergence, loss_kind

CELLS, CLASSES = 40, 3
Array = np.ndarray


def detector(n: int = 6, seed: int = 0) -> tuple[Array, Array, Array]:
    """Boxes (n, cells, 4) as centre and size, scores of any object and of classes; few are likely."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 100, (n, CELLS, 2)), rng.uniform(5, 30, (n, CELLS, 2))], axis=2)
    objects = rng.uniform(0, 0.05, (n, CELLS))
    objects[:, :3] = rng.uniform(0.6, 1, (n, 3))
    classes = rng.uniform(0, 0.1, (n, CELLS, CLASSES))
    classes[:, np.arange(3), np.arange(3)] = 0.95
    return boxes.astype(np.float32), objects.astype(np.float32), classes.astype(np.float32)


def rows() -> list[Array]:
    boxes, objects, classes = detector()
    return [np.concatenate([boxes, objects[..., None], classes], axis=2)]


def columns() -> list[Array]:
    boxes, objects, classes = detector()
    return [np.concatenate([boxes, objects[..., None] * classes], axis=2).swapaxes(1, 2).copy()]


def pair() -> list[Array]:
    """SSD: corners within 0 and 1, and probabilities, the first that of nothing."""
    boxes, objects, classes = detector()
    scores = objects[..., None] * classes / 1.2
    nothing = 1 - scores.sum(axis=2, keepdims=True)
    low, high = boxes[..., :2] / 130, (boxes[..., :2] + boxes[..., 2:]) / 130
    return [np.concatenate([nothing, scores], axis=2), np.concatenate([low, high], axis=2)[:, :, None]]


def listed() -> list[Array]:
    """Finished boxes, the rest of the list filled with zeros."""
    boxes, objects, _ = detector()
    found = np.zeros((len(boxes), 30, 6), np.float32)
    found[:, :3, :2], found[:, :3, 2:4] = boxes[:, :3, :2], boxes[:, :3, :2] + boxes[:, :3, 2:]
    found[:, :3, 4], found[:, :3, 5] = objects[:, :3], np.arange(3)
    return [found]


LAYOUTS = {"rows": rows, "columns": columns, "pair": pair, "list": listed}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_confident_boxes_are_found(name: str) -> None:
    outputs = LAYOUTS[name]()
    layout = layout_of(outputs, 6)
    assert layout is not None
    found = layout.detections(outputs)
    assert [sorted(boxes.classes.tolist()) for boxes in found] == [
        [1, 2, 3] if name == "pair" else [0, 1, 2]
    ] * 6
    assert found_again(found, found) == (18, 18, 18)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_box_that_moved_far_or_lost_its_score_is_not_found_again(name: str) -> None:
    outputs = LAYOUTS[name]()
    layout = layout_of(outputs, 6)
    assert layout is not None
    moved, paler = ([output.copy() for output in outputs] for _ in range(2))
    boxes, _, _ = layout.split(moved)
    boxes[0, 0, : 4 if layout.has_corners else 2] += 0.5 if name == "pair" else 60
    assert found_again(layout.detections(outputs), layout.detections(moved)) == (17, 18, 18)
    _, _, classes = layout.split(paler)
    classes[1, 1] = 0
    if layout.is_list:
        paler[0][1, 1, 4] = 0.1
    assert found_again(layout.detections(outputs), layout.detections(paler)) == (17, 18, 17)


@pytest.mark.parametrize("name", ["rows", "columns", "pair"])
def test_background_hardly_counts(name: str) -> None:
    """The same change of a likely box and of an unlikely one: thousands of times the error."""
    outputs = LAYOUTS[name]()
    assert loss_kind(outputs, 6) == "boxes"
    layout = layout_of(outputs, 6)
    assert layout is not None
    errors = []
    for cell in (0, 20):
        changed = [output.copy() for output in outputs]
        boxes, _, _ = layout.split(changed)
        boxes[:, cell, 0] += 0.01
        errors.append(divergence(outputs, changed, "boxes"))
    assert errors[0] > 100 * errors[1] > 0


@pytest.mark.parametrize("name", ["rows", "columns", "pair"])
def test_the_error_is_relative(name: str) -> None:
    """It depends neither on the unit of the boxes nor on the number of images, and is their mean."""
    outputs = LAYOUTS[name]()
    layout = layout_of(outputs, 6)
    assert layout is not None
    rng = np.random.default_rng(1)
    changed = [(a + 0.01 * rng.standard_normal(a.shape)).astype(np.float32) for a in outputs]
    error = divergence(outputs, changed, "boxes")
    assert float(np.mean(Comparison(outputs, "boxes").divergences(changed))) == pytest.approx(error)  # type: ignore[arg-type]
    twice = [np.concatenate([a, a]) for a in outputs], [np.concatenate([a, a]) for a in changed]
    assert divergence(*twice, "boxes") == pytest.approx(error, rel=1e-4)
    for arrays in (outputs, changed):
        layout.split(arrays)[0][:] *= 7
    assert divergence(outputs, changed, "boxes") == pytest.approx(error, rel=1e-4)


def softmax(values: Array, axis: int) -> Array:
    powers = np.exp(values - values.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


NUMBERS = np.random.default_rng(0).standard_normal((6, 20, 50)).astype(np.float32)


@pytest.mark.parametrize(
    "outputs",
    [
        [softmax(NUMBERS, 2)],  # text
        [softmax(NUMBERS, 1)],
        [NUMBERS],  # features
        [1 / (1 + np.exp(-NUMBERS))],  # a map of heat
        [NUMBERS[:, 0]],
        [NUMBERS[:, :, :4], NUMBERS[:, :, 4:9]],  # raw heads: boxes relative to anchors that are not known
        [NUMBERS.astype(np.int64)],
        [],
    ],
)
def test_other_outputs_are_not_taken_for_boxes(outputs: list[Array]) -> None:
    assert layout_of(outputs, 6) is None


def test_of_two_equal_boxes_the_better_one_counts() -> None:
    boxes, objects, classes = detector()
    boxes[:, 1], classes[:, 1] = boxes[:, 0] + 0.5, classes[:, 0]
    outputs = [np.concatenate([boxes, objects[..., None], classes], axis=2)]
    layout = layout_of(outputs, 6)
    assert layout is not None
    assert [len(found) for found in layout.detections(outputs)] == [2] * 6


def test_a_box_is_found_again_once() -> None:
    one = Boxes(np.array([[0, 0, 10, 10.0]]), np.array([0.9]), np.array([1]))
    two = Boxes(np.array([[0, 0, 10, 10.0], [0, 1, 10, 11]]), np.array([0.9, 0.8]), np.array([1, 1]))
    assert found_again([two], [one]) == (1, 2, 1)
    assert found_again([one], [two]) == (1, 1, 2)
    none = one[np.array([], np.int64)]
    assert found_again([none], [one]) == (0, 0, 1)
    assert overlaps(none.corners, one.corners).shape == (0, 1)
