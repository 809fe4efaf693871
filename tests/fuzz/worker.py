"""A process that takes hostile cases, one a line, and tells what became of each.

Started by `tests.fuzz.harness`, which notices when this process dies or does not come back.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import netdecouple
from netdecouple.cli import main
from netdecouple.errors import ModelError, NetDecoupleError
from netdecouple.execution import limits
from netdecouple.fitting.sampling import sample_positions
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from tests.fuzz.case import Case

GROWTH = 700 << 20  # bytes of memory that a case may take, on top of what is always there
DATA = 3 << 30  # bytes beyond which the system refuses
WRITTEN = 300 << 20  # bytes a file may grow to
SECRET = b"not to be read, not to be changed"
PROGRESS = re.compile(r"[^:]+: \d+ of \d+.*")


def images_for(shape: tuple[int | None, ...], count: int) -> np.ndarray:
    """Inputs for a network that takes this shape, small where it takes any."""
    channels, height, width = (size or default for size, default in zip(shape, (3, 10, 14), strict=True))
    limits.SAMPLE_BYTES.check(4 * count * channels * height * width, "what the network takes", ModelError)
    return np.random.default_rng(0).standard_normal((count, channels, height, width)).astype(np.float32)


def check_layers() -> None:
    """Hold every layer of model.onnx, as it was read, against what ONNX Runtime makes of it."""
    model = read_model("model.onnx")
    images = images_for((model.channels, *(model.size or (None, None))), 4)
    network = OnnxNetwork(model, np.moveaxis(images, 1, -1) if model.channels_last else images)
    open_layers = {la.name: la for la in network.layers if la.geometry and not la.reason}
    positions = {name: sample_positions(la, len(images), 0) for name, la in open_layers.items()}
    for seen in network.observe(images, positions):
        layer = open_layers[seen.layer]
        weight = np.float64(layer.weight).reshape(layer.geometry.groups, -1, seen.patches.shape[2])
        with np.errstate(over="ignore", invalid="ignore"):
            made = np.einsum("gmd,ngd->ngm", weight, np.float64(seen.patches)).reshape(len(seen.patches), -1)
            scale = np.einsum("gmd,ngd->ngm", abs(weight), abs(np.float64(seen.patches))).max(initial=1e-30)
        error = np.abs(made + layer.bias - seen.outputs).max(initial=0.0)
        scale = max(scale, np.abs(layer.bias).max(initial=0.0))
        assert error <= 1e-3 * scale, f"layer {layer.name!r} was read wrongly, by {error:.1e} of {scale:.1e}"


def decouple_proto() -> None:
    """Decouple a model that is in memory, from arrays."""
    try:
        proto = onnx.ModelProto.FromString(Path("model.onnx").read_bytes())
    except Exception:  # who has such a model in memory?
        return
    before = proto.SerializeToString(deterministic=True)
    dims = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] if proto.graph.input else []
    shape = tuple(size if 0 < size < 99 else None for size in (*dims[1:4], 0, 0, 0)[:3])
    settings = netdecouple.Settings(families=("nd-dp",))
    try:
        result = netdecouple.decouple(proto, images_for(shape, 12), macs=0.6, settings=settings)
        onnxruntime.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    finally:
        assert proto.SerializeToString(deterministic=True) == before, "the model given was changed"


def load_folder() -> None:
    """Load a saved PyTorch module."""
    import torch

    from tests.frontends.torch.modules import inputs, net

    found = netdecouple.load(net(), "saved")
    with torch.no_grad():
        assert found(inputs()).shape == (4, 5)


PYTHON: dict[str, Callable[[], None]] = {
    "check-layers": check_layers,
    "decouple-proto": decouple_proto,
    "load-folder": load_folder,
}


def die() -> None:
    """As a library does that is not written in Python."""
    os.kill(os.getpid(), signal.SIGSEGV)


def grow() -> None:
    """Take memory, and give it back."""
    np.ones(GROWTH // 8 + 10**7)


# what the worker has to notice
FAULTS: dict[str, Callable[[], object]] = {
    "test-dies": die,
    "test-raises": lambda: {}["nothing"],
    "test-grows": grow,
    "test-writes": lambda: Path("../secret").write_bytes(b""),
    "test-litters": lambda: Path("litter").touch(),
}


def run(case: Case) -> str:
    """Run a case in a box of its own; return what was wrong about how it ended, or nothing."""
    with tempfile.TemporaryDirectory() as box:
        work, scratch = Path(box) / "work", Path(box) / "tmp"
        work.mkdir()
        scratch.mkdir()
        (Path(box) / "secret").write_bytes(SECRET)
        case.write(work)
        before = set(work.rglob("*"))
        tempfile.tempdir = str(scratch)
        home = os.getcwd()
        os.chdir(work)
        resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, resource.RLIM_INFINITY))
        gc.collect()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        start = _memory("VmRSS")
        try:
            succeeded, problem = _called(case)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.chdir(home)
            tempfile.tempdir = None
        grown = _memory("VmHWM") - start
        if problem:
            return problem
        if grown > GROWTH:
            return f"memory: {grown >> 20} MiB"
        # PyTorch has a cache of its own there
        if left := [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]:
            return f"left in the temporary folder: {left}"
        if {path.name for path in Path(box).iterdir()} != {"work", "tmp", "secret"} or (
            Path(box) / "secret"
        ).read_bytes() != SECRET:
            return "a file outside of the folder was written"
        new = {path for path in work.rglob("*") if "__pycache__" not in path.parts} - before
        wanted = {path for path in new if path.name.startswith("out")} if succeeded else set()
        if new - wanted:
            return f"files nobody asked for: {sorted(path.name for path in new - wanted)}"
        out = work / "out.onnx"
        if out in new:
            if SECRET in out.read_bytes():
                return "a file outside of the folder was read"
            onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        return ""


def _called(case: Case) -> tuple[bool, str]:
    """Whether the command went well, and what was wrong about how it ended."""
    name = case.command[0]
    try:
        if name in PYTHON or name in FAULTS:
            try:
                (PYTHON | FAULTS)[name]()
            except NetDecoupleError as error:
                text = str(error)
                return False, "" if text and len(text.splitlines()) == 1 else f"not one line: {text!r:.500}"
            return True, ""
        return _commanded(case.command)
    except BaseException:
        return False, traceback.format_exc()


def _commanded(arguments: tuple[str, ...]) -> tuple[bool, str]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["netdecouple", *arguments]
    code: object = 1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    if code == 0:
        return True, ""
    if code == 1:  # once more, to see where
        os.environ["NETDECOUPLE_TRACEBACK"] = "1"
        try:
            main()
        finally:
            del os.environ["NETDECOUPLE_TRACEBACK"]
    lines = [line for line in err.getvalue().splitlines() if not PROGRESS.fullmatch(line)]
    errors = [line for line in lines if line.startswith("error: ")]  # first, above what a library says
    if code != 2 or not errors or lines[:1] != errors or "Traceback" in err.getvalue():
        return False, f"exit code {code}, standard error: {err.getvalue()[-2000:]}"
    return False, ""


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def serve() -> None:
    """Answer every line of standard input, a case, with one of standard output."""
    resource.setrlimit(resource.RLIMIT_DATA, (DATA, DATA))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints to it
    for line in sys.stdin:
        problem = run(Case.from_json(line))
        print(json.dumps(problem), file=answers, flush=True)


if __name__ == "__main__":
    serve()
