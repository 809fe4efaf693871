"""What the ONNX and the PyTorch frontend share: batch sizes, and samples taken out of feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from netdecouple.network import Array, Layer

LARGEST_BATCH = 128


def batch_slices(
    count: int,
    layers: Sequence[Layer],
    limit: int,
    bytes_per_sample: int = 0,
    fixed: int | None = None,
) -> list[slice]:
    """Cut ``count`` samples into batches whose activations fit in memory.

    Args:
        count: number of samples.
        layers: of the network; the largest input among them sets the size of a batch.
        limit: bytes that a batch may take.
        bytes_per_sample: what the caller holds of every sample, if that may be more.
        fixed: the size of every batch, where the network takes no other.
    """
    inputs = (4 * la.geometry.n_i * math.prod(la.size) for la in layers if la.geometry)
    held = max(bytes_per_sample, 4 * max(inputs, default=1))
    step = fixed or min(max(limit // held, 1), LARGEST_BATCH)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def pick(values: Array, positions: NDArray[np.int64]) -> Array:
    """Take (n, p) flat positions out of maps (n, c, *size): (n·p, c)."""
    flat = values.reshape(*values.shape[:2], -1)
    return flat[np.arange(len(positions))[:, None], :, positions].reshape(-1, values.shape[1])
