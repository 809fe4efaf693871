"""Write the documentation's generated tables: the command line, licences, and what the benchmarks measured.

    python docs/tables.py docs/generated

Nothing is measured here: results are read from the files that the scripts in ``benchmarks/`` keep beside the
pages, and printed by those scripts.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import metadata, requires
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.table import Table

from netdecouple.cli import app
from netdecouple.families.base import registered

KINDS = {str: "TEXT", int: "NUMBER", float: "NUMBER", Path: "PATH"}
DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "benchmarks"))

import accuracy  # noqa: E402
import fastest  # noqa: E402
import gpu  # noqa: E402
import kernel  # noqa: E402
import latency  # noqa: E402
import models  # noqa: E402
import paper_table  # noqa: E402
import planning  # noqa: E402
import promise  # noqa: E402
import rows  # noqa: E402


def commands() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    group: Any = typer.main.get_command(app)
    return "\n".join(line for name, command in group.commands.items() for line in _command(name, command))


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [
        p for p in command.params if p.param_type_name == "option" and not p.hidden and p.name != "help"
    ]
    usage = " ".join(_placeholder(p) for p in arguments)
    required = " ".join(f"{max(p.opts, key=len)} {_kind(p)}" for p in options if p.required)
    yield f"## netdecouple {name} {{ #{name} }}"
    yield ""
    summary, _, rest = inspect.cleandoc(command.help or "").partition("\n\n")
    examples = [line[line.index("netdecouple") :] for line in rest.splitlines() if "netdecouple" in line]
    yield summary
    yield ""
    yield "```text"
    yield f"netdecouple {name} {' '.join(part for part in (usage, required) if part)} [OPTIONS]"
    yield "```"
    yield ""
    if examples:
        yield from ("For example:", "", "```sh", *examples, "```", "")
    rows = [(f"`{_placeholder(p)}`", p) for p in arguments]
    rows += [
        (", ".join(f"`{o}`" for o in p.opts) + (f" `{_kind(p)}`" if _kind(p) else ""), p) for p in options
    ]
    yield "| | | default |"
    yield "| --- | --- | --- |"
    for label, parameter in rows:
        yield f"| {label} | {_cell(parameter.help or '')} | {_default(parameter)} |"
    yield ""


def _placeholder(parameter: Any) -> str:
    name = parameter.name.upper() + ("…" if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _kind(parameter: Any) -> str:
    kind = parameter.type_descriptor.annotation
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    kind = (*get_args(kind), kind)[0]  # of list[kind], the kind
    return "" if parameter.is_flag else KINDS[kind]


def _default(parameter: Any) -> str:
    value = parameter.default
    known = isinstance(value, str | int | float | Path) and not isinstance(value, bool) and value != ""
    return f"`{value}`" if known else "*required*" if parameter.required else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def families() -> str:
    """List what every family makes of a convolution, and what its size counts."""
    lines = [
        "| family | a k×k convolution becomes | size | from |",
        "| --- | --- | --- | --- |",
        *(f"| `{f.name}` | {f.description} | {f.size_unit} | {f.source} |" for f in registered()),
    ]
    return "\n".join(lines) + "\n"


def licences() -> str:
    """The licence of every package that an installation takes, as the package itself names it."""
    known, wanted = {"netdecouple"}, ["netdecouple"]
    while wanted:
        for need in map(Requirement, requires(wanted.pop()) or ()):
            name = canonicalize_name(need.name)
            if name not in known and (need.marker is None or need.marker.evaluate({"extra": ""})):
                known.add(name)
                wanted.append(name)
    lines = [f"| {name} | {_licence(name)} |" for name in sorted(known - {"netdecouple"})]
    return "\n".join(["| package | licence |", "| --- | --- |", *lines, ""])


def _licence(name: str) -> str:
    about: Any = metadata(name)
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier", ()) if "License ::" in c]
    named = about["License-Expression"] or about["License"] or " or ".join(classifiers)
    if not named:
        raise SystemExit(f"{name} names no licence; look at it before anything depends on it")
    return _cell(re.split(r"\n", named)[0] if len(named) < 80 else " or ".join(classifiers))


def markdown(table: Table) -> str:
    """A table of rich's in Markdown."""
    heads = [str(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    cells = zip(*(column.cells for column in table.columns), strict=True)
    lines = [heads, rules, *([_cell(str(cell)) for cell in line] for line in cells)]
    return f"*{table.title}*\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _all(tables: Iterable[Table]) -> str:
    return "\n".join(map(markdown, tables)) or "Not run yet.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the documentation's generated tables.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    cells = paper_table.read(DOCS / "paper_table.jsonl")
    networks = dict.fromkeys(network for network, _, _ in cells)
    tried = rows.read(DOCS / "planning.jsonl", planning.Row)
    promised = rows.read(DOCS / "promise.jsonl", promise.Row)
    found = rows.read(DOCS / "fastest.jsonl", fastest.Row)
    brought = rows.read(DOCS / "models.jsonl", models.Row)
    pages = {
        "commands": commands(),
        "families": families(),
        "accuracy": markdown(accuracy.table(accuracy.read(DOCS / "accuracy.csv"))),
        "licences": licences(),
        "fastest": _all(fastest.tables(found)),
        "latency": _all(latency.tables(latency.read_rows(DOCS / "latency.jsonl"))),
        "kernel": _all(kernel.tables(rows.read(DOCS / "kernel.jsonl", kernel.Row))),
        "gpu": _all(gpu.tables(rows.read(DOCS / "gpu.jsonl", gpu.Row))),
        "planning": _all([planning.table(tried)] if tried else []),
        "promise": _all([promise.table(promised)] if promised else []),
        "models": _all([models.table(brought)] if brought else []),
        "paper": _all(paper_table.table(name, cells) for name in networks),
    }
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
