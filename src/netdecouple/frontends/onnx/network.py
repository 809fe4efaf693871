"""An ONNX network at work: run it, watch its layers, walk it while it is being decoupled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError
from netdecouple.execution.memory import ArrayStore
from netdecouple.execution.run import Resources
from netdecouple.frontends.common import batch_slices, pick
from netdecouple.frontends.onnx.emission import PRODUCTS, Form, emit
from netdecouple.frontends.onnx.external import Lean
from netdecouple.frontends.onnx.fallback import add_fallbacks
from netdecouple.frontends.onnx.fusion import absorb
from netdecouple.frontends.onnx.model import OnnxModel, find_layers, reads, up_to
from netdecouple.frontends.onnx.pruning import drop_unread_channels
from netdecouple.kernels import DOMAIN
from netdecouple.network import Array, Layer, Observation, Positions
from netdecouple.runtimes.onnxruntime import PROTOBUF_LIMIT, open_session, run, size_of


class OnnxNetwork:
    """A pretrained ONNX network, sized by the images it is going to see.

    ``sample`` (n, c, h, w) is run once to learn every layer's shapes.
    """

    def __init__(self, model: OnnxModel, sample: Array, resources: Resources = Resources()) -> None:
        self.model = model
        self.resources = resources
        # two images at least, so that what is the same for all images does not look like one of them
        self._sample = self.padded(sample, slice(0, model.batch or 2))
        self.layers, self.nodes, self._shapes = find_layers(model, self._sample)
        self._order = {output: i for i, node in enumerate(model.proto.graph.node) for output in node.output}

    @property
    def fingerprint(self) -> str:
        """Hash of the operators and weights as they were read."""
        return self.model.fingerprint

    def layers_of(self, proto: onnx.ModelProto) -> tuple[Layer, ...]:
        """Every layer that costs MACs in another model that was made of this one."""
        return find_layers(replace(self.model, proto=proto), self._sample)[0]

    @cached_property
    def _lean(self) -> Lean | None:
        """The model with its weights in a file, where copies of them would take too much memory."""
        large = size_of(self.model.proto) >= PROTOBUF_LIMIT
        if self.resources.memory is None and not large:
            return None
        return Lean(self.model.proto, self.resources.checkpoint.scratch)

    @property
    def _proto(self) -> onnx.ModelProto:
        """The model to make others of that are to be run."""
        return self.model.proto if self._lean is None else self._lean.proto

    def _opened(self, proto: onnx.ModelProto) -> Any:
        """Open a model that was made of `_proto`."""
        return open_session(proto) if self._lean is None else self._lean.opened(proto)

    @cached_property
    def _layer(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def batches(self, count: int, bytes_per_image: int = 0) -> list[slice]:
        """Cut ``count`` images into batches whose activations fit in memory; a fixed batch is kept to."""
        return batch_slices(
            count, self.layers, self.resources.batch_bytes, bytes_per_image, fixed=self.model.batch
        )

    def padded(self, images: Array, batch: slice) -> Array:
        """Take a batch of images, in the network's type; the last is repeated if it takes a fixed number."""
        taken = images[batch]
        missing = (self.model.batch or len(taken)) - len(taken)
        whole = np.concatenate([taken, taken[-1:].repeat(missing, axis=0)]) if missing else taken
        with np.errstate(over="ignore"):  # what becomes infinite is told with the layer's name
            return whole.astype(self.model.dtype, copy=False)

    @cached_property
    def told(self) -> list[str]:
        """The outputs that can be compared: all that are numbers.

        Raises:
            ModelError: there are none.
        """
        kinds = {value.name: value.type for value in self.model.proto.graph.output}
        found = [
            name
            for name, kind in kinds.items()
            if kind.HasField("tensor_type") and kind.tensor_type.elem_type != onnx.TensorProto.STRING
        ]
        if not found:
            raise ModelError(f"{self.model.origin}: none of its outputs ({', '.join(kinds)}) are numbers")
        return found

    def joined(self, outputs: Sequence[Sequence[Array]], count: int) -> list[Array]:
        """Join every output of all batches, images first, without what padding added to ``count``."""
        sizes = [self.model.batch or batch.stop - batch.start for batch in self.batches(count)]
        return [single(_joined(parts, sizes, count)) for parts in zip(*outputs, strict=True)]

    def run(self, images: Array, kernels: Mapping[str, tuple[Array, Array]] | None = None) -> list[Array]:
        """Return every output for (n, c, h, w) images, with some layers' weight and bias replaced."""
        # opened here, so that the copy with other kernels is gone before it runs
        return self._run(self._opened(self._with_kernels(self._proto, kernels or {})), images)

    def run_model(self, proto: onnx.ModelProto, images: Array) -> list[Array]:
        """Return every output of another model with this one's input and outputs."""
        if self._lean is None:
            return self._run(open_session(proto), images)
        lean = Lean(proto, self.resources.checkpoint.scratch)
        return self._run(lean.opened(lean.proto), images)

    def _run(self, session: Any, images: Array) -> list[Array]:
        batches = [self.padded(images, batch) for batch in self.batches(len(images))]
        parts = [run(session, self.told, {self.model.input_name: batch}) for batch in batches]
        return self.joined(parts, len(images))

    def with_kernels(self, kernels: Mapping[str, tuple[Array, Array]]) -> onnx.ModelProto:
        """Copy the model with some layers' weight (n_o, n_i / groups, kh, kw) and bias (n_o,) replaced."""
        return self._with_kernels(self.model.proto, kernels)

    def _with_kernels(
        self, original: onnx.ModelProto, kernels: Mapping[str, tuple[Array, Array]]
    ) -> onnx.ModelProto:
        if not kernels:
            return original
        proto = onnx.ModelProto()
        proto.CopyFrom(original)
        for name, arrays in kernels.items():
            node = proto.graph.node[self._order[self.nodes[name].output[0]]]
            names = [f"{name}/replaced.{part}" for part in ("weight", "bias")]
            weight, bias = arrays
            if node.op_type in PRODUCTS:
                weight = weight[:, :, 0, 0]
                node.CopyFrom(helper.make_node("Gemm", node.input, node.output, node.name, transB=1))
            node.input[:] = [node.input[0], *names]
            proto.graph.initializer.extend(
                numpy_helper.from_array(np.ascontiguousarray(a, self._layer[name].weight.dtype), n)
                for a, n in zip((weight, bias), names, strict=True)
            )
        return proto

    def observe(
        self, images: Array, positions: Positions, with_patches: bool = True
    ) -> Iterator[Observation]:
        """Yield, batch by batch, what the layers named in ``positions`` produce, and see if it is wanted."""
        if not positions:
            return
        tensors = list(
            dict.fromkeys(
                t
                for name in positions
                for t in (self.nodes[name].input[0], self.nodes[name].output[0], self.shortcut(name))
                if t
            )
        )
        fetched = [t for t in tensors if t != self.model.input_name]
        session = self._opened(up_to(self._proto, fetched))
        held = sum(
            4
            * (la.geometry.n_i * la.size[0] * la.size[1] + 2 * la.geometry.n_o * int(np.prod(la.output_size)))
            for la in self.layers
            if la.geometry and la.name in positions
        )
        for batch in self.batches(len(images), held):
            feeds = {self.model.input_name: self.padded(images, batch)}
            values = feeds | dict(zip(fetched, run(session, fetched, feeds), strict=True))
            for name, where in positions.items():
                node, added = self.nodes[name], self.shortcut(name)
                shortcut = pick(values[added], where[batch]) if added else None
                outputs = pick(values[node.output[0]], where[batch])
                yield self._observation(name, batch, values[node.input[0]], where, outputs, shortcut)

    def _observation(
        self,
        name: str,
        batch: slice,
        x: Array,
        where: NDArray[np.int64],
        outputs: Array,
        shortcut: Array | None,
    ) -> Observation:
        geometry = self._layer[name].geometry
        assert geometry is not None
        maps = x.reshape(*x.shape, 1, 1) if x.ndim == 2 else x  # what a fully connected layer sees are rows
        return Observation(
            name,
            batch,
            lambda: single(geometry.patches(maps, where[batch])),
            single(outputs),
            None if shortcut is None else single(shortcut),
        )

    def shortcut(self, name: str) -> str | None:
        """The tensor added to this layer's output by an Add, if it is known before the layer runs.

        Additions that broadcast (a bias map, a gate) are no residual branches.
        """
        output = self.nodes[name].output[0]
        readers = self._readers.get(output, [])
        if len(readers) != 1 or readers[0].op_type != "Add" or output in self._outputs:
            return None
        other = next(t for t in readers[0].input if t != output)
        before = self._order.get(other, len(self._order)) < self._order[output]
        return other if before and self._shapes[other] == self._shapes[output] else None

    @cached_property
    def _readers(self) -> dict[str, list[onnx.NodeProto]]:
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.proto.graph.node:
            for tensor in reads(node):
                readers.setdefault(tensor, []).append(node)
        return readers

    @cached_property
    def _outputs(self) -> set[str]:
        return {value.name for value in self.model.proto.graph.output}

    @cached_property
    def _constants(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.model.proto.graph.initializer}

    def recipe(self) -> Callable[[], OnnxNetwork]:
        """Make the same network in another process.

        Raises:
            ModelError: it is too large to be sent.
        """
        if size_of(self.model.proto) >= PROTOBUF_LIMIT:
            raise ModelError(f"{self.model.origin}: models above 2 GB are not sent to workers; run without")
        return partial(OnnxNetwork, self.model, self._sample, self.resources.elsewhere)

    def walk(self, images: Array, scratch: Path | None = None) -> OnnxWalk:
        """Start at the network's input, ready to be decoupled layer by layer."""
        return OnnxWalk(self, images, scratch)

    def decoupled(
        self,
        factorizations: Mapping[str, Factorization],
        forms: Mapping[str, Form] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> onnx.ModelProto:
        """Write the network anew with some layers as chains of stages; the rest computes what it did.

        ``forms`` says how each is written; those it does not name are "parallel". Fused operators come with
        functions for runtimes that do not know them.
        """
        return self.pruned(factorizations, forms, metadata)[0]

    def pruned(
        self,
        factorizations: Mapping[str, Factorization],
        forms: Mapping[str, Form] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[onnx.ModelProto, dict[str, tuple[int, int]]]:
        """Do as `decoupled`, and tell which convolutions lost filters that nobody reads any more.

        They are told by their output: how many filters each has kept, of how many.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        by_output = {self.nodes[name].output[0]: name for name in factorizations}
        nodes: list[onnx.NodeProto] = []
        for node in proto.graph.node:
            name = by_output.get(node.output[0])
            if name is None:
                nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
                continue
            form = (forms or {}).get(name, "parallel")
            dtype = self._layer[name].weight.dtype
            new, constants = emit(
                factorizations[name], name, node.input[0], node.output[0], form, node.op_type, dtype
            )
            nodes += new
            proto.graph.initializer.extend(constants)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        if any(node.domain == DOMAIN for node in nodes):
            if all(entry.domain != DOMAIN for entry in proto.opset_import):
                proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
            absorb(proto.graph, self._shapes)
        dropped = drop_unread_channels(proto, self._shapes)
        _drop_unused(proto.graph)
        add_fallbacks(proto)
        for key, value in (metadata or {}).items():
            _set_metadata(proto, key, value)
        return proto, dropped


class OnnxWalk:
    """The network cut between two layers, with every live tensor of every batch held at the cut.

    Walking on runs each node once more, so a network of any depth costs one forward pass (DESIGN §4).
    """

    def __init__(self, network: OnnxNetwork, images: Array, scratch: Path | None = None) -> None:
        self._network = network
        self._count = len(images)
        self._batches = network.batches(len(images))
        self._nodes = [
            onnx.NodeProto.FromString(n.SerializeToString()) for n in network.model.proto.graph.node
        ]
        self._constants = dict(network._constants)
        self._at = 0
        self._live = [network.model.input_name]
        self._store = ArrayStore(network.resources.store_bytes, scratch)
        for index, batch in enumerate(self._batches):
            self._store[index, network.model.input_name] = network.padded(images, batch)

    def observe(self, layer: str, positions: NDArray[np.int64]) -> Iterator[Observation]:
        """Advance to ``layer`` and yield what it sees in the network as decoupled so far."""
        network = self._network
        node, added = network.nodes[layer], network.shortcut(layer)
        self.advance(layer)
        for index, batch in enumerate(self._batches):
            shortcut = pick(self._store[index, added], positions[batch]) if added else None
            nothing = np.zeros((0, 0), np.float32)
            yield network._observation(
                layer, batch, self._store[index, node.input[0]], positions, nothing, shortcut
            )

    def advance(self, layer: str) -> None:
        """Go as far as ``layer``. Numbers are what they are because of where the network was cut before."""
        output = self._network.nodes[layer].output[0]
        self._advance(next(i for i, n in enumerate(self._nodes) if n.output[0] == output))

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Put a factorization in the place of ``layer``."""
        node = self._nodes[self._at]
        assert node.output[0] == self._network.nodes[layer].output[0], "the walk is not at this layer"
        dtype = self._network._layer[layer].weight.dtype
        nodes, constants = emit(
            factorization, layer, node.input[0], node.output[0], operator=node.op_type, dtype=dtype
        )
        self._nodes[self._at : self._at + 1] = nodes
        self._constants |= {tensor.name: tensor for tensor in constants}

    def outputs(self) -> list[Array]:
        """Run to the end and return the network's outputs on every image."""
        self._advance(len(self._nodes))
        told = self._network.told
        constants = {name: numpy_helper.to_array(t) for name, t in self._constants.items() if name in told}
        parts = [
            [constants[name] if name in constants else self._store[i, name] for name in told]
            for i in range(len(self._batches))
        ]
        return self._network.joined(parts, self._count)

    def _advance(self, target: int) -> None:
        nodes = self._nodes[self._at : target]
        wanted = {t for n in self._nodes[target:] for t in reads(n)} | self._network._outputs
        read = {t for n in nodes for t in reads(n)}
        fed = [t for t in self._live if t in read]
        made = [t for n in nodes for t in n.output if t in wanted]
        session = open_session(self._segment(nodes, fed, made)) if made else None
        for index in range(len(self._batches)):
            if session is not None:
                values = run(session, made, {t: self._store[index, t] for t in fed})
                for name, value in zip(made, values, strict=True):
                    if not isinstance(value, np.ndarray):
                        raise ModelError(
                            f"{self._network.model.origin}: {name!r}, needed on both sides of a layer, is a "
                            "sequence of tensors; export without it, or --exclude the layers between"
                        )
                    self._store[index, name] = value
            for name in self._live:
                if name not in wanted:
                    self._store.pop((index, name))
        self._live, self._at = [t for t in self._live if t in wanted] + made, target

    def _segment(
        self, nodes: Sequence[onnx.NodeProto], fed: Sequence[str], outputs: Sequence[str]
    ) -> onnx.ModelProto:
        used = {t for n in nodes for t in reads(n)}
        inputs = []
        for name in fed:
            value = self._store[0, name]
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, [None] * value.ndim))
        original = self._network.model.proto
        graph = helper.make_graph(
            nodes,
            "segment",
            inputs,
            [onnx.ValueInfoProto(name=t) for t in outputs],
            [self._constants[t] for t in sorted(used) if t in self._constants],
        )
        return helper.make_model(
            graph,
            opset_imports=original.opset_import,
            ir_version=original.ir_version,
            functions=original.functions,
        )


def single(values: Array) -> Array:
    """What float16 networks make, in float32, so that sums of it are none of float16."""
    return values.astype(np.float32) if values.dtype == np.float16 else values


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


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {t for node in graph.node for t in reads(node)} | {value.name for value in graph.output}
    for index in reversed(range(len(graph.initializer))):  # no copies: those that stay may be large
        if graph.initializer[index].name not in used:
            del graph.initializer[index]


def _set_metadata(proto: onnx.ModelProto, key: str, value: str) -> None:
    entry: Any = next((e for e in proto.metadata_props if e.key == key), None) or proto.metadata_props.add()
    entry.key, entry.value = key, value
