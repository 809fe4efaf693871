"""The commands and programs that README and documentation print run as printed.

Each page runs from top to bottom in a folder of its own that holds the files the pages name: ``model.onnx``,
``images/`` and ``test.npz``. A block is left out only where the page says so, in a comment with the reason.
What cannot be had offline, or takes long, is replaced as `INSTEAD` says.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from tests.cli.prepared import Prepared, prepared
from tests.networks import Builder

ROOT = Path(__file__).parents[1]
SIZE = 32
INSTEAD = {
    # longer than a second shows no more here
    "netdecouple bench": "netdecouple bench --seconds 1",
    # how much faster a network of two layers can be depends on the machine
    "--preset imagenet  # as fast as possible": "--preset imagenet --macs 50%",
    "--latency 60%": "--latency 100% --force",
    "--latency 90%": "--latency 100% --force",
    # pretrained weights would be downloaded, and large networks take minutes
    "torchvision:resnet18": "torchvision:squeezenet1_1 --weights random --input-size 64 --families nd",
}
COUNTED = re.compile(r"^[ ]*```(sh|python)\b", re.MULTILINE)
SKIPPED = re.compile(r"<!-- skip: next", re.MULTILINE)


def pages() -> list[Path]:
    """All that people read and copy from; what is generated is read where it is included."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a network, images and labelled images of random contents."""
    rng = np.random.default_rng(0)
    b = Builder()
    x = "image"
    for index, (n_i, n_o) in enumerate([(3, 16), (16, 24)]):
        x = b.node("Relu", b.conv(x, n_i, n_o, 3, f"conv{index}", strides=[2, 2] if index == 1 else [1, 1]))
    b.classifier(x, 24)
    onnx.save(b.model(shape=("N", 3, SIZE, SIZE)), tmp_path / "model.onnx")
    pictures = rng.integers(0, 256, (40, SIZE, SIZE, 3)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    for index, picture in enumerate(pictures[:30]):
        Image.fromarray(picture).resize((48, 40)).save(tmp_path / "images" / f"{index}.png")
    np.savez(tmp_path / "test.npz", images=pictures, labels=rng.integers(0, 10, 40))
    np.save(tmp_path / "inputs.npy", rng.standard_normal((40, 3, SIZE, SIZE)).astype(np.float32))
    return tmp_path


def _without_fetching(command: str) -> str:
    for name, other in INSTEAD.items():
        command = command.replace(name, other)
    return command


@pytest.fixture(scope="module")
def process() -> Iterator[Prepared]:
    with prepared() as process:
        yield process


def _commands(block: str) -> list[list[str]]:
    """The arguments of every command, if all are ours and need nothing of a shell; else nothing."""
    if re.search(r"[|&;<>()$`*?~]|torchvision:", block.replace("\\\n", " ")):
        return []
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    commands = [words for words in commands if words]
    return [words[1:] for words in commands] if all(words[0] == "netdecouple" for words in commands) else []


def _shell(folder: Path, process: Prepared) -> Callable[[Example], None]:
    """Run commands as a person would; torchvision is imported as the other tests do it."""
    (folder / ".start").mkdir()
    start = "from tests.conftest import import_torchvision\nimport_torchvision()\n"
    (folder / ".start" / "sitecustomize.py").write_text(start)

    def run(example: Example) -> None:
        command = _without_fetching(example.parsed)
        for arguments in (commands := _commands(command)):
            done = process(folder, arguments)
            assert not done.returncode, f"line {example.line}: {arguments}\n{done.stdout}\n{done.stderr}"
        if commands:
            return
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{folder / '.start'}{os.pathsep}{ROOT}" if "torchvision:" in command else "",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert not done.returncode, (
            f"line {example.line}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )

    return run


def _file(example: Example) -> None:
    """Write a block that has the name of a file."""
    first = example.document.text[example.region.start :].splitlines()[0]
    Path(first.partition('title="')[2].partition('"')[0]).write_text(example.parsed)


def _document(page: Path, folder: Path, process: Prepared) -> Document:
    titles = set(re.findall(r'```(python title="[\w.]+")', page.read_text(encoding="utf-8")))
    parsers = [
        CodeBlockParser("sh", _shell(folder, process)),
        PythonCodeBlockParser(),
        *(CodeBlockParser(title, _file) for title in titles),
        SkipParser(),
    ]
    return Sybil(parsers).parse(page)


def _run(document: Document) -> None:
    for example in document.examples():
        with contextlib.suppress(unittest.SkipTest):  # with a reason, which another test asks for
            example.evaluate()


def _given() -> dict[str, Any]:
    """What the shortest programs take as given: a module and samples for it."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    torch.manual_seed(0)

    def network() -> Any:
        features = (nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
        return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)).eval()

    loader = torch.randn(30, 3, 16, 16).split(10)
    import netdecouple

    return {"netdecouple": netdecouple, "module": network(), "fresh_module": network(), "loader": loader}


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(
    page: Path, folder: Path, process: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = _document(page, folder, process)
    if page.name in ("README.md", "index.md", "start-onnx.md"):
        pytest.importorskip("openvino")
        document.namespace.update(_given())
    if page.name == "start-torch.md":
        pytest.importorskip("torch")
    monkeypatch.chdir(folder)
    _run(document)


@pytest.mark.slow
def test_the_examples_of_the_help_texts_run(
    folder: Path, process: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    script = ROOT / "docs" / "tables.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    monkeypatch.chdir(folder)
    made = "netdecouple run model.onnx --calib inputs.npy --macs 60% -o "
    made += f"fused.onnx --families nd --emit fused\n{made} faster.onnx --plan-out plan.json"
    made += "\ncp faster.onnx a.onnx\ncp fused.onnx b.onnx"
    page = folder / "commands.md"
    # whether a network of four layers can be faster depends on the machine
    fastest = "netdecouple run model.onnx -o faster.onnx --calib inputs.npy\n"
    text = page.read_text(encoding="utf-8")
    assert fastest in text
    page.write_text(f"```sh\n{made}\n```\n{text.replace(fastest, '')}", encoding="utf-8")
    _run(_document(page, folder, process))


@pytest.mark.slow
def test_the_table_of_the_readme_is_that_of_the_benchmark(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "docs" / "tables.py"), str(tmp_path)], check=True)
    table = (tmp_path / "fastest.md").read_text(encoding="utf-8")
    assert table.count("×") > 7
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_block_is_found(page: Path) -> None:
    """A block whose language is misspelt, or that is skipped without a reason, would not be run."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^[ ]*```([\w]*)", text, re.MULTILINE)[::2]
    assert set(fences) <= {"sh", "python", "text", "math"}
    reasons = re.findall(r"<!-- skip: next(.*?)-->", text)
    assert all(reason.strip(' "') for reason in reasons)


def test_few_blocks_are_skipped() -> None:
    texts = [page.read_text(encoding="utf-8") for page in pages()]
    blocks = sum(len(COUNTED.findall(text)) for text in texts)
    assert sum(len(SKIPPED.findall(text)) for text in texts) < blocks / 8
