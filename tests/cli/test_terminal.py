"""What people and programs are told, and where."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from netdecouple import kernels, open_model
from netdecouple.cli import terminal
from netdecouple.cli.terminal import Bars
from tests.cli.prepared import Prepared
from tests.cli.test_bad_inputs import changed

RUN = ["run", "net.onnx", "-o", "out.onnx", "--macs", "2x", "--calib", "data.npz:images", "--families", "nd"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*RUN, "--plan-out", "p.json"], {"outputs": ["out.onnx"], "plan": "p.json", "model": "net.onnx"}),
        (["inspect", "net.onnx"], {"model": "net.onnx"}),
        (["bench", "net.onnx", "--seconds", "0"], {"layers": []}),
        (
            ["sweep", "net.onnx", "--calib", "data.npz:images", "--macs", "80%,50%", "--csv", "c.csv",
             "--families", "nd"],
            {"model": "net.onnx", "loss": "kl", "outputs": ["c.csv"], "compared": []},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_json_is_all_there_is_on_standard_output(
    netdecouple, folder: Path, arguments: list[str], expected: dict
):
    """One object; the tables go to standard error."""
    ended = netdecouple(*arguments, "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    assert {key: found[key] for key in expected} == expected
    assert "MACs" in ended.err


def test_json_of_apply_eval_and_lower(netdecouple, folder: Path):
    """The report of the plan that was carried out; every score; how many operators were lowered."""
    assert netdecouple(*RUN, "--plan-out", "plan.json", "--emit", "fused", "--quiet").code == 0
    ended = netdecouple(
        *("apply", "net.onnx", "plan.json", "-o", "again.onnx", "--calib", "data.npz:images", "--json")
    )
    found = json.loads(ended.out)
    assert found["outputs"] == ["again.onnx"]
    assert found["macs"] <= found["macs_before"] / 2
    ended = netdecouple("eval", "net.onnx", "again.onnx", "--data", "data.npz:images,labels", "--json")
    assert [score["model"] for score in json.loads(ended.out)["scores"]] == ["net.onnx", "again.onnx"]
    ended = netdecouple("lower", "again.onnx", "-o", "standard.onnx", "--json")
    assert json.loads(ended.out)["outputs"] == ["standard.onnx"]
    assert json.loads(ended.out)["operators"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "gone.onnx"], "no such file"),
        (["run", "net.onnx", "--nonsense"], "No such option"),
        (["eval", "net.onnx"], "--data"),
    ],
)
def test_errors_as_json(netdecouple, folder: Path, arguments: list[str], message: str):
    """What standard error says as well, with the exit code."""
    ended = netdecouple(*arguments, "--json")
    found = json.loads(ended.out)
    assert (ended.code, found["exit_code"]) == (2, 2)
    assert message in found["error"]
    assert ended.err == f"error: {found['error']}\n"


def test_what_a_function_prints_does_not_spoil_the_json(
    netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Calibration functions may print what they like."""
    monkeypatch.syspath_prepend(folder)
    (folder / "talkative.py").write_text(
        "import numpy as np\ndef data():\n    print('hello')\n    return np.load('data.npz')['images']\n"
    )
    arguments = [argument.replace("data.npz:images", "talkative:data") for argument in RUN]
    ended = netdecouple(*arguments, "--json")
    assert json.loads(ended.out)["model"] == "net.onnx"
    assert "hello" in ended.err


@pytest.mark.parametrize("options", [["--json"], ["--quiet"], []])
def test_what_native_code_prints_is_not_on_standard_output(
    forked: Prepared, folder: Path, options: list[str]
):
    """It knows nothing of Python's; with --quiet it goes nowhere."""
    (folder / "talkative.py").write_text(
        "import numpy as np, os\ndef data():\n    os.write(1, b'hello')\n"
        "    return np.load('data.npz')['images']\n"
    )
    arguments = [argument.replace("data.npz:images", "talkative:data") for argument in RUN]
    ended = forked(folder, [*arguments, *options])
    assert ended.returncode == 0, ended
    assert "hello" not in ended.stdout
    assert ("hello" in ended.stderr) == ("--quiet" not in options)
    assert bool(ended.stdout) == ("--quiet" not in options)
    if "--json" in options:
        assert json.loads(ended.stdout)["model"] == "net.onnx"


