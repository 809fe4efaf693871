"""What a decoupled module is compiled or exported to computes the same as the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")

from tests.frontends.torch.modules import decoupled, inputs, net  # noqa: E402

METHODS = ["nd-dp", "cd+sd+cp+nd-dp"]


@pytest.fixture(params=METHODS)
def module(request: pytest.FixtureRequest) -> Any:
    return decoupled(net(), request.param)


def expected(module: Any, count: int = 4) -> Any:
    """By the fused operator, where there is one."""
    with torch.no_grad():
        return module(inputs(count))


def assert_close(found: Any, wanted: Any) -> None:
    error = np.linalg.norm(np.asarray(found.detach()) - np.asarray(wanted)) / np.linalg.norm(wanted)
    assert error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("module", METHODS[:1], indirect=True)
def test_compiles(module: Any):
    """With gradients and without, and once more after training has changed the weights."""
    compiled = torch.compile(module, fullgraph=True)
    assert_close(compiled(inputs()), expected(module))
    with torch.no_grad():
        assert_close(compiled(inputs()), expected(module))
        module.head.bias.add_(1)
        assert_close(compiled(inputs()), expected(module))
    compiled(inputs()).sum().backward()
    assert module.conv[-1].weight.grad is not None


def test_exports_a_program(module: Any, tmp_path: Path):
    """For batches of any size, of standard operators only: it needs no netdecouple to run."""
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(module, (inputs(),), dynamic_shapes=({0: batch},))
    assert "netdecouple" not in str(program.graph)
    assert_close(program.module()(inputs(7)), expected(module, 7))
    torch.export.save(program, tmp_path / "net.pt2")


@pytest.mark.parametrize("dynamo", [False, True])
def test_exports_to_onnx(module: Any, tmp_path: Path, dynamo: bool):
    """By either exporter, for batches of any size, in standard operators."""
    path = tmp_path / "net.onnx"
    if dynamo:
        pytest.importorskip("onnxscript")
        dims: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    else:
        dims = {"dynamic_axes": {"input": {0: "batch"}}}
    torch.onnx.export(module, (inputs(),), path, dynamo=dynamo, input_names=["input"], **dims)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (4, 7):
        (found,) = session.run(None, {"input": inputs(count).numpy()})
        assert_close(torch.from_numpy(found), expected(module, count))


def test_traces(module: Any):
    """The tracer sees the plain stages."""
    with torch.no_grad():
        traced = torch.jit.trace(module, (inputs(),))
    assert "decoupled_conv" not in str(traced.inlined_graph)
    assert_close(traced(inputs(7)), expected(module, 7))
