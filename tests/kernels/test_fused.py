"""The fused operator itself: random layers at every instruction set, and again under the sanitizers."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from netdecouple import kernels
from tests.kernels.cases import COUNT, TOLERANCE, at_level, check

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "netdecouple" / "kernels"
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = ("avx512", "avx2", "baseline") if X86 else ("baseline",)
SANITIZED_CASES = 500


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
def test_every_layer_comes_out_as_in_float64(level: str) -> None:
    """Groups, ranks 0 to 9 per channel, strides, dilations, pads, borders, slopes, limits and residuals."""
    with at_level(level):
        errors = dict(check())
    assert len(errors) == COUNT >= 500
    assert {case: error for case, error in errors.items() if not error < TOLERANCE} == {}


def levels(machine: str = platform.machine().lower()) -> list[tuple[str, list[str]]]:
    """The instruction sets that CMakeLists.txt compiles for a processor, and how."""
    text = (ROOT / "CMakeLists.txt").read_text()
    first, *others = re.split(r"\n(?:else)?if\(CMAKE_SYSTEM_PROCESSOR|\nelse\(\)", text)[1:]
    is_arm = machine in ("aarch64", "arm64")
    branch = first if machine in ("x86_64", "amd64") else others[0] if is_arm else others[-1]
    return [
        (name, [f"-DLEVEL={name}", f"-DLANES={lanes}", f"-DREGISTERS={registers}", *flags.split()])
        for name, lanes, registers, flags in re.findall(r"add_level\((\w+) (\d+) (\d+) ?([^)]*)\)", branch)
    ]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """The operator with AddressSanitizer and UndefinedBehaviorSanitizer in it, run at a level."""
    compiler = next(
        (c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None
    )
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    common = (
        "-std=c++17 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    )
    common += f" -ffp-contract=fast -fno-math-errno -Wall -Wextra -I{SOURCES}" + " -DNETDECOUPLE_X86" * X86
    parts = [
        ("fused", SOURCES / "fused.cpp", []),
        ("sanitized", Path(__file__).with_name("sanitized.cpp"), []),
    ]
    parts += [(name, SOURCES / "level.cpp", flags) for name, flags in levels()]
    objects = []
    for name, source, flags in parts:
        objects.append(folder / f"{name}.o")
        subprocess.run([compiler, *common.split(), *flags, "-c", source, "-o", objects[-1]], check=True)
    program = folder / "program"
    subprocess.run([compiler, "-fsanitize=address,undefined", *objects, "-o", program], check=True)

    def run(level: str) -> subprocess.CompletedProcess[str]:
        command = [program, str(SANITIZED_CASES), level]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_memory_is_read_and_written_only_where_it_may_be(
    sanitized: Callable[[str], subprocess.CompletedProcess[str]], level: str
) -> None:
    """Random layers in buffers of exactly their size: no bad access, no leak, right results."""
    done = sanitized(level)
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout == f"no {level}\n":
        pytest.skip(f"this processor has no {level}")
    found, cases, _ = done.stdout.split()
    assert (found, int(cases)) == (level, SANITIZED_CASES)


@pytest.mark.slow
def test_neon_computes_the_same(tmp_path: Path) -> None:
    """The same layers on an emulated 64-bit Arm processor, built by a cross compiler."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip(f"no {compiler} or no {emulator}")
    common = ["-std=c++17", "-O3", "-static", "-ffp-contract=fast", "-fno-math-errno", f"-I{SOURCES}"]
    ((_, flags),) = levels("aarch64")
    sources = [SOURCES / "fused.cpp", SOURCES / "level.cpp", Path(__file__).with_name("sanitized.cpp")]
    program = tmp_path / "program"
    subprocess.run([compiler, *common, *flags, *sources, "-o", program], check=True)
    command = [emulator, program, str(SANITIZED_CASES), "baseline"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found, cases, _ = done.stdout.split()
    assert (found, int(cases)) == ("baseline", SANITIZED_CASES)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
def test_the_peak_counts_what_it_does(level: str) -> None:
    """Twice the rounds are twice the multiply-adds, and take longer than none."""
    library = ctypes.CDLL(str(kernels.library_path()))
    library.netdecouple_multiply.argtypes = [ctypes.c_int64]
    library.netdecouple_multiply.restype = ctypes.c_int64
    with at_level(level):
        one, two = (library.netdecouple_multiply(count) for count in (1000, 2000))
        assert 0 < 2 * one == two
        start = time.process_time()
        library.netdecouple_multiply(10_000_000)
        assert time.process_time() > start
