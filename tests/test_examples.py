"""The examples run, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed_by(name: str, *options: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def shares(printed: str) -> list[float]:
    return [float(share) for share in re.findall(r"([\d.]+)%", printed)]


@pytest.mark.slow
def test_finetuning_wins_back_accuracy() -> None:
    pytest.importorskip("torch")
    trained, decoupled, tuned = shares(printed_by("finetune.py"))
    assert trained > decoupled > 40
    assert tuned > decoupled


@pytest.mark.slow
def test_a_classifier_keeps_its_accuracy_on_a_folder_of_images(tmp_path: Path) -> None:
    printed = printed_by("classify.py", "--macs", "2x", "--out", tmp_path)
    before, after, same = shares(printed)
    assert before > 98
    assert after > before - 1
    assert same > 98
    assert (tmp_path / "faster.onnx").is_file()


@pytest.mark.slow
def test_a_denoiser_goes_on_denoising() -> None:
    pytest.importorskip("torch")
    printed = printed_by("denoise.py", "--steps", 100)
    noisy, denoised, decoupled = (float(value) for value in re.findall(r"([\d.]+) dB", printed))
    assert denoised > noisy + 2
    assert decoupled > denoised - 1


@pytest.mark.slow
def test_a_detector_goes_on_detecting() -> None:
    pytest.importorskip("torch")
    before, after = shares(printed_by("detect.py", "--steps", 200))
    assert before > 80
    assert after > before - 10


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    original, decoupled, from_weights = shares("".join(output.get("text", "") for output in outputs))[-3:]
    assert original > decoupled - 1
    assert decoupled > from_weights
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_the_notebook_is_stored_without_outputs() -> None:
    """They would grow old, and hide what a change changes."""
    text = (EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8")
    assert '"output_type"' not in text
