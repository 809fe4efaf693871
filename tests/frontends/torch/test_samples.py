"""Calibration sets as people have them, cut into samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from netdecouple.errors import CalibrationError  # noqa: E402
from netdecouple.fitting.sampling import Inputs  # noqa: E402
from netdecouple.frontends.torch.samples import Samples, collect  # noqa: E402

X = torch.arange(12 * 3 * 4 * 5.0).reshape(12, 3, 4, 5)
LABELS = torch.arange(12)


class Takes(nn.Module):
    def forward(self, x: Any, mask: Any, with_features: bool = False) -> Any:
        return x


class TakesOne(nn.Module):
    def forward(self, x: Any, with_features: bool = False) -> Any:
        return x


class TakesAny(nn.Module):
    def forward(self, *xs: Any) -> Any:
        return xs[0]


class TakesSequences(TakesOne):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)


def loader(*tensors: Any) -> Any:
    return DataLoader(TensorDataset(*tensors), batch_size=5)


PLAIN = {
    "a tensor": X,
    "an array": X.numpy(),
    "a reversed array": X.numpy()[::-1][::-1],
    "batches": list(X.split(5)),
    "a generator": (batch for batch in X.split(5)),
    "arrays": [batch.numpy() for batch in X.split(5)],
    "tuples": [(batch,) for batch in X.split(5)],
    "a loader": loader(X),
    "a loader with labels": loader(X, LABELS),
    "labels of another kind": [(batch, ["cat"] * len(batch)) for batch in X.split(5)],
    "labels as arrays": [(batch.numpy(), np.zeros(len(batch))) for batch in X.split(5)],
}


@pytest.mark.parametrize("calib", PLAIN.values(), ids=PLAIN)
def test_batches_are_cut_into_samples(calib: Any):
    """One argument each, labels left out; all together are the tensor again."""
    samples = collect(calib, TakesOne(), None, None)
    assert len(samples) == 12
    assert all(kwargs == {} and len(args) == 1 for args, kwargs in samples)
    assert torch.equal(samples.arguments[0][0], X)
    assert samples.alike


@pytest.mark.parametrize("module", [Takes(), nn.DataParallel(Takes())])
def test_as_many_entries_as_forward_asks_for(module: Any):
    """A second argument is no label then; one that it can do without would be."""
    samples = collect(loader(X, LABELS), module, None, None)
    assert len(samples[0:1].arguments[0]) == 2
    assert torch.equal(samples.arguments[0][1], LABELS)
    assert collect([(X, "cat")], Takes(), None, None)[:1].arguments[0][0].shape == (1, 3, 4, 5)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.numpy()])
def test_mappings_are_named_arguments(make: Any):
    """In batches, or one of them all."""
    for calib in ([{"x": make(X[:6])}, {"x": make(X[6:])}], {"x": make(X)}):
        samples = collect(calib, TakesOne(), None, None)
        assert len(samples) == 12
        assert torch.equal(samples.arguments[1]["x"], X)


@pytest.mark.parametrize(
    "calib",
    [
        [[X[0], X[1, :, :2]], [X[2]]],
        [([X[0], X[1, :, :2]], [{"boxes": 0}, {"boxes": 1}]), ([X[2]], [{}])],
        [((X[0], X[1, :, :2]), ("a", "b")), ((X[2],), ("c",))],
        [[X[0].numpy(), X[1, :, :2].numpy()], [X[2].numpy()]],
    ],
    ids=["lists", "with targets", "tuples with targets", "arrays"],
)
def test_detectors_take_lists_of_pictures(calib: Any):
    """One picture is one sample."""
    samples = collect(calib, Takes(), None, None)
    assert [[tuple(p.shape) for p in args[0]] for args, _ in samples] == [
        [(3, 4, 5)],
        [(3, 2, 5)],
        [(3, 4, 5)],
    ]
    assert not samples.alike


@pytest.mark.parametrize("make", [list, np.stack])
def test_single_samples_need_no_batch_dimension(make: Any):
    """If they have the channels of the first convolution."""
    pictures = [np.full((3, 8, 8), i, np.float32) for i in range(5)]
    module = nn.Sequential(nn.Conv2d(3, 8, 3))
    units = list(collect(make(pictures), module, None, None))
    assert [args[0].shape for args, _ in units] == [(1, 3, 8, 8)] * 5
    rows = [torch.zeros(4, 8, 8)] * 2  # of modules that add the channels themselves
    assert len(collect(rows, module, None, None)) == 8


def test_sequences_are_no_pictures():
    """A loader of (N, C, L) yields lists of one 3-D tensor too."""
    samples = collect(loader(X[:, 0]), TakesSequences(), None, None)
    assert torch.equal(samples.arguments[0][0], X[:, 0])
    assert len(samples) == 12


def test_arguments_are_made_of_batches():
    """What they make counts, not the batch."""
    batches = [{"image": X[:6], "path": "a"}, {"image": X[6:], "path": "b"}]
    samples = collect(batches, TakesOne(), None, lambda batch: batch["image"] / 2)
    assert torch.equal(samples.arguments[0][0], X / 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [TakesOne, TakesAny, lambda: torch.jit.trace(TakesOne(), X)])
def test_a_tuple_that_arguments_makes_is_taken_whole(make: Any):
    """Whatever is in it, and whatever the signature says, if it says anything."""
    samples = collect(loader(X, LABELS), make(), None, lambda batch: (batch[0], [batch[1], 2.0], True))
    assert len(samples) == 12
    x, (label, two), flag = samples[3:4].arguments[0]
    assert torch.equal(x, X[3:4])
    assert (label, two, flag) == (LABELS[3:4], 2.0, True)


def test_what_is_shared_by_all_samples_is_not_cut():
    """A batch whose tensors differ in length is run whole."""
    samples = collect([(X, torch.ones(3))], Takes(), None, None)
    assert len(samples) == 1
    assert torch.equal(samples.arguments[0][0], X)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_no_more_than_asked_for(sizes: list[int], limit: int):
    """However batches are cut; none is asked for that is not needed."""
    asked = []

    def batches() -> Iterator[Any]:
        for size in sizes:
            asked.append(size)
            yield X[:size]

    samples = collect(batches(), TakesOne(), limit, None)
    assert len(samples) == min(limit, sum(sizes))
    assert sum(asked[:-1]) < limit


@pytest.mark.parametrize("limit", [0, -1])
def test_fewer_than_one_sample_is_refused(limit: int):
    """None would be left, or all but the last."""
    with pytest.raises(CalibrationError, match=f"{limit} samples asked for: ask for at least 1"):
        collect(X, TakesOne(), limit, None)


def test_samples_are_alike_only_in_all_but_numbers():
    """Types, shapes and what is no tensor."""

    def alike(*units: Any) -> bool:
        return Samples([((unit,), {}) for unit in units]).alike

    x = X[:1]
    assert alike(x, x + 1)
    assert not alike(x, x.double())
    assert not alike(x, x[..., :2])
    assert not alike((x, "a"), (x, "b"))
    assert not alike([x], (x,))


@given(st.integers(0, 99), st.integers(1, 12))
@settings(deadline=None, max_examples=10)
def test_plain_tensors_have_their_arrays_fingerprint(seed: int, size: int):
    """So that a plan of one front door finds its samples in the other."""
    x = torch.randn(12, 3, size, 4, generator=torch.Generator().manual_seed(seed))
    expected = Inputs.split(x.numpy(), seed).fingerprint
    assert collect(x, TakesOne(), None, None).fingerprint == expected
    assert collect(loader(x, LABELS), TakesOne(), None, None).fingerprint == expected
    x[3, 0, 0, 0] += 1
    assert collect(x, TakesOne(), None, None).fingerprint != expected


def test_fingerprints_tell_samples_apart():
    """By shapes, numbers and what is no tensor."""
    x = X[:1]
    sets = ([x], [x, x], [(x, x)], [x[..., :2]], [{"x": x, "flag": 1}], [{"x": x, "flag": 2}], [x.half()])
    prints = [collect(s, Takes(), None, None).fingerprint for s in sets]
    assert len(set(prints)) == len(sets)


def failing(error: Exception) -> Iterator[Any]:
    yield X
    raise error


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        ("folder", "calib is a str"),
        (None, "calib is a NoneType"),
        (7, "calib is a int"),
        ([], "calib is empty"),
        (["a"], "batch 0 of calib: a str cannot be run"),
        ([X, None], "batch 1 of calib: a NoneType cannot be run"),
        ([()], "a tuple cannot be run"),
        ([{"x": 1}], "no tensor in it"),
        ([np.array(["a", "b"])], "batch 0 of calib"),
        (failing(OSError("disk\nis gone")), "batch 1 of calib: OSError: disk$"),
        (failing(KeyError("x")), "batch 1 of calib: KeyError: 'x'"),
    ],
)
def test_what_is_no_sample_is_refused(calib: Any, message: str):
    """In one line that says which batch."""
    with pytest.raises(CalibrationError, match=message) as caught:
        collect(calib, TakesOne(), None, None)
    assert "\n" not in str(caught.value)


def test_errors_of_arguments_are_reported():
    with pytest.raises(CalibrationError, match="batch 0 of calib: KeyError: 'image'"):
        collect([{"x": X}], TakesOne(), None, lambda batch: batch["image"])
    with pytest.raises(KeyboardInterrupt):
        collect([X], TakesOne(), None, lambda batch: (_ for _ in ()).throw(KeyboardInterrupt))
