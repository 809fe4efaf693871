"""A detector's boxes: recognise them in its outputs, compare them, weight the numbers that decide them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from netdecouple.network import Array

CONFIDENT = 0.25  # least score of a box that counts
SAME = 0.5  # intersection over union from which two boxes of a class are the same
CELLS = 16  # a detector has at least so many places for boxes
MOST = 1000  # boxes of one image that are compared
ROUNDING = 1e-3


@dataclass(frozen=True)
class Boxes:
    """What was found in one image."""

    corners: Array  # (k, 4): left, top, right, bottom
    scores: Array  # (k,)
    classes: NDArray[np.int64]  # (k,)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: NDArray[np.generic]) -> Boxes:
        return Boxes(self.corners[chosen], self.scores[chosen], self.classes[chosen])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a detector's outputs hold boxes and scores, for every cell of every image.

    In one output (N, cells, 4 + …) or two, (N, cells, 4) and (N, cells, classes).
    """

    output: int  # the output with the boxes
    scores: int  # the output with the scores; may be the same
    transposed: bool = False  # the output is (N, 4 + …, cells)
    has_object: bool = False  # a score for anything at all comes before those of the classes
    has_corners: bool = False  # boxes are two corners; else centre, width and height
    is_list: bool = False  # every cell is a finished box (left, top, right, bottom, score, class)
    background: int | None = None  # the class that means nothing

    def split(self, outputs: Sequence[Array]) -> tuple[Array, Array, Array]:
        """Return views of boxes (N, cells, 4), scores of any object (N, cells) and of classes (N, cells, c).

        Where there is no score for any object, it is 1.
        """
        first = outputs[self.output]
        first = first.swapaxes(1, 2) if self.transposed else first
        if self.output != self.scores:
            scores, boxes = outputs[self.scores], first.reshape(*first.shape[:2], 4)
            return boxes, np.ones(scores.shape[:2], np.float32), scores
        at = 4 + self.has_object
        objects = first[..., 4] if self.has_object else np.ones(first.shape[:2], np.float32)
        return first[..., :4], objects, first[..., at:]

    def _classes(self, classes: Array) -> Array:
        """Scores of classes (N, cells, c), where nothing is no class."""
        return np.where(np.arange(classes.shape[-1]) == self.background, 0, classes)

    def detections(self, outputs: Sequence[Array]) -> list[Boxes]:
        """Return every image's confident boxes, without those that a better one of their class overlaps."""
        if self.is_list:
            return [_of_list(image) for image in outputs[self.output]]
        boxes, objects, classes = self.split(outputs)
        scores = objects[..., None] * self._classes(classes)
        corners = boxes if self.has_corners else _corners(boxes)
        best, chosen = scores.max(axis=-1), scores.argmax(axis=-1)
        return [_distinct(Boxes(*parts)) for parts in zip(corners, best, chosen, strict=True)]

    def weights(self, outputs: Sequence[Array]) -> list[Array]:
        """Return the weight of every number of every output in a sum of squared errors.

        Most cells show nothing, and their boxes mean nothing: they count by the square of the cell's score,
        and relative to their size. Boxes, scores of any object and scores of classes count alike, each
        relative to what it is in all of these images. Other outputs do not count.
        """
        boxes, objects, classes = (np.asarray(part, np.float32) for part in self.split(outputs))
        seen, scores = np.square(objects), np.square(self._classes(classes))
        known = seen * scores.max(axis=-1)
        corners = boxes if self.has_corners else _corners(boxes)
        area = np.maximum((corners[..., 2:] - corners[..., :2]).prod(axis=-1), 1e-6)
        found = [np.zeros(output.shape, np.float32) for output in outputs]
        of_boxes, of_objects, of_classes = self.split(found)  # views
        of_boxes[:] = (known / area / _sum(known) / 4)[..., None]
        if self.has_object:
            of_objects[:] = 1 / _sum(seen)
        is_class = np.arange(classes.shape[-1]) != self.background
        of_classes[:] = seen[..., None] / _sum(seen[..., None] * scores) * is_class
        return [weight / (2 + self.has_object) for weight in found]


def _sum(values: Array) -> float:
    return max(float(values.sum(dtype=np.float64)), 1e-9)


