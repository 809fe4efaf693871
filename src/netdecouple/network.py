"""What the engine asks of a framework: a network it can look into, walk through, and rebuild.

A frontend finds convolutions, moves activations and puts stages back. It does no linear algebra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from netdecouple.convolution import ConvGeometry, Factorization
from netdecouple.errors import ModelError

Array = NDArray[np.floating]
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
    methods: tuple[str, ...] = ()  # the only ones that make sense for it; empty if all do

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
    look: Callable[[], Array]  # gathers the patches, which not everyone wants
    outputs: Array  # (images · positions, n_o): what the layer produced
    shortcut: Array | None  # (images · positions, n_o): what is added to a residual branch's last layer

    def __post_init__(self) -> None:
        self._check(self.outputs)

    @cached_property
    def patches(self) -> Array:
        """What the layer saw: (images · positions, groups, n_i / groups · kh · kw).

        Raises:
            ModelError: NaN or Inf; of what the layer made, that is told at once.
        """
        seen = self.look()
        self._check(seen)
        return seen

    def _check(self, values: Array) -> None:
        if not np.isfinite(values).all():
            raise ModelError(
                f"NaN or Inf in the activations of layer {self.layer!r}; check the preprocessing"
            )


class Walk(Protocol):
    """The decoupled network in the making, run up to one layer after the other."""

    def observe(self, layer: str, positions: NDArray[np.int64]) -> Iterator[Observation]:
        """Advance to ``layer`` and yield what it sees in the network as decoupled so far.

        ``outputs`` is empty there: the layer has not run yet.
        """
        ...

    def advance(self, layer: str) -> None:
        """Go as far as ``layer``, without a look at it."""
        ...

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Put a factorization in the place of ``layer``, before the walk goes past it."""
        ...


class Network(Protocol):
    """A pretrained network, opened."""

    @property
    def fingerprint(self) -> str:
        """Hash of its operators and weights, before anything was done to it."""
        ...

    @property
    def layers(self) -> Sequence[Layer]:
        """Every layer that costs MACs, in the order they run."""
        ...

    def run(self, images: Images, kernels: Mapping[str, tuple[Array, Array]] | None = None) -> list[Array]:
        """Return the network's outputs, with some layers' weight and bias replaced."""
        ...

    def observe(
        self, images: Images, positions: Positions, with_patches: bool = True
    ) -> Iterator[Observation]:
        """Yield, batch by batch, what the layers named in ``positions`` produce, and see if it is wanted."""
        ...

    def recipe(self) -> Callable[[], Network]:
        """Make the same network in another process; to be pickled.

        Raises:
            ModelError: it cannot be sent there.
        """
        ...

    def walk(self, images: Images, scratch: Path | None = None) -> Walk:
        """Start at the network's input, ready to be decoupled layer by layer.

        What memory does not hold goes to ``scratch``, or where temporary files go.
        """
        ...
