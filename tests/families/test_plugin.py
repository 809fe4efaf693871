"""A family is a plug-in: registering its class is all that the planner, commands and reports need."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from netdecouple import families
from netdecouple.cli import app
from netdecouple.cli.options import complete_families
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, IntArray, Structure
from netdecouple.families import Family, Problem
from netdecouple.families.base import REGISTRY, register, registered
from netdecouple.families.chain import method, methods
from netdecouple.families.linalg import Array
from tests import networks


class Toy(Family):
    """1×1 to r channels, then k×k: the plain SVD of the kernel by input channels."""

    name = "toy"
    label = "toy label"
    description = "1×1 to fewer channels, then k×k"
    size_unit = "toy channels"
    source = "these tests"
    order = 15

    def exact(self, geometry: ConvGeometry) -> int:
        return geometry.n_i // geometry.groups

    def structure(self, geometry: ConvGeometry, size: int) -> Structure:
        middle = size * geometry.groups
        narrow = ConvGeometry(middle, geometry.n_i, 1, 1, groups=geometry.groups)
        return Structure.of(geometry, narrow, replace(geometry, n_i=middle))

    def curve(self, problem: Problem) -> Array:
        sizes = range(1, self.exact(problem.geometry) + 1)
        errors = [1.0, *(problem.relative_error(self.fit(problem, size)) for size in sizes)]
        return np.minimum.accumulate(errors)

    def fit(self, problem: Problem, size: int, channels: IntArray | None = None) -> Factorization:
        g = problem.geometry
        kernel = problem.target.reshape(g.groups, g.n_o // g.groups, -1, g.kh * g.kw).swapaxes(2, 3)
        _, _, vt = np.linalg.svd(kernel.reshape(g.groups, -1, kernel.shape[3]))
        vt = vt[:, :size]
        second = (kernel @ vt[:, None].swapaxes(2, 3)).swapaxes(2, 3)
        narrow, wide = self.structure(g, size).stages
        first = ConvStage(narrow, vt.reshape(narrow.weight_shape))
        return problem.with_best_bias((first, ConvStage(wide, second.reshape(wide.weight_shape))))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Family]:
    """The toy family, registered until the test ends."""
    monkeypatch.setitem(REGISTRY, Toy.name, Toy)
    return Toy


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(networks.classifier(), "net.onnx")
    np.savez("data.npz", images=np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--calib", "data.npz:images"])


@pytest.mark.usefixtures("short_timing")
def test_a_registered_family_runs_and_is_reported(toy: type[Family], folder: Path) -> None:
    ended = run(
        *("run", "net.onnx", "-o", "out.onnx", "--macs", "70%", "--families", "toy"),
        *("--plan-out", "plan.json", "--report", "report.html"),
    )
    assert ended.exit_code == 0, ended.output
    rows = json.loads(Path("plan.json").read_text())["layers"]
    assert {row["family"] for row in rows} == {"toy", "kept"}
    assert "toy: toy channels" in ended.output
    page = Path("report.html").read_text()
    assert "toy label (toy)" in page
    assert toy.description in page
    assert toy.size_unit in page
    again = run("apply", "net.onnx", "plan.json", "-o", "again.onnx")
    assert again.exit_code == 0, again.output
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()


def test_a_registered_family_takes_part_in_chains(toy: type[Family]) -> None:
    assert [family.name for family in registered()] == ["cd", "toy", "sd", "cp", "nd-dp", "nd-pd"]
    assert set(methods(["toy", "nd"])) == {"toy", "nd-dp", "nd-pd", "toy+nd-dp"}
    assert set(methods(["all"])) >= {"toy", "cd+toy+sd+cp+nd-dp"}
    assert not any("toy" in name for name in methods(["paper"]))
    assert complete_families("sd,to") == [f"sd,{name}" for name in methods(["all"]) if name.startswith("to")]
    with pytest.raises(ValueError, match="in the order cd, toy, sd, cp, nd-dp or nd-pd"):
        method("sd+toy")


def test_a_plan_with_an_unknown_family_is_refused(
    toy: type[Family], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", "net.onnx", "-o", "out.onnx", "--method", "toy:50%", "--plan-out", "plan.json")
    assert run(*arguments).exit_code == 0
    monkeypatch.delitem(REGISTRY, "toy")
    ended = run("apply", "net.onnx", "plan.json", "-o", "again.onnx")
    assert "there is no family 'toy'" in str(ended.exception)


def test_names_of_families_are_unique() -> None:
    class Other(Toy):
        name = "sd"

    with pytest.raises(ValueError, match="two families 'sd'"):
        register(Other)
    assert REGISTRY["sd"] is not Other


@pytest.mark.parametrize("name", [module.name for module in iter_modules(families.__path__)])
def test_examples_in_docstrings_give_what_they_print(name: str) -> None:
    assert doctest.testmod(import_module(f"netdecouple.families.{name}")).failed == 0
