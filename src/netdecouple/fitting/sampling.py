"""Which inputs are fitted to, which are held out, and which output positions of a layer are sampled."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import CalibrationError
from netdecouple.moments import Moments
from netdecouple.network import Array, Images, Layer

HELD_OUT = 5  # one input in so many is held out
ROWS = 50_000  # samples per layer at most
FLOPS = 2.7e11  # multiply-adds of a layer's moments at most, beyond 4 samples per unknown


@dataclass(frozen=True)
class Inputs:
    """Calibration inputs, shuffled once: first those that are fitted to, then those that are held out."""

    images: Images
    fitted: int
    fingerprint: str

    @classmethod
    def split(cls, images: Images, seed: int, fingerprint: str | None = None) -> Inputs:
        """Shuffle the inputs and hold out a fifth. The default ``fingerprint`` is a hash of their values.

        Raises:
            CalibrationError: there are fewer than ten inputs.
        """
        if len(images) < 10:
            raise CalibrationError(
                f"{len(images)} calibration images are too few; give a few hundred, at least 10"
            )
        if fingerprint is None:
            digest = hashlib.sha256(str(images.shape).encode())
            for image in images:
                digest.update(np.ascontiguousarray(image).tobytes())
            fingerprint = digest.hexdigest()
        order = shuffled(len(images), seed)
        return cls(images[order], len(images) - len(images) // HELD_OUT, fingerprint)

    def shard(self, part: slice) -> Inputs:
        """Return a part of the inputs, in their order."""
        images = self.images[part]
        return Inputs(images, int(np.clip(self.fitted - part.start, 0, len(images))), self.fingerprint)

    @property
    def held_out(self) -> Images:
        """The held-out inputs."""
        return self.images[self.fitted :]


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Return the index that each of the shuffled inputs had before."""
    return np.random.default_rng(seed).permutation(count)


def sample_positions(layer: Layer, images: int, seed: int) -> NDArray[np.int64]:
    """Draw p flat output positions of a layer for each image, evenly spread over the map: (images, p)."""
    assert layer.geometry is not None
    d = layer.geometry.unknowns
    pixels = math.prod(layer.output_size)
    rows = max(4 * d, min(ROWS, FLOPS / d**2 / layer.geometry.groups))
    p = min(pixels, int(np.ceil(rows / images)))
    key = int.from_bytes(hashlib.sha256(layer.name.encode()).digest()[:8], "little")
    rng = np.random.default_rng([seed, key])
    edges = np.arange(p + 1) * pixels // p
    return edges[:-1] + (rng.random((images, p)) * np.diff(edges)).astype(np.int64)


@dataclass(frozen=True)
class Split:
    """Moments of one layer on the inputs that are fitted to, and on the held-out inputs."""

    fitted: Moments
    held_out: Moments

    def absorb(self, other: Split) -> None:
        """Add the moments of other samples in place."""
        self.fitted.absorb(other.fitted)
        self.held_out.absorb(other.held_out)


class SplitMoments:
    """Adds up moments of one layer, on the inputs that are fitted to and on the held-out inputs.

    Samples are buffered until there are as many as unknowns: one product of tall matrices costs far less than
    many products of flat ones, and the buffer never takes more memory than the moments themselves.
    """

    def __init__(self, layer: Layer, inputs: Inputs) -> None:
        groups, d, m = _sizes(layer)
        self._cut = inputs.fitted
        self._unknowns = d
        self._moments = (Moments.empty(groups, d, m), Moments.empty(groups, d, m))
        self._buffers: tuple[list[tuple[Array, Array]], ...] = ([], [])

    @staticmethod
    def nbytes(layer: Layer) -> int:
        """Return the memory that a layer's moments take, with the buffer."""
        groups, d, m = _sizes(layer)
        return 2 * (8 + 4) * groups * d * (d + m)

    @staticmethod
    def fit_bytes(layer: Layer) -> int:
        """Return the peak memory of fitting a layer, with its moments: 8.5 Gram matrices, measured."""
        groups, d, m = _sizes(layer)
        return int(8.5 * 8 * groups * d * (d + m))

    @property
    def both(self) -> Split:
        """The moments of all samples so far."""
        return Split(self._flushed(0), self._flushed(1))

    def add(self, batch: slice, x: Array, y: Array) -> None:
        """Add the samples of a batch of images: patches x (n · p, groups, d) and targets y (n · p, n_o)."""
        y = y.reshape(len(x), x.shape[1], -1)
        images = batch.stop - batch.start
        cut = int(np.clip(self._cut - batch.start, 0, images)) * len(x) // images
        for side, rows in enumerate((slice(0, cut), slice(cut, len(x)))):
            # copies, because a frontend's arrays may be views, and would keep the larger arrays in memory
            self._buffers[side].append((x[rows].copy(), y[rows].copy()))
            if sum(len(samples) for samples, _ in self._buffers[side]) >= self._unknowns:
                self._flushed(side)

    def _flushed(self, side: int) -> Moments:
        buffer = self._buffers[side]
        if sum(len(samples) for samples, _ in buffer):
            self._moments[side].add(*(np.concatenate(parts) for parts in zip(*buffer, strict=True)))
        buffer.clear()
        return self._moments[side]


def _sizes(layer: Layer) -> tuple[int, int, int]:
    """Return a layer's groups, unknowns per output d, and outputs per group m."""
    g = layer.geometry
    assert g is not None
    return g.groups, g.unknowns, g.n_o // g.groups