def test_an_installation_without_the_fused_operator(
    netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """What would use it says so once, in a line before the work; other commands do not, nor quiet ones."""
    monkeypatch.setattr(kernels, "library_path", lambda: None)
    run = [*changed(RUN, calib=None), "--data-free", "--method", "nd-dp:T=2"]
    run = changed(run, macs=None, families=None)
    ended = netdecouple(*run, "--emit", "fused")
    assert ended.err == f"note: {kernels.MISSING}; without it networks are slower\n"
    for more in ([], ["--emit", "fused", "--quiet"]):
        assert netdecouple(*run, *more).err == ""
    with pytest.warns(kernels.MissingOperatorWarning, match="not built"):
        assert open_model("net.onnx").fastest_form(None) == "standard"


def test_quiet(netdecouple, folder: Path):
    """Nothing at all, but errors; the result is written all the same."""
    ended = netdecouple(*RUN, "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert (folder / "out.onnx").exists()
    ended = netdecouple("lower", "net.onnx", "-o", "out.onnx", "-q")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")


def test_lines_of_progress_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Now and then one, with the time that remains; not for every call, and none when quiet."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    for quiet in (True, False):
        bars = Bars(quiet)
        with bars:
            for done in range(101):
                bars("Counting", done, 100)
                now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Counting: 10 of 100, about 1:30 left"
    assert lines[-1] == "Counting: 100 of 100"
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("variable", "coloured"), [("NO_COLOR", False), ("FORCE_COLOR", True), ("TERM", False)]
)
def test_colours_are_for_terminals(forked: Prepared, folder: Path, variable: str, coloured: bool):
    """None in a pipe, unless they are forced; none where nobody wants them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    environment |= {variable: "xterm-256color" if variable == "TERM" else "1"}
    ended = forked(folder, ["inspect", "net.onnx"], environment)
    assert ended.returncode == 0
    assert ("\x1b[" in ended.stdout) == coloured


@pytest.mark.parametrize("arguments", [["inspect", "net.onnx"], ["inspect", "gone.onnx"], ["run", "--help"]])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_it_ends_quietly_where_nobody_reads(
    forked: Prepared, folder: Path, arguments: list[str], more: list[str]
):
    """As other tools do, which the system ends; what goes wrong is told all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = forked(folder, [*arguments, *more], out=writer)
    os.close(writer)
    if "gone.onnx" not in arguments:
        assert ended.returncode == 141
        assert "rror" not in ended.stderr
    else:
        assert ended.returncode == (141 if more else 2)
        assert ended.stderr.startswith("error: gone.onnx: no such file")
        assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_where_nothing_can_be_printed(forked: Prepared, folder: Path, options: list[str]):
    """One line, as for files."""
    with open("/dev/full", "w") as full:
        ended = forked(folder, ["inspect", "net.onnx", *options], out=full.fileno())
    assert ended.returncode == 2
    message = "error: standard output: cannot write there (No space left on device); "
    assert ended.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_nothing_is_amiss_where_nothing_is_wanted(folder: Path, closed: str):
    """What is written goes into files, which do not take the place of the streams."""
    command = (
        f"{shlex.quote(sys.executable)} -m netdecouple inspect net.onnx --json --html page.html {closed}"
    )
    ended = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    assert "rror" not in ended.stderr
    assert (json.loads(ended.stdout)["model"] == "net.onnx") if closed == "2>&-" else not ended.stdout
    assert (folder / "page.html").read_text().rstrip().endswith("</html>")


def test_names_in_tables_are_no_markup(netdecouple, folder: Path):
    """Neither [tags] nor :key: change, in titles, headings and cells."""
    names = ["[x] m:key:.onnx", "[b].onnx"]
    for name in names:
        (folder / name).write_bytes((folder / "net.onnx").read_bytes())
    ended = netdecouple("inspect", names[0])
    assert ended.out.startswith(names[0])
    ended = netdecouple("eval", *names, "--data", "data.npz:images,labels")
    assert all(name in ended.out for name in names)
    ended = netdecouple("bench", *names, "--layers", "--seconds", "0")
    assert all(ended.out.count(name) == 2 for name in names)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_an_encoding_lacks_is_replaced(forked: Prepared, folder: Path, encoding: str):
    """Tables have signs that not every terminal can show."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    ended = forked(folder, ["inspect", "net.onnx"], environment, encoding=encoding)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Budgets that can be met" in ended.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("netdecouple run net.onnx --preset ", {"imagenet", "cifar10", "none"}),
        ("netdecouple run net.onnx --emit f", {"fused"}),
        ("netdecouple run net.onnx --families nd,nd-", {"nd,nd-dp", "nd,nd-pd"}),
        ("netdecouple bench net.onnx --runtime open", {"openvino"}),
        ("netdecouple sw", {"sweep"}),
    ],
)
def test_completions(forked: Prepared, folder: Path, line: str, expected: set[str]):
    """What bash is told when somebody presses tab."""
    environment = os.environ | {
        "_NETDECOUPLE_COMPLETE": "complete_bash",
        "_TYPER_COMPLETE_ARGS": line,
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    ended = forked(folder, [], environment)
    assert set(ended.stdout.split()) == expected, ended
