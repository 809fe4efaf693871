"""How much memory there is, how it is divided, and arrays that go to disk."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry
from netdecouple.errors import BudgetError
from netdecouple.execution.memory import ArrayStore, Memory, parse_bytes
from netdecouple.execution.run import Resources
from netdecouple.fitting.sampling import SplitMoments
from netdecouple.network import Layer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4 * 10**9),
        ("500 MB", 5 * 10**8),
        ("3.5gib", 7 << 29),
        ("1024", 1024),
        (7, 7),
        ("2t", 2 * 10**12),
    ],
)
def test_amounts(text: str | int, expected: int):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4XB", "0", "0GB", "4 GB of it", "1e9", "nan", "inf"])
def test_what_is_not_an_amount_is_refused(text: str):
    with pytest.raises(BudgetError, match="write an amount like 4GB"):
        Resources(memory=text)


def test_everything_held_at_once_fits():
    """Both stores and a layer that is fitted; before these, a group's moments and the batches."""
    model, inputs = 200 << 20, 100 << 20
    memory = Memory.within(4 * 10**9, model, inputs)
    left = 4 * 10**9 - 2.1 * model - inputs - (300 << 20)
    assert 2 * memory.store_bytes + memory.fit_bytes <= left + 1
    assert memory.moment_bytes + 4 * memory.batch_bytes + 2 * memory.store_bytes <= left + 1


def test_without_a_limit_nothing_is_too_wide():
    assert Memory.within(None, 1 << 40, 1 << 40) == Memory()
    assert Memory().fit_bytes == float("inf")


def test_a_layer_of_2048_channels_is_beyond_4_gb():
    """Three Gram matrices of it alone would take 8 GB; one of 512 channels has room."""

    def layer(n: int) -> Layer:
        g = ConvGeometry(n, n, 3, 3, pads=(1, 1, 1, 1))
        return Layer("x", "Conv", 1, 1, g, size=(14, 14))

    memory = Memory.within(4 * 10**9, 250 << 20, 150 << 20)
    assert SplitMoments.fit_bytes(layer(512)) < memory.fit_bytes < SplitMoments.fit_bytes(layer(1024))


@pytest.mark.parametrize(("shards", "expected"), [(None, 1), (4, 4)])
def test_shards_in_one_process_share_the_stores(shards: int | None, expected: int):
    with Resources(shards=shards).opened() as run:
        assert run.memory.store_bytes == Memory().store_bytes // expected
        assert run.shards == expected


def test_arrays_beyond_the_limit_go_to_disk_and_come_back() -> None:
    store = ArrayStore(limit=100)
    small, large = np.arange(10.0), np.arange(1000.0)
    store["small"], store["large"] = small, large
    np.testing.assert_array_equal(store["small"], small)
    np.testing.assert_array_equal(store["large"], large)
    store["small"] = large  # replaced by one that is too large
    np.testing.assert_array_equal(store["small"], large)
    store.pop("large")
    assert "large" not in store
    assert len(store) == 1
    store.pop("large")  # removing it twice is no error
