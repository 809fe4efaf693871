"""A command line to call, and a folder with everything it may be given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from netdecouple import kernels
from netdecouple.cli import main
from tests import networks
from tests.cli.prepared import Prepared, prepared
from tests.kernels.test_onnxruntime import chain

Inputs = dict[str, str]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def short_timing(short_timing: None) -> None:
    """Every command measures for a few rounds only."""


@pytest.fixture
def netdecouple(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run the command line in this process, without the lines of progress that a slow machine prints."""
    monkeypatch.setattr("netdecouple.cli.terminal.EVERY", float("inf"))
    monkeypatch.delenv("NETDECOUPLE_TRACEBACK", raising=False)

    def call(*arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["netdecouple", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        written = capsys.readouterr()
        code = ended.value.code
        return Ended(0 if code is None else int(code), written.out, written.err)

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with net.onnx (3 × 8 × 8), other.onnx, data.npz and images/."""
    monkeypatch.chdir(tmp_path)
    onnx.save(networks.classifier(), tmp_path / "net.onnx")
    onnx.save(networks.classifier(seed=1), tmp_path / "other.onnx")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((24, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images, labels=rng.integers(0, 10, 24))
    (tmp_path / "images").mkdir()
    for index in range(16):
        picture = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "images" / f"{index:02}.png")
    return tmp_path


@pytest.fixture
def custom_ops(folder: Path) -> Path:
    """A library with an operator of another domain, which net.onnx uses: ours, under another name."""
    if not kernels.available():
        pytest.skip("the fused operator was not built")
    built, other = kernels.library_path().read_bytes(), b"other.maker"
    assert len(other) == len(kernels.DOMAIN)
    library = folder / "operators.so"
    library.write_bytes(built.replace(kernels.DOMAIN.encode() + b"\0", other + b"\0"))
    made = chain("fused", [(8, 8, 2)]).graph
    made.node[0].domain = other.decode()
    onnx.save(networks.with_custom_operator(made.node[0], made.initializer), folder / "net.onnx")
    return library


@pytest.fixture(scope="session")
def forked() -> Iterator[Prepared]:
    """Run the command line in a process of its own, which does not wait for imports."""
    with prepared() as process:
        yield process
