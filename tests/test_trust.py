"""What docs/trust.md promises of where things come from and go to; other promises have tests elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("run", "develop", "extras", "tools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BY_VERSION = {"torch"}  # a build for every accelerator: pinned without a hash


def entries(lock: str) -> list[str]:
    """A lock's entries: a requirement and the hashes that follow it, each on a line of its own."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    return re.findall(r"^[^#\s].*(?:\n    .*)*", text, re.MULTILINE)


def pins(lock: str) -> dict[str, set[str]]:
    """Versions by name; several where Pythons differ."""
    found: dict[str, set[str]] = {}
    for entry in entries(lock):
        need = Requirement(entry.split(" \\\n")[0])
        found.setdefault(canonicalize_name(need.name), set()).update(s.version for s in need.specifier)
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_a_version_and_hashes(lock: str) -> None:
    assert entries(lock)
    for entry in entries(lock):
        first, *hashes = entry.split(" \\\n")
        assert [s.operator for s in Requirement(first).specifier] == ["=="], first
        assert hashes, first
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line) for line in hashes), first


def test_locks_agree() -> None:
    """What is tested is what is run, in the same versions."""
    run, develop, extras = map(pins, ("run", "develop", "extras"))
    assert run.keys() <= develop.keys() <= extras.keys()
    for smaller in (run, develop):
        assert all(versions <= extras[name] for name, versions in smaller.items())


def needed(lock: str) -> list[str]:
    """What pyproject.toml asks for; `make lock` says what goes where."""
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    extras, build = project["optional-dependencies"], PROJECT["build-system"]["requires"]
    if lock == "tools":
        return [need for need in groups["tools"] if isinstance(need, str)] + groups["build"] + build
    chosen = {"run": (), "develop": ("test", "lint"), "extras": tuple(extras)}[lock]
    more = [] if lock == "run" else groups["build"] + build + (groups["networks"] if lock == "extras" else [])
    return project["dependencies"] + [need for extra in chosen for need in extras[extra]] + more


@pytest.mark.parametrize("lock", LOCKS)
def test_what_is_needed_is_locked(lock: str) -> None:
    locked = pins(lock)
    for need in map(Requirement, needed(lock)):
        if need.name not in BY_VERSION:
            versions = locked.get(canonicalize_name(need.name), set())
            assert versions, f"{need} is not in requirements/{lock}.txt; make lock"
            assert all(need.specifier.contains(v) for v in versions), f"{need}, not {versions}; make lock"
    assert not BY_VERSION & locked.keys()


@pytest.mark.slow
def test_a_network_is_decoupled_without_a_network(tmp_path: Path) -> None:
    """Not one socket is opened, even where an address would have to be looked up."""
    refusal = """if True:
        import socket, sys

        def refuse(event, arguments):
            if event.startswith("socket."):
                print(event, arguments, file=sys.stderr)
                sys.stderr.flush()
                import os
                os._exit(99)

        sys.addaudithook(refuse)
    """
    (tmp_path / "sitecustomize.py").write_text(refusal)
    digits = ROOT / "src" / "netdecouple" / "demo" / "digits"
    command = [
        "run",
        f"{digits}.onnx",
        "--calib",
        f"{digits}.npz:calib",
        "--macs",
        "60%",
        "--effort",
        "low",
        "-o",
        "a.onnx",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-m", "netdecouple", *command]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.onnx").is_file()
    probe = [sys.executable, "-c", "import socket; socket.getaddrinfo('localhost', 80)"]
    assert subprocess.run(probe, env=environment, capture_output=True).returncode == 99


def test_promises_are_kept_by_tests_and_targets_that_are_there() -> None:
    page = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert tests
    for file, name in tests:
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    for target in re.findall(r"`make (\w+)`", page):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
