"""An ONNX network that is run, observed, and written again with factorized layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError
from netdecouple.execution.memory import ArrayStore, Memory
from netdecouple.frontends.batches import batch_slices
from netdecouple.frontends.onnx.emission import PRODUCTS, emit, form_of
from netdecouple.frontends.onnx.external import ExternalWeights
from netdecouple.frontends.onnx.fallback import add_fallbacks
from netdecouple.frontends.onnx.fusion import absorb
from netdecouple.frontends.onnx.model import OnnxModel, find_layers
from netdecouple.frontends.onnx.proto import nodes_of, readers_of, replace_items, up_to
from netdecouple.frontends.onnx.pruning import drop_unread_channels
from netdecouple.frontends.onnx.walk import LayerNode, OnnxWalk, single
from netdecouple.kernels import DOMAIN
from netdecouple.network import Array, Layer, Observation, Positions
from netdecouple.runtimes.onnxfile import copy_of, is_large, size_of
from netdecouple.runtimes.onnxruntime import open_session, run

TOLERANCE = 1e-3  # relative difference between a built network and its plan's arithmetic
HALF_TOLERANCE = 3e-2  # the same where numbers between the stages are rounded to float16


class OnnxNetwork:
    """A pretrained ONNX network, with the shapes that it has for images of one size.

    Args:
        model: is not changed.
        sample: (n, c, h, w), run once to find every layer's shapes.
        memory: limits on it, and where temporary files go.

    Raises:
        ModelError: the network fails on the sample, or its weights or tensors cannot be used.
    """

    def __init__(self, model: OnnxModel, sample: Array, memory: Memory = Memory()) -> None:
        self.model = model
        self.memory = memory
        # two images at least, so that what is the same for all images does not look like one of them
        self._sample = self.padded(sample, slice(0, model.batch or 2))
        self.layers, self.nodes, self._shapes = find_layers(model, self._sample)
        self._order = {output: i for i, node in enumerate(model.proto.graph.node) for output in node.output}
        self.name, self.fingerprint = model.origin, model.fingerprint
        self.norms: Mapping[str, str] = {}  # BatchNorms were folded when the model was read
        self.example: Any = self._sample[: model.batch or 1]
        halves = any(layer.weight.dtype == np.float16 for layer in self.layers)
        self.tolerance = HALF_TOLERANCE if halves else TOLERANCE

    @cached_property
    def _external(self) -> ExternalWeights | None:
        """The model with its weights in a file, where copies of them would take too much memory."""
        if self.memory.limit is None and not is_large(self.model.proto):
            return None
        return self._with_external_weights(self.model.proto)

    def _with_external_weights(self, proto: onnx.ModelProto) -> ExternalWeights:
        return ExternalWeights(proto, self.memory.scratch)

    def layers_of(
        self, model: onnx.ModelProto, factorizations: Mapping[str, Factorization] = {}
    ) -> tuple[Layer, ...]:
        """List the layers of another model that was made of this one."""
        return find_layers(replace(self.model, proto=model), self._sample)[0]

    @property
    def _proto(self) -> onnx.ModelProto:
        """The model of which others are made to be run."""
        return self.model.proto if self._external is None else self._external.proto

    def _opened(self, proto: onnx.ModelProto) -> Any:
        """Open a model that was made of `_proto`."""
        return open_session(proto) if self._external is None else self._external.opened(proto)

    def batches(self, count: int, bytes_per_image: int = 0) -> list[slice]:
        """Cut ``count`` images into batches that fit in memory, or have the network's fixed size."""
        return batch_slices(
            count, self.layers, self.memory.batch_bytes, bytes_per_image, fixed=self.model.batch
        )

    def padded(self, images: Array, batch: slice) -> Array:
        """Take a batch of images in the network's type; a fixed batch is filled up with the last image."""
        taken = images[batch]
        missing = (self.model.batch or len(taken)) - len(taken)
        whole = np.concatenate([taken, taken[-1:].repeat(missing, axis=0)]) if missing else taken
        with np.errstate(over="ignore"):  # an observation refuses infinite values and names the layer
            return whole.astype(self.model.dtype, copy=False)

    @cached_property
    def _outputs(self) -> list[str]:
        """The outputs that can be compared: all that are numbers.

        Raises:
            ModelError: there are none.
        """
        kinds = {value.name: value.type for value in self.model.proto.graph.output}
        numeric = [
            name
            for name, kind in kinds.items()
            if kind.HasField("tensor_type") and kind.tensor_type.elem_type != onnx.TensorProto.STRING
        ]
        if not numeric:
            raise ModelError(f"{self.model.origin}: none of its outputs ({', '.join(kinds)}) are numbers")
        return numeric

    def run(self, images: Array, kernels: Mapping[str, tuple[Array, Array]] | None = None) -> list[Array]:
        """Return every output for (n, c, h, w) images, with some layers' weight and bias replaced."""
        # opened within the call, so that the copy with other kernels is freed before it runs
        return self._run(self._opened(self._with_kernels(kernels or {})), images)

    def run_built(self, model: onnx.ModelProto, images: Array) -> list[Array]:
        """Return every output of another model with this one's input and outputs."""
        if self._external is None:
            return self._run(open_session(model), images)
        external = self._with_external_weights(model)
        return self._run(external.opened(external.proto), images)

    def _run(self, session: Any, images: Array) -> list[Array]:
        batches = self.batches(len(images))
        parts = [
            run(session, self._outputs, {self.model.input_name: self.padded(images, batch)})
            for batch in batches
        ]
        sizes = [self.model.batch or batch.stop - batch.start for batch in batches]
        return [single(_joined(part, sizes, len(images))) for part in zip(*parts, strict=True)]

    def _with_kernels(self, kernels: Mapping[str, tuple[Array, Array]]) -> onnx.ModelProto:
        """Copy `_proto` with some layers' weight (n_o, n_i / groups, kh, kw) and bias (n_o,) replaced."""
        if not kernels:
            return self._proto
        proto = copy_of(self._proto)
        for name, (weight, bias) in kernels.items():
            place = self._places[name]
            node = proto.graph.node[self._order[place.output]]
            names = [f"{name}/replaced.{part}" for part in ("weight", "bias")]
            if node.op_type in PRODUCTS:
                weight = weight[:, :, 0, 0]
                node.CopyFrom(helper.make_node("Gemm", node.input, node.output, node.name, transB=1))
            node.input[:] = [node.input[0], *names]
            proto.graph.initializer.extend(
                numpy_helper.from_array(np.ascontiguousarray(a, place.layer.weight.dtype), n)
                for a, n in zip((weight, bias), names, strict=True)
            )
        return proto

    def observe(
        self, images: Array, positions: Positions, with_patches: bool = True
    ) -> Iterator[Observation]:
        """Yield, batch by batch, what the layers named in ``positions`` read and write."""
        if not positions:
            return
        places = [self._places[name] for name in positions]
        tensors = dict.fromkeys(t for p in places for t in (p.input, p.output, p.shortcut) if t)
        fetched = [t for t in tensors if t != self.model.input_name]
        session = self._opened(up_to(self._proto, fetched))
        held = sum(
            4
            * (la.geometry.n_i * la.size[0] * la.size[1] + 2 * la.geometry.n_o * int(np.prod(la.output_size)))
            for la in (place.layer for place in places)
            if la.geometry
        )
        for batch in self.batches(len(images), held):
            feeds = {self.model.input_name: self.padded(images, batch)}
            values = feeds | dict(zip(fetched, run(session, fetched, feeds), strict=True))
            for place, where in zip(places, positions.values(), strict=True):
                yield place.observation(batch, where, values.__getitem__, has_run=True)

    @cached_property
    def _places(self) -> dict[str, LayerNode]:
        return {la.name: LayerNode(la, self.nodes[la.name], self.shortcut(la.name)) for la in self.layers}

    def shortcut(self, name: str) -> str | None:
        """The tensor added to this layer's output by an Add, if it is known before the layer runs.

        Additions that broadcast (a bias map, a gate) are no residual branches.
        """
        output = self.nodes[name].output[0]
        readers = self._readers.get(output, [])
        is_result = any(value.name == output for value in self.model.proto.graph.output)
        if len(readers) != 1 or readers[0].op_type != "Add" or is_result:
            return None
        other = next(t for t in readers[0].input if t != output)
        before = self._order.get(other, len(self._order)) < self._order[output]
        return other if before and self._shapes[other] == self._shapes[output] else None

    @cached_property
    def _readers(self) -> dict[str, list[onnx.NodeProto]]:
        return readers_of(self.model.proto.graph.node)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the same network where it is unpickled.

        Raises:
            ModelError: it is too large to be sent.
        """
        if is_large(self.model.proto):
            raise ModelError(
                f"{self.model.origin}: models above 2 GB cannot be sent to workers; leave out workers="
            )
        return OnnxNetwork, (self.model, self._sample, self.memory.in_worker)

    def walk(self, images: Array) -> OnnxWalk:
        """Start at the network's input, ready to be decoupled layer by layer."""
        inputs = ((batch, self.padded(images, batch)) for batch in self.batches(len(images)))
        store = ArrayStore(self.memory.store_bytes, self.memory.scratch)
        return OnnxWalk(self.model, self._places, inputs, store)

    @property
    def counts_everything(self) -> bool:
        """Whether all its operators are known, so that no MACs are missing from the layers'."""
        counted = {node.output[0] for node in self.nodes.values()}
        return all(
            node.domain in ("", "ai.onnx") or node.output[0] in counted
            for node in nodes_of(self.model.proto.graph)
        )

    def size_of(self, model: onnx.ModelProto | None = None) -> int:
        """Bytes of a model; of the original as it was read, external data included."""
        return self.model.bytes if model is None else size_of(model)

    def pictures(self, images: Array) -> list[Array]:
        """Return the inputs: all of them are pictures."""
        return list(images)

    def close(self) -> None:
        """Nothing to end."""

    def build(
        self,
        factorizations: Mapping[str, Factorization],
        forms: Mapping[str, str] = {},
        metadata: Mapping[str, str] = {},
    ) -> onnx.ModelProto:
        """Write the network with some layers as chains of stages, without the channels that nothing reads.

        Fused operators come with functions for runtimes that do not know them.

        Args:
            factorizations: by layer.
            forms: how each is written, by layer; "parallel" if it is not among them.
            metadata: entries to add to the model's.
        """
        proto = copy_of(self.model.proto)
        by_output = {self.nodes[name].output[0]: name for name in factorizations}
        nodes: list[onnx.NodeProto] = []
        for node in proto.graph.node:
            name = by_output.get(node.output[0])
            if name is None:
                nodes.append(node)
                continue
            form = form_of(forms.get(name, "parallel"))
            dtype = self._places[name].layer.weight.dtype
            new, constants = emit(
                factorizations[name], name, node.input[0], node.output[0], form, node.op_type, dtype
            )
            nodes += new
            proto.graph.initializer.extend(constants)
        replace_items(proto.graph.node, nodes)
        if any(node.domain == DOMAIN for node in nodes):
            if all(entry.domain != DOMAIN for entry in proto.opset_import):
                proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
            absorb(proto.graph, self._shapes)
        drop_unread_channels(proto, self._shapes)
        add_fallbacks(proto)
        for key, value in metadata.items():
            _set_metadata(proto, key, value)
        return proto


def _joined(parts: Sequence[Array], sizes: Sequence[int], count: int) -> Array:
    """Join one output of batches of so many images, of which the first ``count`` are wanted."""
    parts = [np.atleast_1d(part) for part in parts]
    for axis in range(min(part.ndim for part in parts)):
        ahead = [np.moveaxis(part, axis, 0) for part in parts]
        each = len(ahead[0]) // sizes[0]
        if each and all(len(a) == each * n for a, n in zip(ahead, sizes, strict=True)) and _alike(ahead):
            return np.concatenate(ahead)[: each * count]
    if _alike(parts):  # so many boxes as there are
        return np.concatenate(parts)
    return np.concatenate([part.reshape(-1) for part in parts])


def _alike(parts: Sequence[Array]) -> bool:
    """Whether they can be joined along the first axis."""
    return len({part.shape[1:] for part in parts}) == 1


def _set_metadata(proto: onnx.ModelProto, key: str, value: str) -> None:
    entry: Any = next((e for e in proto.metadata_props if e.key == key), None) or proto.metadata_props.add()
    entry.key, entry.value = key, value
