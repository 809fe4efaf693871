"""An ONNX network that is run, observed, and written again with factorized layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError, OutputError
from netdecouple.execution.memory import ArrayStore, Memory
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.scratch import Scratch
from netdecouple.frontends.batches import batch_slices, squeezed
from netdecouple.frontends.onnx.emission import form_of
from netdecouple.frontends.onnx.fused import absorb, add_fallbacks
from netdecouple.frontends.onnx.layers import find_layers
from netdecouple.frontends.onnx.model import OnnxModel
from netdecouple.frontends.onnx.products import is_known
from netdecouple.frontends.onnx.proto import (
    Nodes,
    Tensors,
    names_of,
    nodes_for,
    nodes_of,
    readers_of,
    reads,
    replace_nodes,
    up_to,
)
from netdecouple.frontends.onnx.pruning import drop_unread_channels
from netdecouple.frontends.onnx.walk import LayerNode, OnnxWalk, single
from netdecouple.network import ONE_BY_ONE, Array, Layer, Observation, Positions, Trainable
from netdecouple.runtimes import onnxfile
from netdecouple.runtimes.layers import node_name
from netdecouple.runtimes.onnxfile import copy_of, is_large, size_of, with_graph
from netdecouple.runtimes.onnxruntime import open_session, run
from netdecouple.runtimes.protocol import Feeds

TOLERANCE = 1e-3  # relative difference between a built network and its plan's arithmetic
HALF_TOLERANCE = 3e-2  # the same where numbers between the stages are rounded to float16
SMALL = 1 << 12  # bytes: smaller weights stay in the model
PAGE = 1 << 12  # bytes: weights begin at multiples of it, so that they can be mapped into memory
WEIGHTS = "weights"
SIZES = (
    *(28, 32, 48, 56, 64, 96, 112, 128, 144, 160, 192, 224, 227, 240, 256, 260, 288, 299, 300, 320),
    *(331, 336, 352, 380, 384, 416, 448, 456, 480, 512, 528, 576, 600, 608, 640),
)  # of images, height and width, that networks are made for


class OnnxNetwork:
    """A pretrained ONNX network, with the shapes that it has for images of one size.

    ``sample`` (n, …) is run once to find every layer's shapes. The model is not changed.

    Raises:
        ModelError: the network fails on the sample, or its weights or tensors cannot be used. If it runs on
            images of another size only, the message says which.
    """

    def __init__(self, model: OnnxModel, sample: Array, memory: Memory = Memory()) -> None:
        onnxfile.check_sizes(model.proto, model.origin, model.input_name, sample)
        self.model, self.memory = _as_it_runs(model, sample), memory
        self.notes: tuple[str, ...] = (ONE_BY_ONE,) if self.model.batch != model.batch else ()
        model = self.model
        # two images at least, so that what is the same for all images does not look like one of them
        self._sample = self.padded(sample, slice(0, model.batch or 2))
        self.layers, nodes, self._shapes, mixed = find_layers(model, self._sample)
        self._order = {output: i for i, node in enumerate(model.proto.graph.node) for output in node.output}
        self.name, self.fingerprint = model.origin, model.fingerprint
        self.norms: Mapping[str, str] = {}  # BatchNorms were folded when the model was read
        self.example: Any = self._sample[: model.batch or 1]
        halves = any(layer.weight.dtype == np.float16 for layer in self.layers)
        self.tolerance = HALF_TOLERANCE if halves else TOLERANCE
        self._readers = readers_of(model.proto.graph.node)
        taken = names_of(model.proto.graph)
        self.places = {
            la.name: LayerNode(
                layer=la,
                input=node.input[0],
                output=node.output[0],
                shortcut=self._shortcut(node.output[0]),
                taken=taken,
                mixed=node.input[0] in mixed,
            )
            for la, node in zip(self.layers, nodes, strict=True)
        }

    def _runnable(self, proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Callable[[onnx.ModelProto], Any]]:
        """Return a model of which others are made to be run, and the function that opens them.

        Where copies of its weights would take too much memory, they are in a file.
        """
        if self.memory.limit is None and not is_large(self.model.proto):
            return proto, self.model.session
        external = ExternalWeights(proto, self.memory.scratch, self.model.session)
        return external.proto, external.opened

    @cached_property
    def _base(self) -> tuple[onnx.ModelProto, Callable[[onnx.ModelProto], Any]]:
        return self._runnable(self.model.proto)

    def layers_of(
        self, model: onnx.ModelProto, factorizations: Mapping[str, Factorization] = {}
    ) -> tuple[Layer, ...]:
        """List the layers of another model that was made of this one."""
        return find_layers(replace(self.model, proto=model), self._sample).layers

    def batches(self, count: int, bytes_per_image: int = 0) -> list[slice]:
        """Cut ``count`` images into batches that fit in memory, or have the network's fixed size."""
        limit, fixed = self.memory.batch_bytes, self.model.batch
        return batch_slices(count, self.layers, limit, bytes_per_image, fixed)

    def padded(self, images: Array, batch: slice) -> Array:
        """Take a batch of images in the network's type; a fixed batch is filled up with the last image."""
        taken = images[batch]
        missing = (self.model.batch or len(taken)) - len(taken)
        whole = np.concatenate([taken, taken[-1:].repeat(missing, axis=0)]) if missing else taken
        with np.errstate(over="ignore"):  # an observation refuses infinite values and names the layer
            return whole.astype(self.model.dtype, copy=False)

    def check_repeatable(self) -> None:
        """Run a sample twice; ModelError, which names the operator, if the outputs differ."""
        feeds, proto = self.model.feeds(self._sample), self.model.proto

        def unlike(names: Sequence[str]) -> set[str]:
            session = self.model.session(up_to(proto, names))
            once, again = (run(session, names, feeds) for _ in range(2))
            return {name for name, *both in zip(names, once, again, strict=True) if not _same(*both)}

        if unlike(self.output_names):
            nodes = nodes_for(proto.graph.node, self.output_names)[0]
            random = unlike([output for node in nodes for output in node.output if output])
            firsts = (n for n in nodes if random & {*n.output} and not random & {*reads(n)})
            name = next((f"{n.op_type} {node_name(n)!r}" for n in firsts), "one of its operators")
            raise ModelError(
                f"{self.name}: {name} is random, and the outputs differ when it runs twice on one input; "
                "export the model for inference, or with a constant in its place"
            )

    @cached_property
    def output_names(self) -> list[str]:
        """The outputs that can be compared, which are numbers; raise ModelError if there are none."""
        kinds = {value.name: value.type for value in self.model.proto.graph.output}
        numeric = [
            name
            for name, kind in kinds.items()
            if kind.HasField("tensor_type") and kind.tensor_type.elem_type != onnx.TensorProto.STRING
        ]
        if not numeric:
            raise ModelError(f"{self.model.origin}: none of its outputs ({', '.join(kinds)}) are numbers")
        return numeric

    def run(
        self,
        images: Array,
        kernels: Mapping[str, tuple[Array, Array]] | None = None,
        progress: Progress = quiet,
    ) -> list[Array]:
        """Return every output for some images, with some layers' weight and bias replaced."""
        proto, opened = self._base
        # opened within the call, so that the copy with other kernels is freed before it runs
        replaced = {name: self.places[name].whole(*arrays) for name, arrays in (kernels or {}).items()}
        session = opened(self._with_stages(proto, replaced) if replaced else proto)
        return self._run(session, images, progress)

    def run_built(self, model: onnx.ModelProto, images: Array) -> list[Array]:
        """Return every output of another model with this one's input and outputs."""
        proto, opened = self._runnable(model)
        return self._run(opened(proto), images)

    def _run(self, session: Any, images: Array, progress: Progress = quiet) -> list[Array]:
        batches, parts = self.batches(len(images)), []
        for batch in batches:
            parts.append(run(session, self.output_names, self.model.feeds(self.padded(images, batch))))
            progress("Running", batch.stop, len(images))
        sizes = [self.model.batch or batch.stop - batch.start for batch in batches]
        joined = (single(_joined(part, sizes, len(images))) for part in zip(*parts, strict=True))
        return [squeezed(output) for output in joined]

    def _with_stages(
        self,
        proto: onnx.ModelProto,
        factorizations: Mapping[str, Factorization],
        forms: Mapping[str, str] = {},
    ) -> onnx.ModelProto:
        """Copy a model with some layers as chains of stages."""
        proto = copy_of(proto)
        names = {self.places[name].output: name for name in factorizations}

        def stages(node: onnx.NodeProto) -> tuple[Nodes, Tensors] | None:
            name = names.get(node.output[0])
            if name is None:
                return None
            return self.places[name].emit(factorizations[name], form_of(forms.get(name, "parallel")))

        replace_nodes(proto.graph, stages)
        return proto

    def observe(
        self, images: Array, positions: Positions, with_patches: bool = True
    ) -> Iterator[Observation]:
        """Yield, batch by batch, what the layers named in ``positions`` read and write."""
        if not positions:
            return
        places = [self.places[name] for name in positions]
        tensors = dict.fromkeys(t for p in places for t in (p.input, p.output, p.shortcut) if t)
        fetched = [t for t in tensors if t not in (self.model.input_name, *self.model.given)]
        proto, opened = self._base
        session = opened(up_to(proto, fetched))
        held = 4 * sum(
            la.geometry.n_i * math.prod(la.size) + 2 * la.geometry.n_o * math.prod(la.output_size)
            for la in (place.layer for place in places)
            if la.geometry
        )
        for batch in self.batches(len(images), held):
            feeds = self.model.feeds(self.padded(images, batch))
            values = feeds | dict(zip(fetched, run(session, fetched, feeds), strict=True))
            for place, where in zip(places, positions.values(), strict=True):
                yield place.observation(batch, where, values.__getitem__, has_run=True)

    def _shortcut(self, output: str) -> str | None:
        """The tensor that an Add adds to a layer's output, if it is known before the layer runs.

        Additions that broadcast (a bias map, a gate) are no residual branches.
        """
        readers = self._readers.get(output, [])
        is_result = any(value.name == output for value in self.model.proto.graph.output)
        if len(readers) != 1 or readers[0].op_type != "Add" or is_result:
            return None
        other = next(t for t in readers[0].input if t != output)
        before = self._order.get(other, len(self._order)) < self._order[output]
        return other if before and self._shapes[other] == self._shapes[output] else None

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
        return OnnxWalk(self.model, self.places, inputs, store)

    def trainable(self, factorizations: Mapping[str, Factorization]) -> Trainable:
        """Return the network with some layers as chains of stages, for PyTorch to train.

        Raises:
            ModelError: it is not float32.
        """
        from netdecouple.frontends.onnx.training import OnnxTrainable  # needs PyTorch

        return OnnxTrainable(self, factorizations)

    @property
    def counts_everything(self) -> bool:
        """Whether all its operators are known, so that no MACs are missing from the layers'."""
        return all(map(is_known, nodes_of(self.model.proto.graph)))

    def size_of(self, model: onnx.ModelProto | None = None) -> int:
        """Bytes of a model; of the original as it was read, external data included."""
        return self.model.bytes if model is None else size_of(model)

    def pictures(self, images: Array) -> list[Array]:
        """Return the inputs if they are pictures."""
        return list(self.model.channels_first(images)) if self.model.channels else []

    def close(self) -> None:
        """Nothing to end."""

    def build(
        self,
        factorizations: Mapping[str, Factorization],
        forms: Mapping[str, str] = {},
        metadata: Mapping[str, str] = {},
    ) -> onnx.ModelProto:
        """Write the network with some layers as chains of stages, without the channels that nothing reads.

        ``forms`` say how each is written, "parallel" by default. Fused operators come with functions for
        runtimes that do not know them. ``metadata`` are added to the model's.
        """
        proto = self._with_stages(self.model.proto, factorizations, forms)
        absorb(proto.graph, self._shapes)
        drop_unread_channels(proto, self._shapes)
        add_fallbacks(proto)
        entries = {entry.key: entry.value for entry in proto.metadata_props}
        helper.set_model_props(proto, {**entries, **metadata})
        return proto


