"""Which inputs are fitted to, which are held out, and which output positions of a layer are sampled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import CalibrationError
from netdecouple.execution.progress import Progress, quiet
from netdecouple.moments import Moments
from netdecouple.network import Array, Images, Layer, Network

HELD_OUT = 5  # one input in so many is held out
ROWS = 50_000  # samples per layer at most
FLOPS = 1e11  # multiply-adds of a layer's moments at most, beyond 4 samples per unknown
SCALED = 128  # inputs from which a layer's `Scale` is taken
# Inputs with more than so many times the usual energy in the outputs of a layer count no more than if they
# had so many times: otherwise a few decide the fit. Of 128 crops, 5 have 97 % of the variance in the last
# hidden layer of a denoiser (DnCNN): at half the MACs it lost 3.6 dB, and loses 0.2 dB with these weights.
UNUSUAL = 4.0


@dataclass(frozen=True)
class Scale:
    """What a layer's outputs are like for most inputs.

    The energy of an input is the mean squared distance of its outputs from the mean of all.
    """

    mean: Array  # (n_o,)
    energy: float  # the inputs' median

    @classmethod
    def of(cls, means: Array, means_of_squares: Array) -> Scale:
        """Take the scale from every input's mean of its outputs (n, n_o), and of their squares."""
        mean = means.mean(axis=0)
        energies = (means_of_squares - 2 * mean * means + mean**2).sum(axis=1)
        return cls(mean, max(float(np.median(energies)), 0.0))

    def weights(self, outputs: Array, images: int) -> Array:
        """Return the weight of every row of outputs (images · p, n_o): 1 for most."""
        off = outputs - self.mean
        energies = np.square(off, out=off).reshape(images, -1, len(self.mean)).mean(axis=1).sum(axis=1)
        most = UNUSUAL * self.energy
        weights = most / np.maximum(energies, most) if most else np.ones(images)
        return np.repeat(weights, len(outputs) // images)


@dataclass(frozen=True)
class Inputs:
    """Calibration inputs, shuffled once: first those that are fitted to, then those that are held out."""

    images: Images
    fitted: int
    fingerprint: str
    scales: Mapping[str, Scale] = field(default_factory=dict)  # by layer; without one, all inputs count alike
    share: float = 1.0  # of the usual number of samples per layer

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

    def weights(self, layer: str, outputs: Array, images: int) -> Array:
        """Return the weight of every row of a layer's outputs (images · p, n_o): 1 unless it is unusual."""
        scale = self.scales.get(layer)
        return np.ones(len(outputs)) if scale is None else scale.weights(outputs, images)

    def part(self, share: float, least: int) -> Inputs:
        """Return the first of the inputs of both kinds: this share, or ``least`` if there are as many.

        So many fewer samples are taken of every layer, too.
        """
        share = min(max(share, least / len(self.images)), 1.0)
        fitted, held_out = (max(round(share * n), 1) for n in (self.fitted, len(self.held_out)))
        kept = np.r_[:fitted, self.fitted : self.fitted + held_out]
        return replace(self, images=self.images[kept], fitted=fitted, share=share)

    def positions(self, layer: Layer, seed: int, total: int | None = None) -> NDArray[np.int64]:
        """Draw positions of a layer for ``total`` inputs, or these: see `sample_positions`."""
        return sample_positions(layer, len(self.images) if total is None else total, seed, self.share)

    def shard(self, part: slice) -> Inputs:
        """Return a part of the inputs, in their order."""
        images = self.images[part]
        fitted = int(np.clip(self.fitted - part.start, 0, len(images)))
        return replace(self, images=images, fitted=fitted)

    def with_scales(self, network: Network, seed: int, progress: Progress = quiet) -> Inputs:
        """Return the same with the scale of every layer, from the first of them.

        Raises:
            ModelError: activations are NaN or Inf.
        """
        able = [la for la in network.layers if la.geometry and not la.reason]
        images = self.images[:SCALED]
        positions = {la.name: sample_positions(la, len(self.images), seed)[:SCALED] for la in able}
        # per layer and batch, every input's mean of y (n, n_o) and of y² (n, n_o)
        means: dict[str, list[Array]] = {}
        for observed in network.observe(images, positions, with_patches=False):
            n, y = observed.images.stop - observed.images.start, observed.outputs
            y = y.reshape(n, -1, y.shape[1])
            squares = np.einsum("npc,npc->nc", y, y, dtype=np.float64) / y.shape[1]
            means.setdefault(observed.layer, []).append(np.stack([y.mean(axis=1, dtype=np.float64), squares]))
            progress("Measuring layers", observed.images.stop, len(images))
        return replace(self, scales={name: Scale.of(*np.hstack(parts)) for name, parts in means.items()})

    @property
    def held_out(self) -> Images:
        """The held-out inputs."""
        return self.images[self.fitted :]


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """Return the index that each of the shuffled inputs had before."""
    return np.random.default_rng(seed).permutation(count)


def sample_positions(layer: Layer, images: int, seed: int, share: float = 1.0) -> NDArray[np.int64]:
    """Draw p flat output positions of a layer for each image, evenly spread over the map: (images, p).

    There are at least four per unknown, and this ``share`` of `ROWS` or of what `FLOPS` allow.
    """
    assert layer.geometry is not None
    d = layer.geometry.unknowns
    pixels = math.prod(layer.output_size)
    rows = max(4 * d, share * min(ROWS, FLOPS / d**2 / layer.geometry.groups))
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
        self._weights = partial(inputs.weights, layer.name)
        self._moments = (Moments.empty(groups, d, m), Moments.empty(groups, d, m))
        self._buffers: tuple[list[tuple[Array, Array, Array]], ...] = ([], [])

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
        images = batch.stop - batch.start
        weights = self._weights(y, images)
        y = y.reshape(len(x), x.shape[1], -1)
        cut = int(np.clip(self._cut - batch.start, 0, images)) * len(x) // images
        for side, rows in enumerate((slice(0, cut), slice(cut, len(x)))):
            # copies, because a frontend's arrays may be views, and would keep the larger arrays in memory
            self._buffers[side].append((x[rows].copy(), y[rows].copy(), weights[rows]))
            if self._buffered(side) >= self._unknowns:
                self._flushed(side)

    def _buffered(self, side: int) -> int:
        return sum(len(samples) for samples, *_ in self._buffers[side])

    def _flushed(self, side: int) -> Moments:
        buffer = self._buffers[side]
        if self._buffered(side):
            x, y, weights = (np.concatenate(parts) for parts in zip(*buffer, strict=True))
            self._moments[side].add(x, y, None if weights.min() == 1.0 else weights)
        buffer.clear()
        return self._moments[side]


def _sizes(layer: Layer) -> tuple[int, int, int]:
    """Return a layer's groups, unknowns per output d, and outputs per group m."""
    g = layer.geometry
    assert g is not None
    return g.groups, g.unknowns, g.n_o // g.groups
