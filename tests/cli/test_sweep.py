"""netdecouple sweep: the table, the files, the comparison, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

SWEEP = ["sweep", "net.onnx", "--calib", "data.npz:images", "--families", "nd"]


def test_the_curve_is_printed_and_written(netdecouple, folder: Path):
    """A row per budget; CSV, JSON and a page; a network per budget, the same as a run's."""
    ended = netdecouple(
        *(*SWEEP, "--macs", "80%,2x", "--labels", "data.npz:images,labels", "-o", "nets"),
        *("--csv", "c.csv", "--report", "c.json", "--report", "c.html"),
    )
    assert (ended.code, ended.err) == (0, "")
    for part in ("net.onnx at 2 budgets", "original", "80% MACs", "50% MACs", "top-1", "Knee", "c.html"):
        assert part in ended.out
    curve = json.loads((folder / "c.json").read_text())
    rows = list(csv.DictReader((folder / "c.csv").open()))
    assert [row["file"] for row in rows] == ["nets/net-macs80.onnx", "nets/net-macs50.onnx"]
    assert [int(row["macs"]) for row in rows] == [point["macs"] for point in curve["points"]]
    assert "<html" in (folder / "c.html").read_text()
    run = ["run", *SWEEP[1:], "--macs", "50%", "-o", "one.onnx", "--quiet"]
    assert netdecouple(*run).code == 0
    assert (folder / "one.onnx").read_bytes() == (folder / "nets" / "net-macs50.onnx").read_bytes()


def test_earlier_results_are_put_side_by_side(netdecouple, folder: Path):
    """Two rows, and what was done to each layer, without any budget."""
    assert netdecouple(*SWEEP, "--macs", "80%,50%", "-o", "nets", "-q").code == 0
    pair = ["nets/net-macs80.onnx", "nets/net-macs50.onnx"]
    ended = netdecouple(*SWEEP, "--compare", *pair)
    assert (ended.code, ended.err) == (0, "")
    for part in ("Compared with net.onnx", "What was done to each layer", "conv2", "nd-dp", *pair):
        assert part in ended.out
    assert "Knee" not in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give budgets to sweep over"),
        (["--macs", "80%,nope"], "'nope' is not a budget"),
        (["--macs", "50%,1000x"], "0.1% MACs is out of reach"),
        (["--macs", "50%", "--report", "curve.pdf"], ".html or .json"),
        (["--macs", "50%", "--csv", "no/where.csv"], "no/where.csv"),
        (["--macs", "50%", "-o", "data.npz"], "is a file"),
        (["--compare", "net.onnx", "gone.onnx"], "gone.onnx: no such file"),
    ],
)
def test_what_is_refused(netdecouple, folder: Path, arguments: list[str], message: str):
    """In one line, and nothing is written."""
    before = set(folder.iterdir())
    ended = netdecouple(*SWEEP, *arguments)
    assert ended.code == 2, ended
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_networks_are_not_written_over_those_they_are_compared_with(netdecouple, folder: Path):
    """Nor over the model itself."""
    assert netdecouple(*SWEEP, "--macs", "80%,50%", "-o", "nets", "-q").code == 0
    pair = [folder / "nets" / f"net-macs{share}.onnx" for share in (80, 50)]
    before = [path.read_bytes() for path in pair]
    ended = netdecouple(*SWEEP, "--macs", "50%", "--compare", *map(str, pair), "-o", "nets")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: nets/net-macs50.onnx: is an input")
    assert [path.read_bytes() for path in pair] == before
