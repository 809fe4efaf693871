"""Shapes that can be read, and inputs made up for them."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.errors import ModelError
from netdecouple.runtimes import Input
from netdecouple.runtimes.feeds import describe_shape, parse_shape, random_feeds

FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize("text", ["1x3x224x224", "1X3X224X224", "1,3,224,224"])
def test_parse_shape(text: str):
    """Sizes between x, as the messages write them."""
    assert parse_shape(text) == (1, 3, 224, 224)


@pytest.mark.parametrize("text", ["", "1x", "axb", "1x0x3", "1x-3", "1.5x3"])
def test_parse_shape_refuses(text: str):
    """Anything else; the message shows how it is done."""
    with pytest.raises(ModelError, match="1x3x224x224"):
        parse_shape(text)


def test_an_open_batch_is_one():
    """And the numbers are the same every time."""
    feeds = random_feeds([Input("image", (None, 3, 8, 9), FLOAT)])
    assert feeds["image"].shape == (1, 3, 8, 9)
    assert feeds["image"].dtype == np.float32
    assert np.array_equal(feeds["image"], random_feeds([Input("x", (None, 3, 8, 9), FLOAT)])["x"])


def test_shape_fills_what_is_open():
    """Batch, height and width."""
    assert random_feeds([Input("image", (None, 3, None, None), FLOAT)], (2, 3, 5, 6))["image"].shape == (
        2,
        3,
        5,
        6,
    )


def test_several_inputs():
    """Each as it says: floats, bytes, and indices, which are 0."""
    feeds = random_feeds(
        [
            Input("a", (2, 3), np.dtype(np.float16)),
            Input("b", (4,), np.dtype(np.uint8)),
            Input("c", (None, 5), np.dtype(np.int64)),
            Input("d", (), FLOAT),
        ]
    )
    assert {name: (array.shape, array.dtype.name) for name, array in feeds.items()} == {
        "a": ((2, 3), "float16"),
        "b": ((4,), "uint8"),
        "c": ((1, 5), "int64"),
        "d": ((), "float32"),
    }
    assert not feeds["c"].any()


def test_a_network_that_does_not_say_takes_the_shape():
    """A PyTorch module."""
    assert random_feeds([], (1, 3, 4, 4))["input"].shape == (1, 3, 4, 4)


@pytest.mark.parametrize(
    ("inputs", "shape", "message"),
    [
        ([], None, "give shape="),
        ([Input("image", (None, 3, None, None), FLOAT)], None, r"'image' is \?×3×\?×\?; .*shape="),
        ([Input("image", (None, 3, 8, 8), FLOAT)], (1, 3, 9, 8), "shape=1x3x9x8 does not fit"),
        ([Input("image", (None, 3, 8, 8), FLOAT)], (3, 8, 8), "does not fit"),
        ([Input("a", (1,), FLOAT), Input("b", (1,), FLOAT)], (1,), "2 inputs"),
    ],
)
def test_shapes_that_do_not_fit(inputs: list[Input], shape: tuple[int, ...] | None, message: str):
    """The message names the input and what is wrong with it."""
    with pytest.raises(ModelError, match=message):
        random_feeds(inputs, shape)


def test_describe_shape():
    assert describe_shape((None, 3, 8)) == "?×3×8"
