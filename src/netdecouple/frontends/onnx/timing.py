"""Measure layers and whole networks in a runtime for ONNX models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from netdecouple import kernels
from netdecouple.convolution import Structure, placeholder
from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.emission import PRODUCTS, Form, emit
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.network import Layer
from netdecouple.runtimes import Feeds, Runtime
from netdecouple.runtimes.timing import Stopwatch

COLD = 4 << 20  # bytes of weights in a model of copies, so that they come from beyond the second cache


class OnnxTimer:
    """Times in one runtime and with one number of threads; see `network.Timer`.

    Raises:
        ModelError: the runtime does not run ONNX models.
    """

    def __init__(self, network: OnnxNetwork, runtime: Runtime, threads: int, forms: tuple[Form, ...]) -> None:
        if runtime.name.startswith("torch"):
            raise ModelError(
                f"runtime={runtime.name!r} is for PyTorch modules; ONNX models run in onnxruntime or openvino"
            )
        if "fused" in forms:
            kernels.check_available()
        self._network, self._runtime, self._threads, self._forms = network, runtime, threads, forms
        self._feeds: Feeds = network.model.feeds(np.ascontiguousarray(network.example))
        self.batch = len(network.example)
        self._stopwatch = Stopwatch(threads)
        self.name = f"{runtime.name} {runtime.version}, {threads} thread{'s' * (threads > 1)}"

    @property
    def lost(self) -> float:
        """The share of the time of timing that other work took."""
        return self._stopwatch.lost

    def forms(self, layer: Layer) -> tuple[str, ...]:
        """Name the forms that a layer may be written in; for matrix products all forms are one."""
        return self._forms[:1] if layer.operator in PRODUCTS else self._forms

    def layer_times(self, layer: Layer, kinds: Sequence[tuple[Structure, str]]) -> list[float]:
        """Measure one layer in several structures and forms, which take turns; milliseconds."""
        assert layer.geometry is not None
        copies = int(np.clip(COLD / (4 * layer.parameters), 3, 8)) if layer.macs < 5e8 else 2
        shape = _shape(layer, layer.geometry.n_i, layer.size, self.batch)
        image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        sessions = [
            self._runtime.open(tiny_model(layer, structure, form, copies, self.batch), self._threads)
            for structure, form in kinds
        ]
        runs = [partial(session.run, {"x": image}) for session in sessions]
        return [float(time) / copies for time in self._stopwatch.times(runs, 0.2)]

    def network_times(self, models: Sequence[Any]) -> NDArray[np.float64]:
        """Measure whole networks: milliseconds (1 + models,), the original first."""
        sessions = [self._original, *(self._runtime.open(model, self._threads) for model in models)]
        runs = [partial(session.run, self._feeds) for session in sessions]
        return self._stopwatch.times(runs, 1.0)

    @cached_property
    def _original(self) -> Any:
        return self._runtime.open(self._network.build({}, {}, {}), self._threads)


def _shape(layer: Layer, channels: int, size: tuple[int, int], batch: int) -> tuple[int, ...]:
    """The shape of a batch's maps, or of its rows where the layer is fully connected."""
    if layer.operator not in PRODUCTS:
        return (batch, channels, *size)
    rows = layer.size[0]
    return (batch * rows, channels) if layer.operator == "Gemm" else (batch, rows, channels)


def tiny_model(layer: Layer, structure: Structure, form: Any, copies: int, batch: int = 1) -> onnx.ModelProto:
    """Make a model of several copies of a layer in some structure, all on one input.

    Their weights differ, so that no runtime merges two copies. Each is followed by a pooling to one pixel,
    which blocked layouts go through as well: the model takes the layer's time as it stands in a network.
    """
    g = layer.geometry
    assert g is not None
    is_flat = layer.operator in PRODUCTS
    nodes, weights, outputs = [], [], []
    for index in range(copies):
        y, end = f"out{index}" if is_flat else f"y{index}", f"out{index}"
        stages, constants = emit(placeholder(structure, index), f"layer{index}", "x", y, form, layer.operator)
        nodes += stages if is_flat else [*stages, helper.make_node("GlobalAveragePool", [y], [end])]
        weights += constants
        shape = _shape(layer, g.n_o, (1, 1), batch)
        outputs.append(helper.make_tensor_value_info(end, TensorProto.FLOAT, shape))
    shape = _shape(layer, g.n_i, layer.size, batch)
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "layer", [image], outputs, weights)
    domains = [helper.make_opsetid("", 13), helper.make_opsetid(kernels.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=domains if form == "fused" else domains[:1], ir_version=8)
