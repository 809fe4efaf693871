"""Which images are fitted on, which are held back, and which output positions of a layer are looked at."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import CalibrationError
from netdecouple.moments import Moments
from netdecouple.network import Array, Images, Layer

HELD_BACK = 5  # one image in so many is never fitted on
ROWS = 50_000  # samples per layer, where they are cheap …
FLOPS = 2.7e11  # … and the work per layer they may cost where they are not


@dataclass(frozen=True)
class Inputs:
    """Calibration images, shuffled once: those that are fitted on first, those held back last."""

    images: Images
    fitted: int
    fingerprint: str

    @classmethod
    def split(cls, images: Images, seed: int, fingerprint: str | None = None) -> Inputs:
        """Shuffle and hold back a fifth. Without a ``fingerprint`` it is the numbers' hash.

        Raises:
            CalibrationError: fewer than ten images.
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
        return cls(images[order], len(images) - len(images) // HELD_BACK, fingerprint)

    def shard(self, part: slice) -> Inputs:
        """Some of the inputs, in their order."""
        images = self.images[part]
        return Inputs(images, int(np.clip(self.fitted - part.start, 0, len(images))), self.fingerprint)

    @property
    def held_back(self) -> Images:
        return self.images[self.fitted :]


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Where every one of the shuffled images stood before."""
    return np.random.default_rng(seed).permutation(count)


def sample_positions(layer: Layer, images: int, seed: int) -> NDArray[np.int64]:
    """Draw output positions of a layer, spread evenly over each image's map: (images, p)."""
    assert layer.geometry is not None
    d = layer.geometry.unknowns
    pixels = int(np.prod(layer.output_size))
    rows = max(4 * d, min(ROWS, FLOPS / d**2 / layer.geometry.groups))
    p = min(pixels, int(np.ceil(rows / images)))
    key = int.from_bytes(hashlib.sha256(layer.name.encode()).digest()[:8], "little")
    rng = np.random.default_rng([seed, key])
    edges = np.arange(p + 1) * pixels // p
    return edges[:-1] + (rng.random((images, p)) * np.diff(edges)).astype(np.int64)


@dataclass(frozen=True)
class Split:
    """Moments of one layer, to fit on and to judge by."""

    fitted: Moments
    held_back: Moments

    def absorb(self, other: Split) -> None:
        """Add the moments of other samples in place."""
        self.fitted.absorb(other.fitted)
        self.held_back.absorb(other.held_back)


class SplitMoments:
    """Moments of one layer on the images fitted on, and on those held back.

    Samples are gathered until there are as many as unknowns: one product of tall matrices costs far
    less than many of flat ones, and what waits never takes more memory than the moments themselves.
    """

    def __init__(self, layer: Layer, inputs: Inputs) -> None:
        g = layer.geometry
        assert g is not None
        self._cut = inputs.fitted
        self._size = g.unknowns
        shape = (g.groups, self._size, g.n_o // g.groups)
        self._sides = (Moments.empty(*shape), Moments.empty(*shape))
        self._waiting: tuple[list[tuple[Array, Array]], ...] = ([], [])

    @staticmethod
    def nbytes(layer: Layer) -> int:
        """Memory that a layer's moments take, waiting samples included."""
        g = layer.geometry
        assert g is not None
        d, m = g.unknowns, g.n_o // g.groups
        return 2 * 8 * g.groups * d * (d + m) + 2 * 4 * g.groups * d * (d + m)

    @staticmethod
    def fit_bytes(layer: Layer) -> int:
        """Memory that fitting a layer takes at its worst, moments included: measured, in Gram matrices."""
        g = layer.geometry
        assert g is not None
        d, m = g.unknowns, g.n_o // g.groups
        return int(8.5 * 8 * g.groups * d * (d + m))

    @property
    def both(self) -> Split:
        """Both, together."""
        return Split(self.fitted, self.held_back)

    @property
    def fitted(self) -> Moments:
        """Moments to fit on."""
        return self._flushed(0)

    @property
    def held_back(self) -> Moments:
        """Moments that no fit has seen."""
        return self._flushed(1)

    def add(self, batch: slice, x: Array, y: Array) -> None:
        """Add a batch of images' samples, x (n · p, groups, d) and y (n · p, n_o), each to its own side."""
        y = y.reshape(len(x), x.shape[1], -1)
        images = batch.stop - batch.start
        cut = int(np.clip(self._cut - batch.start, 0, images)) * len(x) // images
        for side, rows in enumerate((slice(0, cut), slice(cut, len(x)))):
            # copies: a frontend's arrays may be parts of larger ones, which would be kept too
            self._waiting[side].append((x[rows].copy(), y[rows].copy()))
            if sum(len(waiting) for waiting, _ in self._waiting[side]) >= self._size:
                self._flushed(side)

    def _flushed(self, side: int) -> Moments:
        waiting = self._waiting[side]
        if sum(len(x) for x, _ in waiting):
            self._sides[side].add(*(np.concatenate(parts) for parts in zip(*waiting, strict=True)))
        waiting.clear()
        return self._sides[side]
