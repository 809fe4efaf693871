"""What the engine asks of a framework: read a network, run it, observe its layers, and rebuild it.

A frontend finds convolutions, moves activations and puts stages back. It does no linear algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from netdecouple.convolution import ConvGeometry, Factorization, Structure
from netdecouple.errors import ModelError
from netdecouple.execution.memory import Memory
from netdecouple.execution.progress import Progress, quiet

if TYPE_CHECKING:
    from netdecouple.data.preprocessing import Preprocessing

Array = NDArray[np.floating]
INPUT_SHAPE = "netdecouple.input"  # in a model's metadata: the shape of the inputs it was decoupled with
ONE_BY_ONE = "the network takes one input at a time, whatever its shapes say, and was run so"
ONE_CHANNEL = "reads a single channel"  # why a layer is kept
Positions = Mapping[str, NDArray[np.int64]]
Images = Any  # arrays (n, c, h, w), or a frontend's own samples: the engine counts, shuffles and cuts them


@dataclass(frozen=True)
class Layer:
    """One layer that costs MACs. Costs are for one image at the calibration images' size."""

    name: str
    operator: str
    macs: int
    parameters: int
    geometry: ConvGeometry | None = None  # None unless it is a 2-D convolution with constant weights
    weight: Array = field(default_factory=lambda: np.zeros(0, np.float32))  # (n_o, n_i / groups, kh, kw)
    bias: Array = field(default_factory=lambda: np.zeros(0, np.float32))  # (n_o,), zeros if it has none
    size: tuple[int, int] = (0, 0)  # h, w of its input
    reason: str = ""  # why it can never be decoupled; empty if it can
    maps: float = 1.0  # of this size that it computes for one image: more if it is called several times
    is_linear: bool = False  # a fully connected layer
    upsamples: bool = False  # a transposed convolution with a stride above 1

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of a convolution's output."""
        assert self.geometry is not None
        return self.geometry.output_size(*self.size)


@dataclass(frozen=True)
class Observation:
    """What one layer saw and produced in one batch, at sampled output positions."""

    layer: str
    images: slice
    gather: Callable[[], Array]  # makes the patches, where they are asked for
    outputs: Array  # (images · positions, n_o): what the layer produced
    shortcut: Array | None  # (images · positions, n_o): what is added to a residual branch's last layer

    def __post_init__(self) -> None:
        _check_finite(self.outputs, self.layer)

    @cached_property
    def patches(self) -> Array:
        """What the layer saw: (images · positions, groups, n_i / groups · kh · kw). Raises ModelError."""
        patches = self.gather()
        _check_finite(patches, self.layer)
        return patches


def _check_finite(activations: Array, layer: str) -> None:
    if not np.isfinite(activations).all():
        raise ModelError(f"NaN or Inf in the activations of layer {layer!r}; check the preprocessing")


