"""Numerics that rounding does not decide: Gram matrices that may be singular up to it, and ties."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.floating]
TINY = np.finfo(float).tiny
DIGITS = 12  # after the point, relative to the largest number; what differs by less differs by rounding


def solve(gram: Array, right: Array) -> Array:
    """Solve X gram = right (·, d) for a symmetric gram (d, d) that may be singular up to rounding.

    >>> solve(np.diag([2.0, 4.0]), np.array([[2.0, 8.0]])).round(6)
    array([[1., 2.]])
    """
    gram = gram.copy()
    gram.flat[:: len(gram) + 1] += 1e-10 * np.trace(gram) / len(gram) + TINY**0.5
    # scipy.linalg.solve does the same, but keeps the GIL: no other thread, Ctrl-C's neither, runs meanwhile
    factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
    return np.asfortranarray(scipy.linalg.cho_solve(factor, right.T, check_finite=False).T)


def root(gram: Array) -> Array:
    """Compute the Cholesky factor L of a gram (…, d, d) = L Lᵀ that may be singular up to rounding.

    >>> root(np.array([[4.0, 2.0], [2.0, 5.0]])).round(6)
    array([[2., 0.],
           [1., 2.]])
    """
    trace = np.trace(gram, axis1=-2, axis2=-1)
    # where no input varies there is no metric; any will do, as its errors count for nothing
    floor = 1e-10 * trace / gram.shape[-1] + 1e-14 * np.max(trace, initial=0.0) + TINY**0.5
    return np.linalg.cholesky(gram + floor[..., None, None] * np.eye(gram.shape[-1]))


def identity(d: int) -> Array:
    """Make a read-only identity matrix (d, d) in the memory of 2 d numbers.

    >>> identity(2)
    array([[1., 0.],
           [0., 1.]])
    """
    impulse = np.zeros(2 * d - 1)
    impulse[d - 1] = 1
    return sliding_window_view(impulse, d)[::-1]


def comparable(values: Array) -> Array:
    """Round values (…, n) to `DIGITS` of the largest along the last axis.

    Values that are equal but for what instruction sets and BLAS round differently become equal, so that a
    stable sort leaves them in the order of their indices on every processor.

    >>> comparable(np.array([2.0, 1.0, 1.0 + 1e-15, 1e-16])).tolist()
    [1.0, 0.5, 0.5, 0.0]
    """
    largest = np.abs(values).max(axis=-1, keepdims=True, initial=np.finfo(float).tiny)
    rounded: Array = np.round(values / largest, DIGITS)
    return rounded
