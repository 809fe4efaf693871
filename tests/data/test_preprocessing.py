"""Preprocessing: how a picture becomes a network input."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from PIL import Image

from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import CalibrationError

RNG = np.random.default_rng(0)


def as_inputs(pictures: np.ndarray) -> np.ndarray:
    """The result of preset none for (N, H, W, C)."""
    return pictures.transpose(0, 3, 1, 2) / np.float32(255)


def test_imagenet_scales_centres_and_normalises():
    """Shorter side to 256, centre crop 224, as torchvision: offsets round half to even."""
    picture = Image.fromarray(RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    resized = np.asarray(picture.resize((341, 256), Image.Resampling.BILINEAR), np.float64)
    crop = resized[16:240, 58:282] / 255
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    actual = Preprocessing.preset("imagenet").picture(picture, 3)
    np.testing.assert_allclose(actual, expected.transpose(2, 0, 1)[None], atol=1e-5)


def test_cifar10_resizes_with_an_antialiased_triangle_filter():
    """Halving weighs four pixels 1:3:3:1, whatever the aspect ratio."""
    values = RNG.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    half = np.zeros((32, 64))
    for row in range(32):
        for offset, weight in zip(range(-1, 3), (1, 3, 3, 1), strict=True):
            if 0 <= 2 * row + offset < 64:
                half[row, 2 * row + offset] = weight
    half /= half.sum(1, keepdims=True)
    resized = np.einsum("ah,nhwc,bw->ncab", half, values, half)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    actual = Preprocessing.preset("cifar10")(values) * std[:, None, None] + mean[:, None, None]
    np.testing.assert_allclose(actual * 255, resized, atol=1.01)  # Pillow rounds twice
    assert Preprocessing.preset("cifar10").picture(Image.new("RGB", (50, 20)), 3).shape == (1, 3, 32, 32)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=5)))
def test_pictures_come_back_from_network_inputs(pictures):
    """Normalisation loses nothing: undoing it gives the bytes again."""
    inputs = Preprocessing(mean=(0.4,), std=(0.3,))(pictures)
    back = np.rint((inputs * 0.3 + 0.4) * 255).astype(np.uint8)
    np.testing.assert_array_equal(back.transpose(0, 2, 3, 1), pictures)
    assert inputs.dtype == np.float32


def test_arrays_of_the_right_size_are_only_normalised():
    """A 224 pixel array is not enlarged to 256 and cropped again; a picture file is, as in torchvision."""
    values = RNG.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    preprocessing = Preprocessing(size=(8, 8), resize=10)
    np.testing.assert_array_equal(preprocessing(values), as_inputs(values))
    assert not np.array_equal(preprocessing.picture(Image.fromarray(values[0]), 3), as_inputs(values))


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (40, 8), (4, 9)])
def test_a_crop_is_covered_not_padded(shape):
    """A white picture stays white for every aspect ratio, also where the crop is not square."""
    white = Image.new("L", shape, 255)
    actual = Preprocessing(size=(12, 30), resize=14).picture(white, 1)
    np.testing.assert_array_equal(actual, np.ones((1, 1, 12, 30)))


def test_a_covered_crop_keeps_the_aspect_ratio():
    """Of a square picture a wide or tall crop shows the middle only."""
    picture = Image.new("L", (9, 9))
    picture.paste(255, (0, 3, 9, 6))
    assert Preprocessing(size=(10, 30), resize=14).picture(picture, 1).min() > 0.6
    assert Preprocessing(size=(30, 10), resize=14).picture(picture.rotate(90), 1).min() > 0.6


def test_resize_without_a_crop_keeps_the_aspect_ratio():
    assert Preprocessing(resize=10)(np.zeros((2, 20, 30, 1), np.uint8)).shape == (2, 1, 10, 15)


def test_a_preset_adapts_to_the_network():
    """The shorter side keeps its ratio 256:224 to the crop; a plain size is replaced."""
    imagenet = Preprocessing.preset("imagenet")
    assert imagenet.resized_for((299, 299)) == dataclasses.replace(imagenet, size=(299, 299), resize=342)
    assert imagenet.resized_for(None) == imagenet
    assert Preprocessing.preset("none") == Preprocessing()
    assert Preprocessing().resized_for((4, 5)) == Preprocessing(size=(4, 5))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Preprocessing(mean=()), "mean"),
        (lambda: Preprocessing(mean=(float("nan"),)), "mean"),
        (lambda: Preprocessing(std=()), "std"),
        (lambda: Preprocessing(std=(0.0,)), "std"),
        (
            lambda: Preprocessing(mean=(123.675, 116.28, 103.53)),
            "(mean 0.485,0.456,0.406; a std of 1 is 0.0039",
        ),
        (lambda: Preprocessing(mean=(-1.5,)), "mean and std by 255"),
        (lambda: Preprocessing(mean=(0.5,), std=(58.395, 57.12, 57.375)), "(std 0.229,0.224,0.225"),
        (lambda: Preprocessing(size=(0, 4)), "size"),
        (lambda: Preprocessing(size=(8, 8), resize=7), "resize 7"),
        (lambda: Preprocessing(resize=0), "resize 0"),
        (lambda: Preprocessing.preset("cifar"), "imagenet, cifar10, none"),
        (lambda: Preprocessing.preset("cifar10")(np.zeros((1, 32, 32, 1), np.uint8)), "mean has 3 values"),
        (lambda: Preprocessing(std=(1.0, 0.5))(np.zeros((10, 4, 5, 3), np.uint8)), "std has 2 values"),
        (lambda: Preprocessing()(np.zeros((10, 3, 4, 5), np.float32)), "float32 (10, 3, 4, 5)"),
        (lambda: Preprocessing(size=(9, 9))(np.zeros((1, 8, 8, 4), np.uint8)), "1 or 3 channels, not 4"),
        (lambda: Preprocessing().picture(Image.new("F", (4, 4)), 1), "mode F"),
    ],
)
def test_preprocessing_refuses(make, part):
    """Numbers that make no sense, and pictures they do not fit."""
    with pytest.raises(CalibrationError, match=re.escape(part)):
        make()
