"""A PyTorch module that was given or built, and how inputs for it are loaded."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from netdecouple.data import calibration
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import CalibrationError, ModelError
from netdecouple.execution.memory import Memory
from netdecouple.execution.progress import Progress, quiet
from netdecouple.frontends.batches import squeezed
from netdecouple.frontends.onnx.model import write_model
from netdecouple.frontends.torch import folder
from netdecouple.frontends.torch.export import export, image_tensor
from netdecouple.frontends.torch.network import TorchNetwork, check, state_bytes
from netdecouple.frontends.torch.replacement import duplicate, failures
from netdecouple.frontends.torch.samples import Samples, collect, to_numpy
from netdecouple.frontends.torch.timing import TorchTimer, first_feeds
from netdecouple.frontends.torch.trace import tensors
from netdecouple.kernels import check_available, usable
from netdecouple.network import Array, Calibration, Executable

BATCH = 32  # labelled samples that are run at once


class TorchSource:
    """See `network.Source`; the arguments are those of `api.open_model`. The module given is not changed.

    Raises:
        ModelError: the module cannot be changed.
    """

    framework = "torch"
    runtimes: tuple[str, ...] = ("torch", "onnxruntime")

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        weights: str = "",
        files: Sequence[Path] = (),
        preprocessing: Preprocessing = Preprocessing(),
        device: str = "cpu",
        filter: Callable[[str, nn.Module], bool] | None = None,
        arguments: Callable[[Any], Any] | None = None,
        is_exported: bool = False,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ModelError(f"a {type(module).__name__} is no PyTorch module")
        check(module)
        decoupling: Any = getattr(module, "decoupling", None)
        if decoupling is not None and not hasattr(decoupling, "plan"):
            raise ModelError("the module has an attribute 'decoupling' of another kind; rename it")
        self.module, self.weights, self.preprocessing = module, weights, preprocessing
        self.name, self.files = name or type(module).__name__, files
        self._device, self._filter, self._arguments = device, filter, arguments
        self._is_exported = is_exported
        self.suffix = ".onnx" if is_exported else ""
        self.about: Mapping[str, str] = {"device": str(device)}

    @property
    def left_out(self) -> str:
        """Nothing: modules that are not called are not counted."""
        return ""

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and buffers."""
        return state_bytes(self.module)

    @property
    def plan_text(self) -> str | None:
        """The plan, as JSON, that the module was decoupled by."""
        decoupling: Any = getattr(self.module, "decoupling", None)
        return None if decoupling is None else decoupling.plan.to_json()

    def session(self) -> AbstractContextManager[object]:
        """Leave inference mode: tensors that are made in it could never be trained."""
        return torch.inference_mode(False)

    def check_form(self, form: str) -> None:
        """Refuse the fused operator where it was not built."""
        if form == "fused":
            check_available()

    def fastest_form(self, runtime: str | None) -> str:
        """Standard operators but in exported files; modules choose by themselves when they run."""
        return "fused" if runtime == "onnxruntime" and usable() else "standard"

    def _shape(self, preprocessing: Preprocessing | None) -> dict[str, Any]:
        first = next((m for m in self.module.modules() if isinstance(m, _ConvNd)), None)
        channels = first.in_channels if isinstance(first, nn.Conv2d) else 0
        chosen = preprocessing or self.preprocessing
        return {"channels": channels, "size": None, "preprocessing": chosen, "is_free": True}

    def calibration(
        self, calib: Any, preprocessing: Preprocessing | None, samples: int | None, seed: int
    ) -> Calibration:
        """Load samples: batches of whatever the module takes, or what ONNX models take, by name.

        None makes noise of the right shape.
        """
        shape = self._shape(preprocessing)
        batches, arguments, origin = calib, self._arguments, "batches"
        skipped: tuple[str, ...] = ()
        if calib is None:
            noise = np.random.default_rng(seed).standard_normal((10, *self._picture(shape)))
            batches, arguments, origin = noise.astype(np.float32), None, calibration.NOISE
        elif isinstance(calib, str | os.PathLike):
            origin = os.fspath(calib)
            batches, is_plain = origin, True
            if calibration.names_function(origin):
                try:
                    batches, is_plain = _peeked(calibration.call(origin))
                except CalibrationError as error:
                    raise CalibrationError(f"{origin}: {error}") from error
            elif os.path.isdir(origin):
                self._picture(shape)
            if is_plain:
                loaded = calibration.load(batches, **shape, samples=samples, seed=seed)
                batches, arguments, skipped = loaded.images, None, loaded.skipped
        collected = collect(batches, self.module, samples, arguments)
        if self._is_exported:
            export(self.module, image_tensor(collected), {})
        return Calibration(
            inputs=collected,
            origin=origin,
            nbytes=collected.nbytes,
            fingerprint=collected.fingerprint,
            skipped=skipped,
            is_noise=calib is None,
        )

    def _picture(self, shape: Mapping[str, Any]) -> tuple[int, int, int]:
        """The shape (c, h, w) of pictures that it takes."""
        if not shape["channels"]:
            raise CalibrationError(
                f"{self.name} takes no images; give calib= as FILE.npz:KEY, MODULE:FUNCTION, or batches"
            )
        size = shape["preprocessing"].size
        if size is None:
            raise CalibrationError(
                f"{self.name}: its weights do not say how large its images are; give input_size="
            )
        return shape["channels"], *size

    def labelled(self, labels: Any, preprocessing: Preprocessing | None) -> tuple[Samples, NDArray[Any]]:
        if isinstance(labels, tuple):
            inputs, classes = labels
        else:
            inputs, classes = calibration.load_labelled(labels, **self._shape(preprocessing))
        samples = collect(inputs, self.module, None, self._arguments if isinstance(labels, tuple) else None)
        return samples, calibration.answers(classes, len(samples))

    def open(self, inputs: Samples, memory: Memory) -> TorchNetwork:
        return TorchNetwork(self.module, inputs, self._device, self._filter, memory, self.name)

    def timer(self, network: TorchNetwork, runtime: str, threads: int, forms: Sequence[str]) -> TorchTimer:
        """Measure layers and networks in PyTorch, or exported in ONNX Runtime or OpenVINO."""
        return TorchTimer(network, runtime, threads, forms)

    def outputs(self, inputs: Samples, progress: Progress = quiet) -> list[Array]:
        """Run the module as it was given, in evaluation mode."""
        module = duplicate(self.module).eval()
        parts: list[list[torch.Tensor]] = []
        step = BATCH if inputs.alike else 1
        with torch.no_grad(), failures():
            for start in range(0, len(inputs), step):
                args, kwargs = inputs[start : start + step].arguments
                parts.append(list(tensors(module(*args, **kwargs))))
                progress("Running", min(start + step, len(inputs)), len(inputs))
        return [squeezed(to_numpy(torch.cat(column))) for column in zip(*parts, strict=True)]

    def executable(self, model: Any, example: Samples, runtime: str) -> Executable:
        """PyTorch runs the module itself; all others run what it is exported to."""
        module = self.module if model is None else model
        if runtime.startswith("torch"):
            return Executable(module, None, first_feeds(example))
        few = image_tensor(example)
        return Executable(export(module, few, {}), (1, *few.shape[1:]))

    def save(self, result: Any, path: str | os.PathLike[str]) -> None:
        """Write an .onnx file, or else a folder for `netdecouple.load`."""
        if Path(path).suffix == ".onnx":
            few = image_tensor(result.example)
            fused = any(row.form == "fused" for row in result.plan.layers)
            metadata = result.plan.metadata((1, *few.shape[1:]))
            write_model(export(result.model, few, metadata, fused), path)
        else:
            folder.write(result.model, result.model.decoupling, path)


def _peeked(batches: Any) -> tuple[Any, bool]:
    """Tell whether these are NumPy arrays (pictures or plain inputs), and return them complete."""
    if isinstance(batches, np.ndarray):
        return batches, True
    if isinstance(batches, torch.Tensor | Mapping) or not isinstance(batches, Iterable):
        return batches, False
    try:
        iterator = iter(batches)
        first = next(iterator)
    except StopIteration:
        raise CalibrationError("made nothing; it should make a few hundred samples") from None
    except Exception as error:
        raise CalibrationError(f"failed while it made samples ({type(error).__name__}: {error})") from error
    return chain([first], iterator) if iterator is batches else batches, isinstance(first, np.ndarray)
