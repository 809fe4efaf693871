"""Network inputs made visible."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from netdecouple.data.preprocessing import Preprocessing
from netdecouple.report.pictures import LARGEST, pictures


def seen(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", ["imagenet", "none"])
def test_normalisation_is_taken_back(channels: int, preset: str) -> None:
    if (channels, preset) == (1, "imagenet"):
        preprocessing = Preprocessing(mean=(0.4,), std=(0.2,))
    else:
        preprocessing = Preprocessing.preset(preset)
    originals = np.random.default_rng(0).integers(0, 256, (2, 9, 7, channels), np.uint8)
    inputs = preprocessing.normalise(originals)
    for png, original in zip(pictures(list(inputs), preprocessing), originals, strict=True):
        assert np.abs(seen(png).reshape(original.shape).astype(int) - original).max() <= 1


def test_unknown_normalisation_is_stretched_for_all_alike() -> None:
    """The lowest value of all is black, the highest white."""
    inputs = [
        np.full((1, 2, 2), -3, np.float32),
        np.full((1, 2, 2), 5, np.float32),
        np.ones((1, 2, 2), np.float32),
    ]
    shades = [int(seen(png)[0, 0]) for png in pictures(inputs, Preprocessing())]
    assert shades == [0, 255, 128]


def test_what_has_other_channels_is_not_drawn() -> None:
    assert pictures([np.zeros((5, 4, 4), np.float32)], Preprocessing()) == ()
    assert pictures([np.zeros((3, 4), np.float32)], Preprocessing()) == ()
    assert pictures([], Preprocessing()) == ()


def test_constant_inputs_and_large_ones_are_pictures() -> None:
    assert seen(pictures([np.full((1, 2, 2), 7, np.float32)], Preprocessing())[0]).tolist() == [
        [0, 0],
        [0, 0],
    ]
    (png,) = pictures([np.zeros((3, 500, 250), np.float32)], Preprocessing())
    assert seen(png).shape == (LARGEST, LARGEST // 2, 3)
