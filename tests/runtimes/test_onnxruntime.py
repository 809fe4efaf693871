"""ONNX Runtime as a runtime, with our own operators, and its profiler."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from netdecouple import kernels
from netdecouple.errors import ModelError, NetDecoupleError
from netdecouple.kernels import DOMAIN
from netdecouple.runtimes.onnxruntime import (
    OnnxRuntime,
    Profiled,
    node_times,
    open_session,
    options,
    uses_kernels,
)
from tests import networks
from tests.runtimes.base import OnnxRuntimeCase


class TestOnnxRuntime(OnnxRuntimeCase):
    name = "onnxruntime"


def with_own_operator() -> onnx.ModelProto:
    """A classifier with a node of our domain at its end."""
    model = networks.classifier()
    model.graph.node.append(onnx.helper.make_node("DecoupledConv", ["logits"], ["own"], "own", domain=DOMAIN))
    model.graph.output[0].name = "own"
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return model


def test_sessions_for_work_do_not_spin_and_timed_ones_stop_when_they_are_done():
    """Only sessions with a number of threads of their own spin while they run."""
    work, timed = options(), options(2)
    assert work.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert timed.get_session_config_entry("session.force_spinning_stop") == "1"
    assert timed.intra_op_num_threads == 2
    with pytest.raises(RuntimeError):
        timed.get_session_config_entry("session.intra_op.allow_spinning")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The session options that our operators were registered with; they are none that work."""
    seen: list[object] = []
    monkeypatch.setattr(kernels, "register", seen.append)
    return seen


def test_own_operators_are_registered(registered: list[object], tmp_path: Path):
    """For a model in memory and for a file; with the options that the session is made with."""
    model = with_own_operator()
    onnx.save(model, tmp_path / "own.onnx")
    for source in (model, tmp_path / "own.onnx", str(tmp_path / "own.onnx")):
        chosen = options()
        with pytest.raises(ModelError, match="cannot open"):  # these were registered in vain
            open_session(source, chosen)
        assert registered.pop() is chosen


def test_other_networks_do_without(registered: list[object], tmp_path: Path):
    """Standard operators only."""
    onnx.save(networks.classifier(), tmp_path / "net.onnx")
    for source in (networks.classifier(), tmp_path / "net.onnx"):
        assert not uses_kernels(source)
        open_session(source)
    assert registered == []


def test_kernels_that_cannot_be_had_say_so(registered: list[object], monkeypatch: pytest.MonkeyPatch):
    """Their own error reaches the user."""

    def missing(_: object) -> None:
        raise NetDecoupleError("the fused operator is not built for this machine")

    monkeypatch.setattr(kernels, "register", missing)
    with pytest.raises(NetDecoupleError, match="not built"):
        OnnxRuntime().open(with_own_operator(), 1)


def test_version():
    assert OnnxRuntime().version == ort.__version__


def event(name: str, duration: int, operator: str = "") -> dict:
    """As the profiler writes them."""
    kind = "Node" if operator else "Session"
    return {"cat": kind, "name": name, "dur": duration, "args": {"op_name": operator} if operator else {}}


def test_node_times_are_summed_run_by_run():
    """Milliseconds by name and operator; what a loop ran twice is added."""
    events = [
        event("session_initialization", 9000),
        event("conv_kernel_time", 250, "Conv"),
        event("body_kernel_time", 100, "Relu"),
        event("body_kernel_time", 200, "Relu"),
        event("SequentialExecutor::Execute", 600),
        event("model_run", 700),
        event("conv_kernel_time", 500, "Conv"),
        event("model_run", 700),
    ]
    assert node_times(events) == [
        {("conv", "Conv"): 0.25, ("body", "Relu"): pytest.approx(0.3)},
        {("conv", "Conv"): 0.5},
    ]


def test_profiled_tells_every_run(tmp_path: Path):
    """As many runs as there were, each with the same nodes, a Gemm and three convolutions among them."""
    profiled = Profiled(networks.classifier(), 1, tmp_path / "profile")
    for _ in range(4):
        profiled.run({"image": networks.images_for(networks.classifier(), 1)})
    runs = profiled.finish()
    assert len(runs) == 4
    assert len({frozenset(run) for run in runs}) == 1
    operators = [operator for _, operator in runs[0]]
    assert sum(operator in ("Conv", "FusedConv") for operator in operators) == 3
    assert operators.count("Gemm") == 1
