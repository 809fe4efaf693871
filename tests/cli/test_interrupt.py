"""Ctrl-C, at whatever moment: an end within a second, one line, exit code 130, and nothing half done."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import onnx
import pytest

from netdecouple.cli.interrupt import interruptible
from tests import networks

Process = subprocess.Popen[str]
RUN = ["run", "net.onnx", "-o", "out.onnx", "--macs", "2x", "--calib", "data.npz:images", "--families", "nd"]
SOON = 2.0  # seconds of one core that the end may take; one second is promised where nothing else runs


@pytest.fixture
def long_run(folder: Path) -> Path:
    """The folder, with a network on which a run takes many seconds, and a folder for temporary files."""
    return with_network(folder, layers=40, width=64)


@pytest.fixture
def long_sweep(folder: Path) -> Path:
    """The same, with a network on which a sweep takes many seconds."""
    return with_network(folder, layers=6, width=32)


def with_network(folder: Path, layers: int, width: int) -> Path:
    b = networks.Builder()
    x = b.conv("image", 3, width, 3, "first")
    for index in range(layers):
        x = b.node("Relu", b.conv(x, width, width, 3, f"conv{index}"))
    b.classifier(x, width)
    onnx.save(b.model(), folder / "net.onnx")
    (folder / "temporary").mkdir()
    return folder


def started(folder: Path, *arguments: str, begin: Sequence[str] = ("-m", "netdecouple")) -> Process:
    return subprocess.Popen(
        [sys.executable, *begin, *arguments],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder / "temporary")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=stay_on_one_core,  # so that work takes long on every machine
    )


def stay_on_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def spent(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def interrupted(process: Process) -> tuple[str, str]:
    """Send Ctrl-C; return what was printed, if the process does little work after that.

    Its time on the processor counts, not the time that passes, which depends on what else the machine does.
    """
    ended = spent(resource.getrusage(resource.RUSAGE_CHILDREN))  # of all that ended before
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        fields = []
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    if fields:
        before = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        assert spent(resource.getrusage(resource.RUSAGE_CHILDREN)) - ended - before < SOON
    assert process.returncode == 130, err
    return out, err


def is_told(err: str) -> bool:
    """Whether one line tells of it; before that there may be progress, if the machine is slow."""
    *progress, last = err.splitlines()
    return last == "interrupted: nothing was written" and all(" of " in line for line in progress)


def wait_for(stream: IO[str] | None, text: str) -> None:
    assert stream is not None
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"ended before it said {text!r}")


def files(folder: Path) -> set[Path]:
    own = ("__pycache__", ".ses")  # Python's, and what ONNX Runtime leaves behind when it is imported
    return {path for path in folder.rglob("*") if not set(own) & set(path.parts)}


READY = """
import signal, sys
from netdecouple.__main__ import main

def ready(*arguments):
    signal.signal = set_handler
    set_handler(*arguments)
    print("ready", file=sys.stderr, flush=True)

