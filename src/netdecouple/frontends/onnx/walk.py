"""Run an ONNX network layer by layer while its layers are being replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError
from netdecouple.execution.memory import ArrayStore
from netdecouple.frontends.batches import pick
from netdecouple.frontends.onnx.emission import Form, emit
from netdecouple.frontends.onnx.layers import by_image
from netdecouple.frontends.onnx.model import OnnxModel
from netdecouple.frontends.onnx.proto import Nodes, Tensors, reads
from netdecouple.network import Array, Layer, Observation
from netdecouple.runtimes.onnxfile import with_graph
from netdecouple.runtimes.onnxruntime import run


@dataclass(frozen=True)
class LayerNode:
    """A layer and its place in the graph."""

    layer: Layer
    input: str
    output: str
    shortcut: str | None  # the tensor that an Add adds to the layer's output, if it is known before
    taken: Collection[str] = ()  # names in the graph
    mixed: bool = False  # whether the rows of all images take turns, where it is fully connected

    def emit(self, factorization: Factorization, form: Form = "parallel") -> tuple[Nodes, Tensors]:
        """Write a factorization as nodes and initializers that take the layer's place."""
        la = self.layer
        kind, dtype = la.operator, la.weight.dtype
        return emit(factorization, la.name, self.input, self.output, form, kind, dtype, self.taken)

    def whole(self, weight: Array, bias: Array) -> Factorization:
        """The layer with another weight (n_o, n_i / groups, kh, kw) and bias (n_o,)."""
        assert self.layer.geometry is not None
        return Factorization.whole(self.layer.geometry, weight, bias)

    def observation(
        self, batch: slice, positions: NDArray[np.int64], tensor: Callable[[str], Array], has_run: bool
    ) -> Observation:
        """Sample what the layer reads, and what it writes if it has run, at ``positions`` (all samples, p).

        ``tensor`` returns a tensor of the batch by name.
        """
        where, geometry = positions[batch], self.layer.geometry
        assert geometry is not None
        maps = self._maps(tensor(self.input))
        return Observation(
            layer=self.layer.name,
            images=batch,
            gather=lambda: single(geometry.patches(maps, where)),
            outputs=single(pick(self._maps(tensor(self.output)), where))
            if has_run
            else np.zeros((0, 0), np.float32),
            shortcut=single(pick(self._maps(tensor(self.shortcut)), where)) if self.shortcut else None,
        )

    def _maps(self, values: Array) -> Array:
        """View the rows (…, c) of a fully connected layer as maps (n, c, rows, 1); others are maps."""
        if not self.layer.is_linear:
            return values
        images = math.prod(values.shape[:-1]) // self.layer.size[0]
        return by_image(values, images, self.mixed).swapaxes(1, 2)[..., None]


class OnnxWalk:
    """The network cut in front of a layer, with every tensor held that the rest of the network reads.

    Advancing runs each node once more, so that a network of any depth costs one forward pass (DESIGN §4).
    ``inputs`` are the samples of every batch, and the input that the network takes for them; ``store`` holds
    the live tensors.
    """

    def __init__(
        self,
        model: OnnxModel,
        layers: Mapping[str, LayerNode],
        inputs: Iterable[tuple[slice, Array]],
        store: ArrayStore,
    ) -> None:
        graph = model.proto.graph
        self._model, self._layers, self._store = model, layers, store
        self._nodes = list(graph.node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._constants |= {n: numpy_helper.from_array(value, n) for n, value in model.given.items()}
        self._outputs = {value.name for value in graph.output}
        self._position = 0  # of the next node to run
        self._live = [model.input_name]
        self._batches: list[slice] = []
        for batch, images in inputs:
            self._store[len(self._batches), model.input_name] = images
            self._batches.append(batch)

    def observe(self, layer: str, positions: NDArray[np.int64]) -> Iterator[Observation]:
        """Advance to ``layer`` and yield what it reads in the network as decoupled so far."""
        self.advance(layer)
        for index, batch in enumerate(self._batches):
            yield self._layers[layer].observation(batch, positions, partial(self._held, index), has_run=False)

    def _held(self, index: int, tensor: str) -> Array:
        return self._store[index, tensor]

    def advance(self, layer: str) -> None:
        """Advance to ``layer``.

        Call this for every replaced layer, even one that is not observed: cutting the graph at other places
        changes rounding, and results would not be reproducible.
        """
        output = self._layers[layer].output
        target = next(i for i, node in enumerate(self._nodes) if node.output[0] == output)
        nodes = self._nodes[self._position : target]
        needed = {t for n in self._nodes[target:] for t in reads(n)} | self._outputs
        read = {t for n in nodes for t in reads(n)}
        inputs = [t for t in self._live if t in read]
        outputs = [t for n in nodes for t in n.output if t in needed]
        session = self._model.session(self._segment(nodes, inputs, outputs)) if outputs else None
        for index in range(len(self._batches)):
            if session is not None:
                values = run(session, outputs, {t: self._store[index, t] for t in inputs})
                for name, value in zip(outputs, values, strict=True):
                    if not isinstance(value, np.ndarray):
                        raise ModelError(
                            f"{self._model.origin}: {name!r}, needed on both sides of a layer, is a sequence "
                            "of tensors; export without it, or name the layers between with exclude="
                        )
                    self._store[index, name] = value
            for name in self._live:
                if name not in needed:
                    self._store.pop((index, name))
        self._live, self._position = [t for t in self._live if t in needed] + outputs, target

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Put a factorization in the place of ``layer``."""
        place = self._layers[layer]
        assert self._nodes[self._position].output[0] == place.output, "the walk is not at this layer"
        nodes, constants = place.emit(factorization)
        self._nodes[self._position : self._position + 1] = nodes
        self._constants |= {tensor.name: tensor for tensor in constants}

    def _segment(self, nodes: Nodes, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        declared = []
        for name in inputs:
            value = self._store[0, name]
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            declared.append(helper.make_tensor_value_info(name, kind, [None] * value.ndim))
        used = sorted({t for n in nodes for t in reads(n)} & self._constants.keys())
        ends = [onnx.ValueInfoProto(name=t) for t in outputs]
        return with_graph(self._model.proto, nodes, declared, ends, [self._constants[t] for t in used])


def single(values: Array) -> Array:
    """Convert float16 to float32, so that sums over it are not float16."""
    return values.astype(np.float32) if values.dtype == np.float16 else values
