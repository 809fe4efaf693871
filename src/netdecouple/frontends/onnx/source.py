"""An ONNX model that was read, and how inputs for it are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from netdecouple import kernels, runtimes
from netdecouple.data import calibration
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import CalibrationError, ModelError
from netdecouple.execution.memory import Memory
from netdecouple.execution.progress import Progress, quiet
from netdecouple.frontends.onnx.emission import form_of
from netdecouple.frontends.onnx.model import ModelSource, load, read_model, write_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.timing import OnnxTimer
from netdecouple.network import Array, Calibration, Executable
from netdecouple.runtimes import onnxfile
from netdecouple.runtimes.feeds import describe_shape
from netdecouple.runtimes.onnxfile import size_of


class OnnxSource:
    """See `network.Source`.

    Raises:
        ModelError: the model cannot be read, or has nothing to decouple.
    """

    framework = "onnxruntime"
    runtimes: tuple[str, ...] = ("onnxruntime",)
    suffix = ".onnx"

    def __init__(
        self, model: ModelSource, constants: Mapping[str, Any] = {}, custom_ops: Sequence[str] = ()
    ) -> None:
        self.origin = model
        self.model = read_model(model, custom_ops).with_constants(constants)
        self.name = self.model.origin
        self.preprocessing = Preprocessing()
        self.constants = constants
        self.files: Sequence[Path] = () if isinstance(model, onnx.ModelProto) else onnxfile.files_of(model)

    @property
    def left_out(self) -> str:
        """The nodes that no output needs; empty if there are none."""
        names = self.model.unread
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more}: no output needs this" if names else ""

    @property
    def nbytes(self) -> int:
        """Bytes of the model in memory."""
        return size_of(self.model.proto)

    @property
    def plan_text(self) -> str | None:
        """The plan, as JSON, in the model's metadata."""
        return {e.key: e.value for e in load(self.origin)[0].metadata_props}.get("netdecouple.plan")

    @property
    def about(self) -> Mapping[str, str]:
        """The values of inputs besides the images."""
        return {name: f"{a.dtype} {a.tolist()}" for name, a in self.model.given.items()}

    def session(self) -> AbstractContextManager[object]:
        """No context is needed."""
        return nullcontext()

    def check_form(self, form: str) -> None:
        """Refuse the fused operator for models that are not of float32."""
        if form != "fused":
            return
        if self.model.dtype != np.float32:
            raise ModelError(
                f"{self.name}: emit='fused' is for float32 models, this one is {self.model.dtype}"
            )
        kernels.usable()

    def fastest_form(self, runtime: str | None) -> str:
        """The fused operator, where it was built, for float32 models in ONNX Runtime."""
        can = runtime in (None, "onnxruntime") and self.model.dtype == np.float32 and kernels.usable()
        return "fused" if can else "standard"

    def _shape(self, preprocessing: Preprocessing | None) -> dict[str, Any]:
        preprocessing = preprocessing or self.preprocessing
        m = self.model
        axes = {"channels": m.channels, "size": m.size, "channels_last": m.channels_last}
        return {**axes, "preprocessing": preprocessing, "is_free": not m.channels}

    def calibration(
        self, calib: Any, preprocessing: Preprocessing | None, samples: int | None, seed: int
    ) -> Calibration:
        """Load images; None makes noise of the right shape.

        A mapping, or FILE.npz with one array per input, also has the values of the other inputs.
        """
        calib = self._images(calib)
        shape = self._shape(preprocessing)
        if calib is None:
            axes = self._sizes(shape["preprocessing"])
            images = np.random.default_rng(seed).standard_normal((10, *axes)).astype(np.float32)
            return Calibration(inputs=images, origin=calibration.NOISE, nbytes=images.nbytes, is_noise=True)
        loaded = calibration.load(calib, **shape, samples=samples, seed=seed)
        self._check_shape(loaded.images, loaded.origin)
        return Calibration(
            inputs=loaded.images, origin=loaded.origin, nbytes=loaded.images.nbytes, skipped=loaded.skipped
        )

    def _sizes(self, preprocessing: Preprocessing) -> tuple[int, ...]:
        """Return the shape of one input."""
        m, size = self.model, self.model.size or preprocessing.size
        if m.channels and size is not None:
            return (*size, m.channels) if m.channels_last else (m.channels, *size)
        if m.channels:
            raise CalibrationError(f"{self.name} takes images of any size; say which with input_size=")
        known = tuple(n for n in m.shape if n is not None)
        if known != m.shape:
            sizes = describe_shape((None, *m.shape))
            raise CalibrationError(f"{self.name} takes inputs {sizes}, of any size; give some with calib=")
        return known

    def _check_shape(self, samples: Array, origin: str) -> None:
        """Refuse samples that are no images and of another shape than the model's."""
        given, wanted = samples.shape[1:], self.model.shape
        fits = len(given) == len(wanted) and all(n in (None, m) for m, n in zip(given, wanted, strict=True))
        if not (self.model.channels or fits):
            raise CalibrationError(
                f"{origin}: samples of {describe_shape(given)}; {self.name} takes {describe_shape(wanted)}"
            )

    def _images(self, calib: Any) -> Any:
        """Take the other inputs' values, which ``constants`` override, out of what is given as inputs."""
        others, name = [other.name for other in self.model.others], self.model.input_name
        values: Mapping[str, Any] = {}
        if isinstance(calib, str | os.PathLike) and others:
            values = calibration.named(calib, [name, *others])
            is_whole = name in values and os.path.exists(calib)  # no key was given
            calib = f"{os.fspath(calib)}:{name}" if is_whole else calib
        elif isinstance(calib, Mapping):
            if name not in calib:
                raise CalibrationError(
                    f"there are no images {name!r} in the mapping; give one array per input"
                )
            values, calib = calib, calib[name]
        values = {n: value for n, value in values.items() if n != name and n not in self.constants}
        self.model = self.model.with_constants(values)
        return calib

    def labelled(self, labels: Any, preprocessing: Preprocessing | None) -> tuple[Array, NDArray[Any]]:
        """Load images and their class labels, or the images that the network should return."""
        shape = self._shape(preprocessing)
        if not isinstance(labels, tuple):
            self._images(labels)
            images, right = calibration.load_labelled(labels, **shape)
            self._check_shape(images, str(labels))
            return images, right
        loaded = calibration.load(labels[0], **shape, samples=None, seed=0)
        self._check_shape(loaded.images, loaded.origin)
        return loaded.images, calibration.answers(labels[1], len(loaded.images))

    def open(self, inputs: Array, memory: Memory) -> OnnxNetwork:
        """Open the network for such images; ModelError if it is random."""
        network = OnnxNetwork(self.model, inputs, memory)
        network.check_repeatable()
        return network

    def timer(self, network: OnnxNetwork, runtime: str, threads: int, forms: Sequence[str]) -> OnnxTimer:
        """Measure layers and networks in ONNX Runtime or OpenVINO."""
        opened = runtimes.runtime(runtime, custom_ops=self.model.custom_ops)
        return OnnxTimer(network, opened, threads, tuple(map(form_of, forms)))

    def outputs(self, inputs: Array, progress: Progress = quiet) -> list[Array]:
        """Run the network as it was read."""
        return OnnxNetwork(self.model, inputs).run(inputs, progress=progress)

    def executable(self, model: Any, example: Array, runtime: str) -> Executable:
        """A path or a ModelProto is opened as it is, but without what no output needs."""
        original = self.model.proto if self.model.unread else self.origin
        feeds = self.model.feeds(example) if self.model.others else None
        given = original if model is None else model
        return Executable(given, example.shape, feeds, self.model.custom_ops)

    def save(self, result: Any, path: str | os.PathLike[str]) -> None:
        """Write an .onnx file."""
        write_model(result.model, path)


def open_for_shapes(
    model: ModelSource,
    shapes: Sequence[tuple[int, ...]],
    feeds: Mapping[str, Any] | None = None,
    custom_ops: Sequence[str] = (),
) -> OnnxNetwork:
    """Open a model for images of some shape, to count its MACs and to list its layers.

    ``feeds`` have the values of its other inputs; ``custom_ops`` are libraries of operators that it uses.
    """
    read = read_model(model, custom_ops)
    known = {other.name: feeds[other.name] for other in read.others if feeds and other.name in feeds}
    read = read.with_constants(known)
    images = next((shape for shape in shapes if len(shape) == 4), shapes[0])
    return OnnxNetwork(read, np.zeros((read.batch or 2, *images[1:]), np.float32))
