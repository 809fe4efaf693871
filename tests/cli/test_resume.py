"""Runs that are killed at random moments, or whose disk fills up, go on and end with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from netdecouple.cli import main
from tests import networks

ONNX = ["run", "net.onnx", "--calib", "data.npz:images", "--families", "nd,cd", "--macs", "60%"]
FILES = ["-o", "out.onnx", "--plan-out", "plan.json", "--report", "report.json", "--quiet"]


@pytest.fixture
def deep(folder: Path) -> Path:
    """The folder, with a residual network."""
    onnx.save(networks.residual(), folder / "net.onnx")
    return folder


@pytest.fixture
def small(folder: Path) -> Path:
    """The folder, with a network of one residual block: it is about what is kept, not about how much."""
    b = networks.Builder()
    x = b.node("Relu", b.conv("image", 3, 8, 3, "stem"))
    y = b.node("Relu", b.conv(x, 8, 12, 3, "first"))
    b.classifier(b.node("Relu", b.node("Add", b.conv(y, 12, 8, 3, "second"), x)), 8)
    onnx.save(b.model(), folder / "net.onnx")
    return folder


def _child(folder: str, arguments: list[str], limit: int | None) -> None:
    """Run a command in a process of its own, which began as a copy of one that has imported everything."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["netdecouple", *arguments]
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main()


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Start a command without waiting for imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["netdecouple.cli", "netdecouple.api", "tests.cli.test_resume"])
    started: list[BaseProcess] = []

    def begin(folder: Path, arguments: list[str], limit: int | None = None) -> BaseProcess:
        process = context.Process(target=_child, args=(str(folder), arguments, limit))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def told(folder: Path) -> dict[str, Any]:
    """A report, but for the command that it is a report of."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    report["provenance"].pop("command")
    return report


def results(folder: Path) -> dict[str, bytes]:
    names = ["plan.json", *(["out.onnx"] if (folder / "out.onnx").exists() else [])]
    names += ["out/model.safetensors"] if (folder / "out").is_dir() else []
    return {name: (folder / name).read_bytes() for name in names}


def survives(
    start: Callable[..., BaseProcess], folder: Path, command: list[str], kills: int, seed: int
) -> None:
    """Kill runs at random moments until there were so many kills; all that ended made the same files."""
    process = start(folder, command)
    process.join()
    assert process.exitcode == 0, (folder / "err.txt").read_text()
    began = time.monotonic()
    process = start(folder, command)
    process.join()
    duration = time.monotonic() - began
    expected, report = results(folder), told(folder)
    rng = random.Random(seed)
    killed = runs = 0
    while killed < kills:
        runs += 1
        work = folder / f"work{runs}"
        for name in (*expected, "report.json"):
            (folder / name).unlink()
        longest = duration
        while True:
            process = start(folder, [*command, "--work", work.name])
            process.join(rng.uniform(0.05, 1) * longest)
            longest *= 1.02  # or a machine that became busy might never let this run end
            if process.exitcode is not None:
                assert process.exitcode == 0, (folder / "err.txt").read_text()
                break
            process.kill()
            process.join()
            killed += 1
        assert results(folder) == expected
        assert told(folder) == report
    assert runs > 1 or kills < 10  # or else all kills came before anything was found


@pytest.mark.slow
def test_a_killed_run_goes_on(start, deep: Path):
    survives(start, deep, [*ONNX, *FILES], 4, 0)


@pytest.mark.slow
def test_fifty_kills(start, deep: Path):
    survives(start, deep, [*ONNX, *FILES], 55, 1)


NETS = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )
"""


@pytest.mark.slow
def test_a_killed_run_of_a_pytorch_model_goes_on(start, folder: Path):
    pytest.importorskip("torch")
    (folder / "nets.py").write_text(NETS)
    command = [*ONNX, *FILES, "-o", "out"]
    command[1] = "nets:make"
    survives(start, folder, command, 5, 2)


