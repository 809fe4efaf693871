"""The package as it is installed: with a compiler, and where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ("src", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip")
pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def wheel(folder: Path, source: Path | None = None, **environment: str) -> Path:
    """Build a wheel from a source distribution, or from a copy of the sources."""
    if source is None:
        source = folder / "source"
        source.mkdir()
        for name in PACKAGE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
    done = subprocess.run(
        [*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_two_builds_of_one_checkout_share_no_folder() -> None:
    """What one build's CMake notes there of its environment can make the other fail, which is no error."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert "build-dir" not in settings  # then it is a temporary one


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


@needs_compiler
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


@needs_compiler
def test_what_is_released_installs_and_runs(tmp_path: Path) -> None:
    """From the sources to their distribution, a wheel, a new environment, and a decoupled network."""
    program = f"import scikit_build_core.build as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    (source,) = tmp_path.glob("netdecouple-*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"src/netdecouple/kernels/level.cpp", "tests/conftest.py", "Makefile", "LICENSE"} <= names
    folders = (".venv", "build/", "mutants/", "out/")
    assert not [n for n in names if n.startswith(folders) or n.endswith(".so")]

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    python, built = binaries / "python", wheel(tmp_path, source)
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", built], check=True)
    # what it depends on is taken from here; files of that folder that would bring the sources in are not read
    (site,) = environment.rglob("site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    program = """if True:
        from pathlib import Path
        import netdecouple
        from netdecouple import kernels

        folder = Path(netdecouple.__file__).parent
        assert kernels.library_path().parent == folder / "kernels"
        kernels.level()
        assert (folder / "py.typed").is_file() and (folder / "demo" / "digits.onnx").is_file()
        print(folder.parent, netdecouple.__version__)
    """
    done = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(site), built.name.split("-")[1]], done.stderr
    demo = [binaries / "netdecouple", "demo", "--macs", "50%", "--output", tmp_path / "demo"]
    done = subprocess.run(demo, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "digits-decoupled.onnx").is_file()
    assert "fused operator" not in done.stdout + done.stderr  # it says so where there is none