def _as_it_runs(model: OnnxModel, sample: Array) -> OnnxModel:
    """Return a model with an open batch with a batch of one, if it fails on two images or makes them one.

    Shapes like (1, -1) are in networks whose input has an open batch all the same.

    Raises:
        ModelError: it fails on images of this size, and runs on those of another.
    """
    if model.batch is not None and model.has_fixed_size:
        return model
    chosen = np.minimum(np.arange(model.batch or 2), len(sample) - 1)
    with np.errstate(over="ignore"):
        images = sample[chosen].astype(model.dtype)
    session = model.session(model.proto)
    together = _outputs(session, model.feeds(images))
    if together is not None and (model.batch or all(np.shape(output)[:1] != (1,) for output in together)):
        return model
    alone = None if model.batch else _outputs(session, model.feeds(images[:1]))
    if alone is None:
        _check_size(model, session, images[: model.batch or 1])
        return model
    pairs = zip(together or (), alone, strict=False)
    is_alone = together is None or any(
        np.shape(one)[:1] == np.shape(two)[:1] == (1,) and np.size(two) == 2 * np.size(one)
        for two, one in pairs
    )
    return replace(model, batch=1) if is_alone else model


def _outputs(session: Any, feeds: Feeds) -> list[Any] | None:
    """Return a session's outputs; None if it fails."""
    try:
        return run(session, None, feeds)
    except ModelError:
        return None


