"""Time single layers, in every form they can be written in, and whole networks in a runtime.

Time depends on the structure alone, so layers are timed with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from netdecouple.convolution import ConvStage, Factorization, Structure
from netdecouple.frontends.onnx.emission import PRODUCTS, Form, emit, form_of
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.kernels import DOMAIN
from netdecouple.network import Array, Layer
from netdecouple.runtimes import Feeds, Runtime
from netdecouple.runtimes.timing import Timing, measure

COLD = 4 << 20  # bytes of the copies' weights, so that they come from beyond the second-level cache
SECONDS = 0.2  # in which a layer's forms are measured in turn


class OnnxTimer:
    """Times layers and models where they will run.

    Args:
        network: whose layers are timed.
        runtime: opens ONNX models.
        threads: that the runtime uses.
        forms: in which layers may be written.
        inputs: images (n, c, h, w) that whole networks run on; layers are timed with as many.
    """

    def __init__(
        self, network: OnnxNetwork, runtime: Runtime, threads: int, forms: Sequence[Form], inputs: Array
    ) -> None:
        self.name = f"{runtime.name} {runtime.version}, {threads} thread{'s' * (threads > 1)}"
        self._runtime = runtime
        self._threads = threads
        self._forms = tuple(forms)
        self._batch = len(inputs)
        self._feeds: Feeds = {network.model.input_name: np.ascontiguousarray(inputs)}

    def forms(self, layer: Layer) -> tuple[str, ...]:
        """List the forms in which a layer may be written; matrix products have one."""
        return self._forms[:1] if layer.operator in PRODUCTS else self._forms

    def layer_times(self, layer: Layer, kinds: Sequence[tuple[Structure, str]]) -> list[float]:
        """Measure a layer in several structures and forms, in turn: milliseconds of each."""
        assert layer.geometry is not None
        copies = int(np.clip(COLD / (4 * layer.parameters), 3, 8)) if layer.macs < 5e8 else 2
        shape = _shape(layer, layer.geometry.n_i, layer.size, self._batch)
        feeds = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        models = [
            tiny_model(layer, structure, form_of(form), copies, self._batch) for structure, form in kinds
        ]
        runs = [self._run(model, feeds) for model in models]
        return [Timing.of(column).median / copies for column in measure(runs, SECONDS).T]

    def runs(self, models: Sequence[onnx.ModelProto]) -> list[Callable[[], object]]:
        """Open whole networks; each function that is returned runs one of them once."""
        return [self._run(model, self._feeds) for model in models]

    def _run(self, model: onnx.ModelProto, feeds: Feeds) -> Callable[[], Any]:
        return partial(self._runtime.open(model, self._threads).run, feeds)


def placeholder(structure: Structure, seed: int = 0) -> Factorization:
    """Make a factorization of some structure with random weights and no bias."""
    rng = np.random.default_rng(seed)
    stages = tuple(
        ConvStage(
            g,
            rng.standard_normal(g.weight_shape, np.float32)
            / np.float32(np.sqrt(np.prod(g.weight_shape[1:]))),
            channels,
        )
        for g, channels in zip(structure.stages, structure.channels, strict=True)
    )
    return Factorization(structure.geometry, stages, np.zeros(structure.geometry.n_o, np.float32))


def tiny_model(
    layer: Layer, structure: Structure, form: Form, copies: int, batch: int = 1
) -> onnx.ModelProto:
    """Make a model of several copies of a layer in some structure, all on one input.

    The copies' weights differ, so that no runtime merges two of them. Each is followed by a pooling to one
    pixel, which also reads blocked layouts: then the model takes the time that the layer takes in a network.
    """
    g = layer.geometry
    assert g is not None
    is_product = layer.operator in PRODUCTS
    nodes, weights = [], []
    for index in range(copies):
        y = f"out{index}" if is_product else f"y{index}"
        new, constants = emit(placeholder(structure, index), f"layer{index}", "x", y, form, layer.operator)
        nodes += new
        if not is_product:
            nodes.append(helper.make_node("GlobalAveragePool", [y], [f"out{index}"]))
        weights += constants
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _shape(layer, g.n_i, layer.size, batch))],
        [
            helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, _shape(layer, g.n_o, (1, 1), batch))
            for i in range(copies)
        ],
        weights,
    )
    domains = [helper.make_opsetid("", 13), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=domains if form == "fused" else domains[:1], ir_version=8)


def _shape(layer: Layer, channels: int, size: tuple[int, int], batch: int) -> tuple[int, ...]:
    """Return the shape of a batch's maps, or of its rows where the layer is fully connected."""
    return (batch, channels) if layer.operator in PRODUCTS else (batch, channels, *size)