def layout_of(outputs: Sequence[Array], count: int) -> Layout | None:
    """Recognise the outputs of a detector for ``count`` images; None if they are something else.

    Those of YOLO's versions, whose boxes are in pixels: (N, cells, 5 + classes), (N, 4 + classes, cells) and
    (N, boxes, 6); and pairs of boxes (N, cells, 4) and scores (N, cells, classes), as SSD has them.
    """
    able = [i for i, a in enumerate(outputs) if a.dtype.kind == "f" and a.ndim >= 3 and len(a) == count]
    for i in able:
        for j in able:
            if i != j and _is_pair(outputs[i], outputs[j]):
                boxes, scores = outputs[i], outputs[j]
                has_corners = bool((boxes[..., 2:] >= boxes[..., :2]).all())
                return Layout(output=i, scores=j, has_corners=has_corners, background=_background(scores))
    for i in able:
        if (found := _alone(outputs[i])) is not None:
            return replace(found, output=i, scores=i)
    return None


def _is_pair(boxes: Array, scores: Array) -> bool:
    cells = scores.shape[1]
    is_shape = scores.ndim == 3 and cells >= CELLS and boxes.shape[1:] in ((cells, 4), (cells, 1, 4))
    return is_shape and _are_scores(scores)


def _background(scores: Array) -> int | None:
    """The most frequent class, where the scores of all classes add up to 1."""
    if scores.shape[-1] < 2 or not np.allclose(scores.sum(axis=-1), 1, atol=ROUNDING):
        return None
    return int(np.bincount(scores.argmax(axis=-1).ravel()).argmax())


def _alone(output: Array) -> Layout | None:
    """Recognise boxes and scores in one output."""
    if output.ndim != 3:
        return None
    layout = Layout(output=0, scores=0)
    if output.shape[2] == 6 and _is_list(output):
        return replace(layout, has_corners=True, is_list=True)
    if output.shape[1] < output.shape[2]:
        layout, output = replace(layout, transposed=True), output.swapaxes(1, 2)
    cells, numbers = output.shape[1:]
    has_object = not layout.transposed
    if cells < CELLS or numbers < 5 + has_object or not _are_scores(output[..., 4:]):
        return None
    sizes = output[..., 2:4]
    are_pixels = sizes.min() >= 0 and np.median(sizes) > 1
    return replace(layout, has_object=has_object) if are_pixels else None


def _is_list(output: Array) -> bool:
    corners, scores, classes = output[..., :4], output[..., 4], output[..., 5]
    return (
        _are_scores(scores)
        and bool((corners[..., 2:] >= corners[..., :2]).all())
        and bool((classes == np.rint(classes)).all())
    )


def _are_scores(values: Array) -> bool:
    return bool(values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING)


def _of_list(rows: Array) -> Boxes:
    found = Boxes(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))
    return found[np.flatnonzero(found.scores >= CONFIDENT)]


def _corners(boxes: Array) -> Array:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def _distinct(found: Boxes) -> Boxes:
    """The confident boxes, best first, without those that a better one of the same class overlaps."""
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= CONFIDENT][:MOST]
    found, kept = found[order], np.ones(len(order), bool)
    for i in range(len(found)):
        if kept[i]:
            rest = found.classes[i + 1 :] == found.classes[i]
            kept[i + 1 :] &= ~(rest & (overlaps(found.corners[i : i + 1], found.corners[i + 1 :])[0] >= SAME))
    return found[np.flatnonzero(kept)]


def overlaps(a: Array, b: Array) -> Array:
    """Return intersection over union (k, m) of boxes (k, 4) and (m, 4), given as corners.

    >>> overlaps(np.array([[0, 0, 2, 2.0]]), np.array([[0, 1, 2, 3.0], [5, 5, 6, 6]])).round(2).tolist()
    [[0.33, 0.0]]
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.maximum(high - low, 0).prod(axis=-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=-1) for boxes in (a, b)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)  # type: ignore[no-any-return]


def found_again(original: Sequence[Boxes], new: Sequence[Boxes]) -> tuple[int, int, int]:
    """Count the boxes of all images that are found again, those of the original, and those of the other.

    A box is found again if one of the same class overlaps it by half or more; each counts once.
    """
    hits = 0
    for wanted, given in zip(original, new, strict=True):
        free = np.ones(len(given), bool)
        for i in np.argsort(-wanted.scores, kind="stable"):
            overlap = overlaps(wanted.corners[i : i + 1], given.corners)[0]
            overlap = np.where(free & (given.classes == wanted.classes[i]), overlap, 0)
            if overlap.size and overlap.max() >= SAME:
                free[overlap.argmax()] = False
                hits += 1
    return hits, sum(map(len, original)), sum(map(len, new))