def _check_size(model: OnnxModel, session: Any, images: Array) -> None:
    """Raise ModelError if a network that fails on images runs on those of another size."""
    is_sized = model.size is not None or not model.channels
    if is_sized or _outputs(session, model.feeds(np.zeros_like(images))) is not None:
        return
    n, c, height, width = model.channels_first(images).shape
    for size in SIZES:
        shape = (n, size, size, c) if model.channels_last else (n, c, size, size)
        if _outputs(session, model.feeds(np.zeros(shape, images.dtype))) is not None:
            raise ModelError(
                f"{model.origin}: fails on images of {height}x{width}, and runs on those of {size}x{size}; "
                f"give input_size={size}, or arrays of that size"
            )


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


def _same(a: Any, b: Any) -> bool:
    """Whether two arrays of numbers are equal but for rounding."""
    if not isinstance(a, np.ndarray) or a.dtype.kind not in "biuf":
        return True
    size = np.abs(np.nan_to_num(a.astype(np.float64), posinf=0, neginf=0)).max(initial=0.0)
    return a.shape == b.shape and np.allclose(a, b, 0.0, TOLERANCE * size, equal_nan=True)


def _alike(parts: Sequence[Array]) -> bool:
    """Whether they can be joined along the first axis."""
    return len({part.shape[1:] for part in parts}) == 1


