"""PyTorch, where it is installed: modules, exported programs, and files only if they are trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from netdecouple.errors import ModelError
from netdecouple.runtimes import Input, runtime
from netdecouple.runtimes.feeds import random_feeds

torch = pytest.importorskip("torch")

SHAPE = (1, 3, 8, 8)
NAMES = ["torch", pytest.param("torch.compile", marks=pytest.mark.slow)]


@pytest.fixture
def module() -> Any:
    """A network in training mode; its BatchNorm would move if it were run so."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 64, 10),
    )


@pytest.fixture
def program(module: Any) -> Any:
    batch = torch.export.Dim("batch")
    return torch.export.export(module.eval(), (torch.zeros(2, *SHAPE[1:]),), dynamic_shapes=({0: batch},))


def expected(module: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return module.eval()(torch.from_numpy(feeds["input"])).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_runs_a_module_as_in_use(module: Any, name: str):
    """In evaluation mode; the module itself stays in training mode, and the process keeps its threads."""
    before = torch.get_num_threads()
    session = runtime(name).open(module, 2)
    assert session.inputs == ()
    feeds = random_feeds(session.inputs, SHAPE)
    found = session.run(feeds)
    assert module.training
    assert torch.get_num_threads() == before
    np.testing.assert_allclose(found[0], expected(module, feeds), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_runs_an_exported_program(module: Any, program: Any, name: str):
    """Its inputs are known, the batch is open."""
    session = runtime(name).open(program, 1)
    assert session.inputs == (Input("input", (None, 3, 8, 8), np.dtype(np.float32)),)
    feeds = random_feeds(session.inputs)
    np.testing.assert_allclose(session.run(feeds)[0], expected(module, feeds), rtol=1e-4, atol=1e-5)


def test_opens_a_file_only_if_it_is_trusted(module: Any, program: Any, tmp_path: Path):
    """PyTorch unpickles .pt2 files; nothing is unpickled unasked."""
    path = tmp_path / "net.pt2"
    torch.export.save(program, path)
    with pytest.raises(ModelError, match=r"can run any code.*trust="):
        runtime("torch").open(path, 1)
    session = runtime("torch", trust=True).open(path, 1)
    feeds = random_feeds(session.inputs)
    np.testing.assert_allclose(session.run(feeds)[0], expected(module, feeds), rtol=1e-4, atol=1e-5)


def test_several_outputs():
    """Tuples and dictionaries of tensors, in their order."""

    class Several(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x, {"twice": 2 * x, "both": [3 * x, 4 * x]}

    session = runtime("torch").open(Several(), 1)
    found = session.run({"input": np.ones((1, 2), np.float32)})
    assert [float(array[0, 0]) for array in found] == [1, 2, 3, 4]


def test_refuses_what_it_cannot_open(tmp_path: Path):
    """Other files, and objects that are no modules."""
    (tmp_path / "text.pt2").write_text("hello")
    for model, message in (
        (tmp_path / "net.onnx", "not ONNX files"),
        (tmp_path / "gone.pt2", "no such file"),
        (tmp_path / "text.pt2", "not an exported program"),
        (3, "not a int"),
    ):
        with pytest.raises(ModelError, match=message):
            runtime("torch", trust=True).open(model, 1)


def test_refuses_inputs_that_do_not_fit(module: Any, program: Any):
    """One line."""
    for model in (module, program):
        with pytest.raises(ModelError, match="failed on its input") as raised:
            runtime("torch").open(model, 1).run({"input": np.zeros((1, 4, 8, 8), np.float32)})
        assert "\n" not in str(raised.value)
