"""Every limit holds, is named in its error, and can be set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from netdecouple.data import calibration
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import CalibrationError, ModelError, NetDecoupleError, PlanError
from netdecouple.execution import limits
from netdecouple.execution.limits import Limit
from netdecouple.frontends.onnx.model import load, read_model
from netdecouple.planning.plan import Plan
from tests import networks
from tests.fuzz.samples import png

DOCS = Path(__file__).parents[2] / "docs"


def images(folder: Path, source: str) -> np.ndarray:
    pictures = Preprocessing(size=(8, 8))
    return calibration.load(
        folder / source, channels=3, size=(8, 8), preprocessing=pictures, samples=None, seed=0
    ).images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One input of every kind that has a limit."""
    onnx.save(networks.classifier(), tmp_path / "net.onnx")
    onnx.save(
        networks.classifier(), tmp_path / "outside.onnx",
        save_as_external_data=True, location="w", size_threshold=0,
    )  # fmt: skip
    floats = np.zeros((12, 3, 8, 8), np.float32)
    np.save(tmp_path / "floats.npy", floats)
    np.savez_compressed(tmp_path / "packed.npz", floats)
    np.save(tmp_path / "bytes.npy", np.zeros((12, 8, 8, 3), np.uint8))
    (tmp_path / "pictures").mkdir()
    for index in range(12):
        Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / f"{index}.png")
    (tmp_path / "plan.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "error", "within", "beyond", "read"),
    [
        (limits.MODEL_BYTES, ModelError, 50_000, 20_000, lambda f: load(f / "net.onnx")),
        (limits.MODEL_BYTES, ModelError, 50_000, 20_000, lambda f: load(f / "outside.onnx")),
        (limits.TENSOR_BYTES, ModelError, 9_216, 9_215, lambda f: read_model(f / "net.onnx")),
        (limits.SAMPLE_BYTES, CalibrationError, 9_216, 9_215, lambda f: images(f, "floats.npy")),
        (limits.SAMPLE_BYTES, CalibrationError, 9_344, 9_343, lambda f: images(f, "packed.npz")),
        (limits.SAMPLE_BYTES, CalibrationError, 9_216, 9_215, lambda f: images(f, "bytes.npy")),
        (limits.SAMPLE_BYTES, CalibrationError, 9_216, 9_215, lambda f: images(f, "pictures")),
        (limits.PIXELS, CalibrationError, 400, 399, lambda f: images(f, "pictures")),
    ],
)
def test_what_is_larger_than_a_limit_is_refused(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: Limit,
    error: type[NetDecoupleError],
    within: int,
    beyond: int,
    read: Callable[[Path], object],
):
    """Within it nothing happens; beyond it the message names the variable to set."""
    read(folder)
    monkeypatch.setenv(limit.variable, str(within))
    read(folder)
    monkeypatch.setenv(limit.variable, str(beyond))
    with pytest.raises(error) as caught:
        read(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{beyond:,}" in message
    assert f"; set {limit.variable} if that is meant" in message


def test_plans_have_a_limit_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """No real plan comes near it."""
    monkeypatch.setenv(limits.TEXT_BYTES.variable, "1")
    with pytest.raises(PlanError, match="takes 2 bytes, the limit is 1; set NETDECOUPLE_MAX_TEXT_BYTES"):
        Plan.load(folder / "plan.json")


def test_a_picture_of_ten_billion_pixels_is_not_opened(tmp_path: Path):
    """It takes a few hundred bytes."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "one.png").write_bytes(png(100_000, 100_000))
    with pytest.raises(CalibrationError, match="more than 100,000,000 pixels; set NETDECOUPLE_MAX_PIXELS if"):
        images(tmp_path, "large")


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "1e9", "²"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str):
    """With the variable's name."""
    monkeypatch.setenv(limits.PIXELS.variable, text)
    with pytest.raises(NetDecoupleError, match=r"NETDECOUPLE_MAX_PIXELS=.*: give a positive whole number of"):
        limits.PIXELS.check(1, "a picture", CalibrationError)


def test_every_limit_is_documented():
    """With its default."""
    page = (DOCS / "trust.md").read_text(encoding="utf-8")
    for limit in limits.ALL:
        assert f"| `{limit.variable}` | {limit.default:,} {limit.unit} |" in page