set_handler, signal.signal = signal.signal, ready
sys.argv = ["netdecouple", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("seconds", [0.0, 0.4, 0.8, 1.6, pytest.param(4.5, marks=pytest.mark.slow)])
def test_at_any_moment(long_run: Path, seconds: float):
    """While modules are imported, the network is read, watched, weighed, decoupled."""
    before = files(long_run)
    process = started(long_run, *RUN, begin=("-c", READY))
    wait_for(process.stderr, "ready")  # Python itself takes its time to start
    time.sleep(seconds)
    _, err = interrupted(process)
    assert is_told(err)
    assert files(long_run) == before


NATIVE = """
import sys
import numpy as np
{imports}
from netdecouple.frontends.onnx import source

given = np.asfortranarray(np.eye({size}) + 1e-3)

def work():
    print("at work", file=sys.stderr, flush=True)
    {call}

real = source.read_model
source.read_model = lambda *arguments: work() or real(*arguments)
sys.argv = ["netdecouple", *sys.argv[1:]]
from netdecouple.__main__ import main
main()
"""
IMPORTS = {"numpy": "numpy", "scipy": "netdecouple.families.linalg as linalg", "torch": "torch"}
CALLS = {
    "numpy": "np.linalg.eigh(given)",
    "scipy": "linalg.solve(given, np.ones((1, len(given))))",
    "torch": "torch.linalg.svd(torch.rand(3000, 3000))",
}


@pytest.mark.parametrize("library", ["numpy", "scipy", "torch"])
def test_inside_a_native_call(long_run: Path, library: str):
    """That takes many seconds, in which Python's interpreter is not asked."""
    if library == "torch":
        pytest.importorskip("torch")
    before = files(long_run)
    size = {"numpy": 4000, "scipy": 8000, "torch": 1}[library]
    program = NATIVE.format(imports=f"import {IMPORTS[library]}", call=CALLS[library], size=size)
    process = started(long_run, *RUN, begin=("-c", program))
    wait_for(process.stderr, "at work")
    time.sleep(0.5)
    _, err = interrupted(process)
    assert is_told(err)
    assert files(long_run) == before


EVALUATED = """
import sys
import onnxruntime as ort
from netdecouple.__main__ import main

def run(*arguments):
    print("at work", file=sys.stderr, flush=True)
    return real(*arguments)

real, ort.InferenceSession.run = ort.InferenceSession.run, run
sys.argv = ["netdecouple", *sys.argv[1:]]
main()
"""


def test_inside_onnx_runtime(long_run: Path):
    """One run of a network on a large batch takes many seconds as well."""
    b = networks.Builder()
    x = b.conv("image", 3, 512, 3, "first")
    for index in range(6):
        x = b.node("Relu", b.conv(x, 512, 512, 3, f"conv{index}"))
    b.classifier(x, 512)
    onnx.save(b.model(), long_run / "net.onnx")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4000, 3, 8, 8)).astype(np.float32)
    np.savez(long_run / "many.npz", images=images, labels=np.zeros(4000, np.int64))
    before = files(long_run)
    arguments = ("eval", "net.onnx", "--data", "many.npz:images,labels")
    process = started(long_run, *arguments, begin=("-c", EVALUATED))
    wait_for(process.stderr, "at work")
    time.sleep(0.5)
    assert process.poll() is None
    interrupted(process)
    assert files(long_run) == before


def test_on_a_terminal(long_run: Path):
    """The bars go, and the cursor comes back."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "netdecouple", *RUN],
        cwd=long_run,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    while b"Evaluating" not in shown:
        shown += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # that is how a terminal says that nobody writes any more
        while part := os.read(master, 4096):
            shown += part
    os.close(master)
    assert process.wait(timeout=300) == 130
    assert b"\x1b[?25h" in shown.rpartition(b"Evaluating")[2]
    assert shown.endswith(b"nothing was written\r\n")


@pytest.mark.slow
def test_what_was_written_is_told(long_sweep: Path):
    """A sweep that is interrupted keeps the networks that are whole, and names them."""
    budgets = ",".join(f"{share}%" for share in (90, 80, 70))
    process = started(
        long_sweep, "sweep", "net.onnx", "--calib", "data.npz:images", "--macs", budgets, "-o", "networks"
    )
    first = long_sweep / "networks" / "net-macs90.onnx"
    while not first.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    _, err = interrupted(process)
    last = err.splitlines()[-1]
    assert last.startswith("interrupted: written by then: networks/net-macs90.onnx")
    assert sorted(last.split(": ")[2].split(", ")) == sorted(
        str(path.relative_to(long_sweep)) for path in first.parent.iterdir()
    )
    for path in first.parent.iterdir():
        onnx.checker.check_model(onnx.load(path))
    assert not files(long_sweep / "temporary")


@pytest.mark.slow
def test_told_as_json(long_run: Path):
    """One object, as for every other end."""
    process = started(long_run, *RUN, "--json")
    wait_for(process.stderr, "Budgets that can be met")
    out, err = interrupted(process)
    assert json.loads(out) == {"error": "interrupted: nothing was written", "exit_code": 130}
    assert err.endswith("interrupted: nothing was written\n")


def test_work_runs_in_a_thread_and_its_outcome_comes_back():
    """What it returns, what it raises; and the handler is what it was."""
    before = signal.getsignal(signal.SIGINT)
    assert interruptible(threading.current_thread) is not threading.main_thread()

    def fail() -> None:
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        interruptible(fail)
    assert signal.getsignal(signal.SIGINT) is before
