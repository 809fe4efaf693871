"""The package as it is installed: with a compiler, and where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ("src", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


def wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for name in PACKAGE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--wheel-dir", folder, source],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "scikit-build-core" in done.stderr + done.stdout and "No matching" in done.stderr:
        pytest.skip("what builds the package is not to be had: no network")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_without_a_compiler_all_else_works(tmp_path: Path) -> None:
    """The wheel is for any platform; the operator is not available, which is said when it is asked for."""
    built = wheel(tmp_path, CC="/bin/false", CXX="/bin/false")
    assert built.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(built).extractall(site)
    assert not list(site.rglob("*.so"))
    program = """if True:
        import onnxruntime
        from netdecouple import kernels
        from netdecouple.errors import UnavailableError

        assert not kernels.available()
        try:
            kernels.register(onnxruntime.SessionOptions())
        except UnavailableError as error:
            print(error)
    """
    # without `site`, which would find the editable installation first
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])

    def output(*arguments: str | Path) -> list[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    (line,) = output("-c", program)
    assert line.startswith("the fused operator was not built")
    report = output("-m", "netdecouple", "inspect", site / "netdecouple" / "demo" / "digits.onnx")
    assert any("features.4" in line for line in report)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_one_wheel_serves_every_python(tmp_path: Path) -> None:
    """It holds the library once, the demo's network and images, and no C++ sources."""
    built = wheel(tmp_path)
    assert "-py3-none-" in built.name
    assert not built.name.endswith("-any.whl")
    names = zipfile.ZipFile(built).namelist()
    assert [n for n in names if n.endswith(".so")] == ["netdecouple/kernels/netdecouple_kernels.so"]
    assert {"netdecouple/demo/digits.onnx", "netdecouple/demo/digits.npz", "netdecouple/py.typed"} <= set(
        names
    )
    assert not [n for n in names if n.endswith((".cpp", ".h", ".o"))]
