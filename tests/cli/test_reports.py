"""Reports from the command line: pages and data, of every command that makes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from netdecouple.report.model import Report
from tests import networks

RUN = ["run", "net.onnx", "-o", "out.onnx", "--macs", "2x", "--families", "nd", "--calib", "data.npz:images"]


def test_run_writes_a_page_and_data(netdecouple, folder: Path):
    """One run, both kinds; timed with one thread and with as many as were asked for; the command is told."""
    ended = netdecouple(*RUN, "--threads", "2", "--report", "r.html", "--report", "r.json")
    assert ended.code == 0, ended
    report = Report.from_json((folder / "r.json").read_text(encoding="utf-8"))
    assert report.benchmark is not None
    rows = [(row.model, row.runtime, row.threads, row.shapes) for row in report.benchmark.models]
    shape = ((1, 3, 8, 8),)
    assert rows == [(m, "onnxruntime", n, shape) for n in (1, 2) for m in ("net.onnx", "decoupled")]
    assert report.bytes_before == (folder / "net.onnx").stat().st_size
    assert report.bytes == (folder / "out.onnx").stat().st_size
    assert report.provenance is not None
    assert report.provenance.command.endswith("--threads 2 --report r.html --report r.json")
    assert report.provenance.calibration == "data.npz:images"
    assert report.provenance.model_hash == json.loads(plan_in(folder / "out.onnx"))["model"]
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert report.provenance.plan_hash in page
    assert f"{report.macs_before / report.macs:.2f}×" in page


def plan_in(path: Path) -> str:
    return next(e.value for e in onnx.load(path).metadata_props if e.key == "netdecouple.plan")


def test_data_alone_are_not_timed(netdecouple, folder: Path):
    """So that the same command gives the same file."""
    assert netdecouple(*RUN, "--report", "r.json").code == 0
    assert Report.from_json((folder / "r.json").read_text(encoding="utf-8")).benchmark is None


@pytest.mark.parametrize("name", ["r.pdf", "report", "r.json.gz"])
def test_other_endings_are_refused(netdecouple, folder: Path, name: str):
    """At once, and with nothing written."""
    ended = netdecouple(*RUN, "--report", name)
    assert ended.code == 2
    assert f"{name}: reports are written as .html or .json" in ended.err
    assert not (folder / "out.onnx").exists()


def test_one_report_is_not_written_twice(netdecouple, folder: Path):
    ended = netdecouple(*RUN, "--report", "r.html", "--report", "./r.html")
    assert ended.code == 2
    assert "asked for twice" in ended.err


def test_a_page_of_another_runtime_as_well(netdecouple, folder: Path):
    pytest.importorskip("openvino")
    ended = netdecouple(*RUN, "--runtime", "openvino", "--report", "r.html", "--report", "r.json")
    assert ended.code == 0
    report = Report.from_json((folder / "r.json").read_text(encoding="utf-8"))
    assert report.benchmark is not None
    assert [row.runtime for row in report.benchmark.models] == ["onnxruntime"] * 2 + ["openvino"] * 2
    assert "OpenVINO" in (folder / "r.html").read_text(encoding="utf-8")


def test_apply_writes_a_page(netdecouple, folder: Path):
    """Without an analysis there is no curve, and all else."""
    assert netdecouple(*RUN, "--plan-out", "plan.json").code == 0
    ended = netdecouple(
        *("apply", "net.onnx", "plan.json", "-o", "again.onnx", "--calib", "data.npz:images"),
        *("--report", "r.html", "--report", "r.json"),
    )
    assert ended.code == 0, ended
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert "a saved plan" in page
    assert "Other budgets" not in page
    assert Report.from_json((folder / "r.json").read_text(encoding="utf-8")).benchmark is not None


def test_inspect_writes_a_page(netdecouple, folder: Path):
    ended = netdecouple("inspect", "net.onnx", "--html", "seen.html")
    assert ended.code == 0
    assert "Wrote       seen.html" in ended.out
    page = (folder / "seen.html").read_text(encoding="utf-8")
    for name in ("conv1", "conv2", "conv3", "logits"):
        assert name in page
    assert page.count('<svg class="spectrum"') == 3


def test_pictures_are_shown_as_they_were(netdecouple, folder: Path):
    """Whatever the mean and the deviation that the network wants."""
    import base64
    import io
    import re

    from PIL import Image

    arguments = ("--mean", "0.4,0.5,0.6", "--std", "0.2,0.3,0.25", "--report", "r.html", "--report", "r.json")
    images = np.random.default_rng(1).integers(0, 256, (24, 8, 8, 3), np.uint8)
    np.savez(folder / "pictures.npz", images=images)
    assert netdecouple(*RUN[:-1], "pictures.npz:images", *arguments).code == 0
    page = (folder / "r.html").read_text(encoding="utf-8")
    report = Report.from_json((folder / "r.json").read_text(encoding="utf-8"))
    shown = re.findall(r"data:image/png;base64,([\w+/=]+)", page)
    assert len(shown) == len(report.disagreements) > 0
    for text, d in zip(shown, report.disagreements, strict=True):
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        assert np.abs(seen.astype(int) - images[d.sample]).max() <= 1


def test_dynamic_sizes_are_timed_as_they_were_calibrated(netdecouple, folder: Path):
    onnx.save(networks.restorer(), folder / "net.onnx")
    np.savez(folder / "data.npz", images=networks.images_for(networks.restorer(), 12))
    ended = netdecouple(*RUN[:5], "70%", *RUN[6:], "--report", "r.html", "--report", "r.json")
    assert ended.code == 0, ended
    report = Report.from_json((folder / "r.json").read_text(encoding="utf-8"))
    assert report.benchmark is not None
    assert report.benchmark.models[0].shapes[0][0] == 1
    assert report.not_timed == ()


def test_pytorch_models_are_timed_in_both(netdecouple, folder: Path):
    """In PyTorch, and in ONNX Runtime as they are exported."""
    pytest.importorskip("torch")
    (folder / "own_net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, padding=1), torch.nn.ReLU(),\n"
        "        torch.nn.Conv2d(12, 16, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1),\n"
        "        torch.nn.Flatten(), torch.nn.Linear(16, 10)).eval()\n"
    )
    ended = netdecouple(
        *("run", "own_net:make", "-o", "out.onnx", "--macs", "2x", "--calib", "data.npz:images"),
        *("--report", "r.html", "--report", "r.json"),
    )
    assert ended.code == 0, ended
    report = Report.from_json((folder / "r.json").read_text(encoding="utf-8"))
    assert report.benchmark is not None
    assert [row.runtime for row in report.benchmark.models] == ["torch"] * 2 + ["onnxruntime"] * 2
    assert report.model == "own_net:make"
    assert report.provenance is not None
    assert report.provenance.calibration == "data.npz:images"
    assert "data:image/png" in (folder / "r.html").read_text(encoding="utf-8")
