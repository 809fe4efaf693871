"""Imports go one way: cli → api → pipeline → fitting, planning, report → families → moments, convolution."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import netdecouple

SOURCES = Path(netdecouple.__file__).parent
ENGINE = {"fitting", "planning", "report"}
BASICS = {"errors", "version", "records", "convolution", "moments"}
MAY_IMPORT = {
    "__main__": {"cli"},
    "cli": {
        "api",
        "goal",
        "network",
        "planning",
        "report",
        "runtimes",
        "families",
        "execution",
        "data",
        "kernels",
    },
    "api": {"pipeline", "goal", "network", "frontends", "runtimes", "families", "execution", "data", *ENGINE},
    "pipeline": {"search", "goal", "network", "execution", "data", "runtimes", *ENGINE},
    "search": {"network", "execution", "planning", "fitting"},
    "goal": {"planning"},
    "planning": {"network", "families", "execution", "fitting"},
    "fitting": {"network", "families", "execution", "planning"},
    "report": {"network", "families", "execution", "data", "runtimes", "planning", "fitting"},
    "frontends": {"network", "execution", "data", "runtimes", "kernels"},
    "network": {"data", "execution"},
    "families": set(),
    "runtimes": {"kernels", "execution"},
    "kernels": set(),
    "data": {"execution"},
    "execution": set(),
    "records": {"execution"},
    "moments": set(),
    "convolution": set(),
    "errors": set(),
    "version": set(),
}
"""By room, the rooms that it may import besides itself and the basics, which import nothing above them."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below ``netdecouple``."""
    paths = (path.relative_to(SOURCES).with_suffix("") for path in sorted(SOURCES.rglob("*.py")))
    names = {".".join(path.parts).removesuffix("__init__").rstrip("."): path for path in paths}
    return {
        name: SOURCES / path.with_suffix(".py") for name, path in names.items() if not name.startswith("demo")
    }


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports when it runs, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "netdecouple":
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                yield inner if inner in known else module
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("netdecouple."))


@functools.cache
def graph() -> dict[str, set[str]]:
    """By module, the modules that it imports."""
    known = modules()
    return {
        name: {m for m in imports(path, known) if m in known and m} for name, path in known.items() if name
    }


@pytest.mark.parametrize("room", sorted({name.partition(".")[0] for name in graph()}))
def test_imports_follow_the_arrows(room: str) -> None:
    """Without exceptions."""
    allowed = MAY_IMPORT[room] | {room} | BASICS
    wrong = {
        f"{name} imports {module}"
        for name, targets in graph().items()
        for module in targets
        if name.partition(".")[0] == room and module.partition(".")[0] not in allowed
    }
    assert not wrong


def test_no_file_imports_itself_by_way_of_others() -> None:
    order = TopologicalSorter(graph())
    order.prepare()  # raises CycleError, which shows the circle


def test_only_the_public_functions_import_frontends() -> None:
    users = {
        name.partition(".")[0]
        for name, targets in graph().items()
        if any(target.startswith("frontends") for target in targets)
    }
    assert users == {"api", "frontends"}


def test_few_files_stand_loose() -> None:
    assert len([name for name in graph() if "." not in name and modules()[name].name != "__init__.py"]) <= 13


def test_no_function_takes_more_than_ten_arguments() -> None:
    """But the public ones, and the commands, whose options are theirs."""
    public = {SOURCES / "api.py", *(SOURCES / "cli").glob("*.py")}
    long = [
        f"{path.relative_to(SOURCES)}:{node.lineno} {node.name}"
        for path in SOURCES.rglob("*.py")
        if path not in public
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and len([*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]) > 10
    ]
    assert not long
