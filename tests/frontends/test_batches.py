"""What both frontends use: batches, samples of maps, short messages."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry
from netdecouple.errors import first_line
from netdecouple.frontends.batches import batch_slices, pick
from netdecouple.network import Layer

LAYER = Layer("conv", "Conv", 0, 0, ConvGeometry(4, 3, 3, 3), size=(10, 10))  # 1,200 bytes of input


def sizes(count: int, limit: int, held: int = 0, fixed: int | None = None) -> list[int]:
    slices = batch_slices(count, [LAYER], limit, held, fixed)
    assert [i for part in slices for i in range(count)[part]] == list(range(count))
    return [part.stop - part.start for part in slices]


@pytest.mark.parametrize(
    ("limit", "held", "fixed", "expected"),
    [
        (4 * 4800, 0, None, [4, 4, 2]),  # four times the largest input for every sample
        (4 * 4800, 2 * 4800, None, [2] * 5),  # what the caller holds is more
        (0, 0, None, [1] * 10),
        (10**9, 0, None, [10]),
        (4 * 4800, 0, 3, [3, 3, 3, 1]),
    ],
)
def test_batches_hold_bounded_memory(limit: int, held: int, fixed: int | None, expected: list[int]) -> None:
    """Every sample is in one batch, and a fixed size is kept."""
    assert sizes(10, limit, held, fixed) == expected


def test_batches_are_not_too_large() -> None:
    """However much memory there is."""
    assert sizes(300, 10**12) == [128, 128, 44]


def test_positions_are_picked_sample_by_sample() -> None:
    """All channels of every position."""
    values = np.arange(2 * 3 * 4).reshape(2, 3, 2, 2).astype(np.float32)
    assert pick(values, np.array([[0, 3], [1, 1]])).tolist() == [
        [0, 4, 8],
        [3, 7, 11],
        [13, 17, 21],
        [13, 17, 21],
    ]


def test_messages_are_one_short_line() -> None:
    """Or the error's type, where there is no message."""
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 1000))) == 300