def test_every_write_may_fail(netdecouple, small: Path, monkeypatch: pytest.MonkeyPatch):
    """Whichever entry finds the disk full: one line, nothing half-written, and the next run ends as ever."""
    assert netdecouple(*ONNX, *FILES).code == 0
    expected, report = results(small), told(small)
    fsync = os.fsync
    for name in (*expected, "report.json"):
        (small / name).unlink()
    failures = 0
    room = 0  # writes that still succeed

    def filling(handle: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", filling)
    while True:
        room = failures % 7
        ended = netdecouple(*ONNX, *FILES, "--work", "work")
        if not ended.code:
            break
        failures += 1
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert "work: cannot write there (No space left on device)" in ended.err
        assert not (small / "out.onnx").exists()
        assert not list((small / "work" / "scratch").iterdir())
    assert failures > 5
    assert results(small) == expected
    assert told(small) == report


def test_a_disk_that_is_really_full(start, deep: Path):
    """The system itself refuses to write files as large as an entry."""
    command = [*ONNX, *FILES, "--work", "work"]
    process = start(deep, command, 40_000)
    process.join()
    assert process.exitcode == 2
    err = (deep / "err.txt").read_text()
    assert err.startswith("error: work: cannot write there (File too large); make room")
    assert err.count("\n") == 1
    assert not (deep / "out.onnx").exists()
    process = start(deep, command)
    process.join()
    assert process.exitcode == 0, (deep / "err.txt").read_text()


def test_results_that_cannot_be_written_need_no_second_run(netdecouple, small: Path, monkeypatch):
    """The network finds no room: what led to it is kept, and not done again."""
    write = onnx.save_model

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    ended = netdecouple(*ONNX, *FILES, "--work", "work")
    assert ended.code == 2
    assert (
        ended.err == "error: out.onnx: cannot write there (No space left on device); choose another place\n"
    )
    assert not (small / "out.onnx").exists()
    monkeypatch.setattr(onnx, "save_model", write)

    def again(*_: object) -> None:
        raise AssertionError("was done before")

    monkeypatch.setattr("netdecouple.planning.analysis.candidates", again)
    monkeypatch.setattr("netdecouple.fitting.apply._applied", again)
    assert netdecouple(*ONNX, *FILES, "--work", "work").code == 0


def test_a_run_s_folder_serves_other_budgets(netdecouple, small: Path, monkeypatch: pytest.MonkeyPatch):
    assert netdecouple(*ONNX, *FILES, "--work", "work").code == 0
    plain = netdecouple(*ONNX, "--macs", "2x", *FILES)
    assert plain.code == 0
    expected = results(small)

    def again(*_: object) -> None:
        raise AssertionError("was done before")

    monkeypatch.setattr("netdecouple.planning.analysis.candidates", again)
    assert netdecouple(*ONNX, "--macs", "2x", *FILES, "--work", "work").code == 0
    assert results(small) == expected


def test_another_run_s_folder_is_refused(netdecouple, small: Path):
    assert netdecouple(*ONNX, *FILES, "--work", "work").code == 0
    for changed in (["--seed", "1"], ["--families", "nd"], ["--samples", "20"], ["--exclude", "stem"]):
        ended = netdecouple(*ONNX, *changed, *FILES, "--work", "work")
        assert ended.code == 2
        assert ended.err.startswith("error: work: is of another run (")
        assert ended.err.count("\n") == 1


def test_data_free_runs_are_kept_as_well(netdecouple, small: Path):
    command = ["run", "net.onnx", "--data-free", "--families", "nd,cd", "--macs", "60%", *FILES]
    assert netdecouple(*command).code == 0
    expected = results(small)
    for _ in range(2):
        assert netdecouple(*command, "--work", "work").code == 0
        assert results(small) == expected


def test_a_spill_finds_no_room(netdecouple, small: Path, monkeypatch: pytest.MonkeyPatch):
    """Live tensors beyond what memory holds go into the work folder; a full disk is told in one line."""
    from netdecouple.execution.memory import Memory

    monkeypatch.setattr(Memory, "within", lambda *_: Memory(store_bytes=1000))
    assert netdecouple(*ONNX, *FILES, "--work", "work").code == 0
    expected = results(small)
    save = np.save

    def full(path: Path, *_: object, **__: object) -> None:
        assert "scratch" in str(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    ended = netdecouple(*ONNX, *FILES, "--macs", "2x", "--work", "work")
    assert ended.code == 2
    assert ended.err.startswith("error: work/scratch: no room for 0 MB (No space left on device)")
    monkeypatch.setattr(np, "save", save)
    assert netdecouple(*ONNX, *FILES, "--work", "work").code == 0
    assert results(small) == expected
