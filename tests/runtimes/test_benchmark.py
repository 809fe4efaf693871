"""Timing networks against each other; how fast they are is not asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from netdecouple.api import bench, decouple
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.source import open_for_shapes
from netdecouple.planning.settings import Settings
from netdecouple.runtimes import benchmark as module
from netdecouple.runtimes.benchmark import benchmark, model_names
from netdecouple.runtimes.layers import REORDER, REST, TOTAL, by_layer
from netdecouple.runtimes.onnxruntime import OnnxRuntime
from netdecouple.runtimes.timing import FEWEST, Ratio, Timing
from tests import networks
from tests.networks import Builder


@pytest.fixture(scope="module")
def pair() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A residual network, and the same with half the MACs."""
    model = networks.residual()
    return model, decouple(model, macs="2x", settings=Settings(data_free=True)).model


def macs(model: onnx.ModelProto) -> int:
    return sum(la.macs for la in OnnxNetwork(read_model(model), networks.images_for(model)).layers)


def test_times_every_network_with_every_number_of_threads(pair):
    """A row each, in order; the first of each group is what the others are compared with."""
    rows = bench(pair, threads=(1, 2), seconds=0).models
    assert [(row.runtime, row.threads) for row in rows] == [("onnxruntime", n) for n in (1, 1, 2, 2)]
    assert [row.faster is None for row in rows] == [True, False, True, False]
    assert {row.shapes for row in rows} == {((1, 3, 8, 8),)}
    assert all(0 < row.timing.lower <= row.timing.median <= row.timing.upper for row in rows)
    assert {row.version for row in rows} == {OnnxRuntime().version}


def test_shows_how_much_of_the_time_has_passed(pair):
    shown = []
    bench(pair, threads=(1, 2), seconds=1.0, progress=lambda *step: shown.append(step))
    assert set(shown) <= {("Timing", 0, 1), ("Timing", 1, 1)}
    assert shown.count(("Timing", 1, 1)) >= 2
    assert shown[0] == ("Timing", 0, 1)


def test_counts_macs(pair):
    """Per image, whatever the batch."""
    for rows in (bench(pair, seconds=0), bench(pair, shape=(5, 3, 8, 8), seconds=0)):
        assert [row.macs for row in rows.models] == [macs(model) for model in pair]
    assert rows.models[1].macs <= rows.models[0].macs / 2


def test_times_what_it_cannot_count():
    """A network without convolutions, and one with two inputs."""
    b = Builder()
    b.node("Gemm", b.node("Flatten", "image"), b.weight("w", 192, 10), out="logits")
    two = networks.classifier()
    two.graph.node.append(onnx.helper.make_node("Add", ["logits", "other"], ["sum"], "sum"))
    two.graph.input.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, (1, 10)))
    two.graph.output[0].name = "sum"
    for model in (b.model(), two):
        (row,) = bench([model], seconds=0).models
        assert row.macs is None
        assert row.timing.median > 0


def test_does_not_count_operators_it_does_not_know():
    """What they multiply costs MACs too; a sum without it would be wrong."""
    model = networks.classifier()
    unknown = next(node for node in model.graph.node if node.op_type == "Relu")
    unknown.op_type, unknown.domain = "Gelu", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    assert bench([model], seconds=0).models[0].macs is None


def test_takes_inputs_that_are_given(monkeypatch: pytest.MonkeyPatch):
    """And makes up none."""
    monkeypatch.setattr(module, "random_feeds", None)
    model = networks.classifier()
    timed = benchmark(
        [model, model],
        [OnnxRuntime()],
        open_for_shapes,
        feeds={"image": networks.images_for(model, 7)},
        seconds=0,
    )
    assert [row.shapes for row in timed.models] == [((7, 3, 8, 8),)] * 2


