"""Entries of a run in a folder: there whole or not at all, of one run only, back as they went in."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.errors import OutputError
from netdecouple.execution.checkpoint import Checkpoint
from netdecouple.moments import Moments

IDENTITY = {"model": "one", "settings": {"seed": 0, "families": ("all",)}}


@dataclass(frozen=True)
class Entry:
    name: str
    moments: Moments
    made: Factorization
    pairs: tuple[tuple[int, float | None], ...]
    by_name: dict[str, tuple[float, ...]]


def entry() -> Entry:
    rng = np.random.default_rng(0)
    moments = Moments.of(rng.standard_normal((9, 2, 4)), rng.standard_normal((9, 2, 3)))
    geometry = ConvGeometry(6, 8, 1, 1, groups=2)
    stage = ConvStage(geometry, rng.standard_normal((6, 4, 1, 1)).astype(np.float32), np.arange(8))
    return Entry("é/1", moments, Factorization(geometry, (stage,)), ((1, None), (2, 0.1)), {"a": (1e-300,)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "work"


def opened(folder: Path, **changed: object) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    try:
        checkpoint.claim(IDENTITY | changed)
    except OutputError:
        checkpoint.close()
        raise
    return checkpoint


def test_an_entry_comes_back_number_for_number(folder: Path):
    first = opened(folder)
    made = entry()
    first.save("one", made)
    first.close()
    found = opened(folder).load("one", Entry)
    assert (found.name, found.pairs, found.by_name) == (made.name, made.pairs, made.by_name)
    assert found.made.stages[0].geometry == made.made.stages[0].geometry
    assert found.made.bias is None
    assert found.moments.count == 9
    for name in ("mean_x", "mean_y", "gram", "cross", "power"):
        one, other = getattr(found.moments, name), getattr(made.moments, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.made.stages[0].weight, made.made.stages[0].weight)


def test_work_is_done_once(folder: Path):
    kept = opened(folder)
    assert [kept.once("number", int, lambda n=n: n) for n in (3, 4)] == [3, 3]
    kept.drop("number")
    assert kept.once("number", int, lambda: 5) == 5
    kept.drop("never there")


def test_without_a_folder_nothing_is_kept():
    nowhere = Checkpoint()
    nowhere.claim(IDENTITY)
    assert [nowhere.once("number", int, lambda n=n: n) for n in (3, 4)] == [3, 4]
    assert nowhere.scratch is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:200] + b"x" + path.read_bytes()[201:]),
        lambda path: np.savez(path.open("wb"), value=np.frombuffer(b'{"name": 3}', np.uint8)),
        lambda path: np.savez(path.open("wb"), value=np.array([object()]), allow_pickle=True),
        lambda path: np.savez(path.open("wb"), other=np.zeros(3)),
    ],
)
def test_an_entry_that_cannot_be_read_is_computed_again(folder: Path, damage):
    kept = opened(folder)
    kept.save("one", entry())
    damage(folder / "one.npz")
    assert kept.load("one", Entry) is None
    assert kept.once("one", Entry, entry).name == "é/1"
    assert kept.load("one", Entry).name == "é/1"


def test_another_run_s_folder_is_refused(folder: Path):
    opened(folder).close()
    with pytest.raises(OutputError) as caught:
        opened(folder, model="two")
    message = "is of another run (model: one there, two now); give work= another folder, or remove this one"
    assert str(caught.value) == f"{folder}: {message}"
    with pytest.raises(OutputError, match="another run"):
        opened(folder, more=1)
    opened(folder)


def test_a_folder_of_other_files_is_refused_and_left_alone(folder: Path):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds other files"):
        opened(folder)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert not (folder / "run.json").exists()


def test_nothing_is_loaded_or_saved_before_the_run_is_known(folder: Path):
    unclaimed = Checkpoint(folder)
    with pytest.raises(AssertionError):
        unclaimed.load("one", int)
    with pytest.raises(AssertionError):
        unclaimed.save("one", 1)


def test_two_runs_at_once_are_refused(folder: Path):
    first = opened(folder)
    with pytest.raises(OutputError, match="another run is using it"):
        opened(folder)
    first.close()
    opened(folder)


def test_a_header_cut_short_is_no_other_run(folder: Path):
    """It is written before everything else, so nothing can be lost."""
    opened(folder).close()
    (folder / "run.json").write_text('{"mod')
    opened(folder).close()
    assert json.loads((folder / "run.json").read_text())["model"] == "one"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file: cannot write there"):
        opened(tmp_path / "file")
    with pytest.raises(OutputError, match=r"no.where: cannot write there \(No such file or directory\)"):
        opened(tmp_path / "no" / "where")
    with pytest.raises(OutputError, match="cannot write there"):
        opened(Path("/proc/work"))


@pytest.mark.parametrize("what", ["write", "fsync", "replace"])
def test_a_full_disk_loses_nothing(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch):
    kept = opened(folder)
    kept.save("one", 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        if what == "write":
            patched.setattr(zipfile.ZipFile, "open", full)
        else:
            patched.setattr(os, what, full)
        for name in ("one", "two"):
            with pytest.raises(OutputError) as caught:
                kept.save(name, entry())
            assert "No space left on device" in str(caught.value)
            assert "earlier results are kept" in str(caught.value)
    assert kept.load("one", int) == 1
    assert kept.load("two", Entry) is None
    assert not list((folder / "scratch").iterdir())


def test_what_a_killed_run_left_half_written_is_removed(folder: Path):
    opened(folder).close()
    (folder / "scratch" / "one.npz").write_bytes(b"half")
    assert opened(folder).scratch == folder / "scratch"
    assert not list((folder / "scratch").iterdir())