class Walk(Protocol):
    """The decoupled network in the making, run up to one layer after the other."""

    def observe(self, layer: str, positions: NDArray[np.int64]) -> Iterator[Observation]:
        """Advance to ``layer`` and yield what it sees in the network as decoupled so far.

        ``outputs`` is empty there: the layer has not run yet.
        """

    def advance(self, layer: str) -> None:
        """Advance to ``layer`` without observing it."""

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Put a factorization in the place of ``layer``, before the walk goes past it."""


class Trainable(Protocol):
    """A network with some layers as chains of stages, whose weights PyTorch can train."""

    @property
    def parameters(self) -> list[Any]:
        """The weights of all stages, and the biases, as tensors."""

    def __call__(self, images: Images) -> list[Any]:
        """Run one batch; return the outputs as tensors. ModelError if an operator has no gradients."""

    def augmented(self, images: Images, change: Callable[[Array], Array]) -> Images:
        """Return images of the same kind, with pictures (n, c, h, w) changed; others stay as they are."""

    def factorizations(self) -> dict[str, Factorization]:
        """Return the changed layers with their weights as they are now."""


class Timer(Protocol):
    """Measures, in one runtime and with one number of threads, what layers and networks take."""

    name: str  # the runtime, its version and the threads: "onnxruntime 1.22.0, 1 thread"
    batch: int  # inputs per call

    @property
    def lost(self) -> float:
        """The share of the time of timing that other work on the machine took."""

    def forms(self, layer: Layer) -> tuple[str, ...]:
        """Name the forms that a decoupled layer may be written in."""

    def layer_times(self, layer: Layer, kinds: Sequence[tuple[Structure, str]]) -> list[float]:
        """Measure one layer in several structures and forms, with placeholder weights; milliseconds."""

    def network_times(self, models: Sequence[Any]) -> NDArray[np.float64]:
        """Measure whole networks: milliseconds (1 + models,), the original first."""


class Network(Protocol):
    """A pretrained network, opened for calibration inputs of some size.

    It can be pickled, unless that raises a ModelError; unpickling opens the same network in a worker process.
    """

    name: str  # for reports and messages
    fingerprint: str  # hash of its operators and weights as they were read
    layers: tuple[Layer, ...]  # every layer that costs MACs, in the order they run
    norms: Mapping[str, str]  # by layer, the BatchNorm module that is part of its numbers
    tolerance: float  # relative difference that rounding explains between a built network and its plan
    notes: tuple[str, ...]  # what a report should say of how it was run
    memory: Memory  # how much its batches and walks may take
    example: Any  # a few inputs, to time or export a network with

    def run(self, images: Images, kernels: Mapping[str, tuple[Array, Array]] | None = None) -> list[Array]:
        """Return the network's outputs, with some layers' weight and bias replaced."""

    def observe(
        self, images: Images, positions: Positions, with_patches: bool = True
    ) -> Iterator[Observation]:
        """Yield, batch by batch, outputs and, if asked for, patches of the layers in ``positions``."""

    def walk(self, images: Images) -> Walk:
        """Start a sequential refit at the network's input."""

    def build(
        self,
        factorizations: Mapping[str, Factorization],
        forms: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> Any:
        """Build a model in which some layers are chains of stages; everything else stays as it was read."""

    def trainable(self, factorizations: Mapping[str, Factorization]) -> Trainable:
        """Return the network with some layers as chains of stages, for PyTorch to train.

        Raises ModelError if this network cannot be trained.
        """

    def batches(self, count: int, bytes_per_image: int = 0) -> list[slice]:
        """Cut so many images into batches that fit in memory, or have the size that the network asks for."""

    def run_built(self, model: Any, images: Images) -> list[Array]:
        """Return the outputs of a model that `build` made."""

    def layers_of(self, model: Any, factorizations: Mapping[str, Factorization]) -> Sequence[Layer]:
        """List the layers of a model that `build` made, with what they cost now."""

    def size_of(self, model: Any = None) -> int:
        """Return the bytes of a model that `build` made, or of the original."""

    def pictures(self, images: Images) -> list[Array]:
        """Return inputs that are pictures (c, h, w); empty if they are something else."""

    def close(self) -> None:
        """End what still runs, and free memory."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Inputs to fit a network to and to measure it on."""

    inputs: Images
    origin: str  # where they come from, for reports
    nbytes: int
    fingerprint: str | None = None  # None: the hash of the array
    skipped: tuple[str, ...] = ()  # names of files that could not be read
    is_noise: bool = False  # there were none: nothing may be measured on them


@dataclass(frozen=True)
class Executable:
    """A model as a runtime opens it, and the inputs to run it with."""

    model: Any
    shape: tuple[int, ...] | None = None  # of the input, where random numbers will do
    feeds: Any = None
    custom_ops: Sequence[str] = ()  # libraries of operators for ONNX Runtime


class Source(Protocol):
    """A network that was read, and how inputs for it are loaded; nothing has been run yet."""

    name: str  # for reports and messages
    framework: str  # the package that runs it: its version is part of what a result depends on
    runtimes: tuple[str, ...]  # in which it is timed unless others are named; the first is its own
    suffix: str  # of the files that its results are written as; empty: folders
    preprocessing: Preprocessing  # of pictures, unless the user says otherwise
    files: Sequence[Path]  # that it was read from

    @property
    def about(self) -> Mapping[str, str]:
        """What a result depends on besides the network, its inputs and the settings."""

    @property
    def left_out(self) -> str:
        """Say what is no part of the network, as no output needs it; empty if there is nothing."""

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""

    @property
    def plan_text(self) -> str | None:
        """The plan, as JSON, that an earlier run wrote into it."""

    def session(self) -> AbstractContextManager[object]:
        """Return the context in which the network is opened and run."""

    def calibration(
        self, calib: Any, preprocessing: Preprocessing | None, samples: int | None, seed: int
    ) -> Calibration:
        """Load calibration inputs; None makes noise of the right shape. Raises CalibrationError."""

    def labelled(self, labels: Any, preprocessing: Preprocessing | None) -> tuple[Images, NDArray[Any]]:
        """Load inputs and class labels (N,), or the images (N, …) that the network should return.

        They are FILE.npz:INPUTS,LABELS or a pair of arrays. Raises CalibrationError.
        """

    def open(self, inputs: Images, memory: Memory) -> Network:
        """Open the network for such inputs; ModelError if it fails on them, or has nothing to decouple."""

    def timer(self, network: Any, runtime: str, threads: int, forms: Sequence[str]) -> Timer:
        """Measure layers and networks of an opened network in a runtime.

        Raises UnavailableError if it is not installed, ModelError if it cannot run this kind of network.
        """

    def outputs(self, inputs: Images, progress: Progress = quiet) -> list[Array]:
        """Run the network as it was read; ModelError if it fails on the inputs."""

    def executable(self, model: Any, example: Any, runtime: str) -> Executable:
        """Turn a model (None: the original) into what a runtime opens; ModelError if it cannot run there."""

    def check_form(self, form: str) -> None:
        """Raise a NetDecoupleError if the network cannot be written in a form."""

    def fastest_form(self, runtime: str | None) -> str:
        """Name the form (`goal.FORMS`) that is the fastest in a runtime, or in its own, if it can be had."""

    def save(self, result: Any, path: str | PathLike[str]) -> None:
        """Write a result's model, all of it or nothing.

        Raises OutputError if the place is not writable, ModelError if the model cannot be written so.
        """