class ExternalWeights:
    """A copy of a model with its large weights in a temporary file, which ONNX Runtime maps into memory.

    Raises:
        OutputError: there is no room for the weights.
    """

    def __init__(
        self, model: onnx.ModelProto, beside: Path | None, start: Callable[[Path], Any] = open_session
    ) -> None:
        graph = model.graph
        self._start = start
        self.proto = with_graph(model, graph.node, graph.input, graph.output)
        try:
            self._folder = Scratch(beside)
            with (Path(self._folder.name) / WEIGHTS).open("wb") as file:
                for tensor in graph.initializer:
                    if len(tensor.raw_data) < SMALL:
                        self.proto.graph.initializer.add().CopyFrom(tensor)
                        continue
                    file.write(bytes(-file.tell() % PAGE))
                    reference = self.proto.graph.initializer.add(
                        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
                    )
                    reference.data_location = TensorProto.EXTERNAL
                    entries = {"location": WEIGHTS, "offset": file.tell(), "length": len(tensor.raw_data)}
                    for key, value in entries.items():
                        reference.external_data.add(key=key, value=str(value))
                    file.write(numpy_helper.to_array(tensor).tobytes())
        except OSError as error:
            raise OutputError(
                f"{beside or 'the temporary folder'}: no room for the model's weights "
                f"({error.strerror or error}); make room, or name another folder with TMPDIR or work="
            ) from error

    def opened(self, proto: onnx.ModelProto) -> Any:
        """Open a model that was made of ``proto``."""
        path = Path(self._folder.name) / "model.onnx"
        onnx.save_model(proto, path)
        return self._start(path)