def test_layers_are_those_of_the_original(pair):
    """Stages are summed under their layer, whichever network comes first; nothing is shown twice."""
    names = [layer.name for layer in OnnxNetwork(read_model(pair[0]), networks.images_for(pair[0])).layers]
    for models in (pair, pair[::-1]):
        (times,) = bench(models, seconds=0, layers=True).layers
        shown = [layer.name for layer in times.layers]
        assert set(shown) == {*names, REORDER, REST, TOTAL} - ({REORDER} - set(shown))
        assert len(shown) == len(set(shown))
        assert all(len(layer.timings) == len(layer.faster) == 2 for layer in times.layers)
        assert all(t is not None for la in times.layers if la.name in names for t in la.timings)
        assert {layer.faster[0] for layer in times.layers} == {None}


def test_layers_add_up(pair, monkeypatch: pytest.MonkeyPatch):
    """The layers, the rest and the changes of layout are all there is, in every run."""
    runs = []

    def record(*arguments: Any) -> dict[str, float]:
        runs.append(by_layer(*arguments))
        return runs[-1]

    monkeypatch.setattr(module, "by_layer", record)
    (times,) = bench(pair, seconds=0, layers=True).layers
    for run in runs:
        assert sum(ms for name, ms in run.items() if name != TOTAL) == pytest.approx(run[TOTAL])
        assert run.keys() <= {layer.name for layer in times.layers}
    assert len(runs) >= 2 * FEWEST


def test_layers_of_a_network_without_names():
    """They are called as everywhere else: by what they write."""
    (times,) = bench([networks.without_names()], seconds=0, layers=True).layers
    assert {"Conv:bn1", "Conv:bn2", "Conv:bn3", "Gemm:logits"} <= {layer.name for layer in times.layers}


def test_a_layer_is_summarised_over_the_runs():
    """Quartiles per network, and of the ratio within each round; a network that has it not has none."""
    runs = [[{"a": 4.0}, {"a": 8.0}], [{"a": 2.0}, {"a": 4.0}], [{"b": 1.0}, {"b": 1.0}]]
    row = module._layer("a", runs)
    assert row.timings == (Timing(5, 6, 7), Timing(2.5, 3, 3.5), None)
    assert row.faster == (None, Ratio(2, 2, 2), None)


def test_to_json(pair):
    """Everything, and no ratio where none is to be quoted."""
    timed = bench(pair, seconds=0, layers=True)
    read = json.loads(timed.to_json())
    assert [row["macs"] for row in read["models"]] == [row.macs for row in timed.models]
    assert read["models"][0]["faster"] is None
    assert read["models"][1]["faster"].keys() == {"lower", "median", "upper"}
    assert read["layers"][0]["layers"][-1]["name"] == TOTAL


def test_networks_with_other_inputs_are_not_compared():
    """Both shapes are named."""
    with pytest.raises(ModelError, match=r"1×3×12×12, and .* 1×3×8×8"):
        bench([networks.classifier(), networks.kinds()], seconds=0)


def test_errors_name_the_network(tmp_path: Path):
    """Once, whoever found what is wrong."""
    onnx.save(networks.classifier(), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"^net\.onnx: input 'image'"):
        bench([tmp_path / "net.onnx"], shape=(1, 2, 8, 8), seconds=0)
    with pytest.raises(ModelError, match=r"^gone\.onnx: no such file"):
        bench([tmp_path / "net.onnx", tmp_path / "gone.onnx"], seconds=0)
    feeds = {"image": np.zeros((1, 4, 8, 8), np.float32)}
    with pytest.raises(ModelError, match=r"^net\.onnx: the network failed"):
        benchmark([tmp_path / "net.onnx"], [OnnxRuntime()], open_for_shapes, feeds=feeds, seconds=0)


def test_model_names():
    """Files by name, by path where two have the same."""
    assert model_names(["a/x.onnx", Path("b/x.onnx"), "b/y.onnx"]) == ["a/x.onnx", "b/x.onnx", "y.onnx"]
    assert model_names([networks.classifier()]) == ["tiny"]
