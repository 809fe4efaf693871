"""Numbers compared so that rounding decides nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 12  # after the point, relative to the largest number; what differs by less differs by rounding


def comparable(values: NDArray[Any]) -> NDArray[Any]:
    """Round values (…, n) to `DIGITS` of the largest along the last axis.

    Values that are equal but for what instruction sets and BLAS round differently become equal, so that a
    stable sort leaves them in the order of their indices on every processor.

    >>> comparable(np.array([2.0, 1.0, 1.0 + 1e-15, 1e-16])).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    largest = np.abs(values).max(axis=-1, keepdims=True, initial=np.finfo(float).tiny)
    rounded: NDArray[Any] = np.round(values / largest, DIGITS)
    return rounded
