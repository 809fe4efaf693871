"""What the ONNX and the PyTorch frontend share: batch sizes, and samples taken out of feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from netdecouple.network import Array, Layer

LARGEST_BATCH = 128
T = TypeVar("T")  # an array or a tensor


def batch_slices(
    count: int, layers: Sequence[Layer], limit: int, bytes_per_sample: int = 0, fixed: int | None = None
) -> list[slice]:
    """Cut ``count`` samples into batches of which the largest input of a layer fits in ``limit`` bytes.

    So do ``bytes_per_sample`` that the caller holds. ``fixed`` is the size where the network takes no other.
    """
    inputs = (4 * la.geometry.n_i * math.prod(la.size) for la in layers if la.geometry)
    held = max(bytes_per_sample, 4 * max(inputs, default=1))
    step = fixed or min(max(limit // held, 1), LARGEST_BATCH)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def squeezed(output: T) -> T:
    """View an output (n, c, 1, 1), as fully convolutional classifiers have it, as (n, c)."""
    of: Any = output
    return of.reshape(of.shape[:2]) if of.ndim == 4 and of.shape[2:] == (1, 1) else output


def pick(values: Array, positions: NDArray[np.int64]) -> Array:
    """Take (n, p) flat positions out of maps (n, c, *size): (n·p, c)."""
    flat = values.reshape(*values.shape[:2], -1)
    return flat[np.arange(len(positions))[:, None], :, positions].reshape(-1, values.shape[1])
