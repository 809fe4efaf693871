"""The fused depthwise + pointwise operator: a compiled library, and its ways into NumPy and ONNX Runtime.

One line teaches an ONNX Runtime session the operator ``netdecouple::DecoupledConv``:

    netdecouple.kernels.register(session_options)
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netdecouple.convolution import Array, ConvGeometry, Factorization
from netdecouple.errors import UnavailableError

OPERATOR = "DecoupledConv"
DOMAIN = "netdecouple"
_REGISTERED = "netdecouple.registered"  # in the options of a session
FILE = "netdecouple_kernels.so"
MISSING = (
    "the fused operator was not built with netdecouple; install a C++ compiler and run "
    "`pip install --force-reinstall --no-deps --no-cache-dir .` in its sources"
)


def library_path() -> Path | None:
    """Where the compiled library is; None if it was not built when netdecouple was installed."""
    # an editable install keeps the sources and what was compiled in two places
    found = (Path(folder) / FILE for folder in __path__)
    return next((path for path in found if path.is_file()), None)


def available() -> bool:
    """Tell whether the operator was built."""
    return library_path() is not None


class MissingOperatorWarning(UserWarning):
    """The fused operator would be used, and was not built."""


def usable() -> bool:
    """Tell whether the operator was built, where it would be used; a warning says what is lost without it."""
    if available():
        return True
    warnings.warn(f"{MISSING}; without it networks are slower", MissingOperatorWarning, stacklevel=1)
    return False


def check_available() -> Path:
    """Make sure that the operator was built; return where its library is.

    Raises:
        UnavailableError: it was not; the message says what to do.
    """
    path = library_path()
    if path is None:
        raise UnavailableError(
            f"{MISSING}, or turn the model into standard operators with `netdecouple lower`"
        )
    return path


def register(options: Any) -> None:
    """Teach the sessions that ``options`` (onnxruntime.SessionOptions) open the fused operator.

    Options that know it already stay as they are.

    Raises:
        UnavailableError: the operator was not built.
    """
    library = str(check_available())
    try:
        options.get_session_config_entry(_REGISTERED)
    except Exception:  # ONNX Runtime's error for an entry that is not there
        options.register_custom_ops_library(library)
        options.add_session_config_entry(_REGISTERED, "1")


def level() -> str:
    """The instruction set in use: avx512, avx2 or baseline."""
    return str(_library().netdecouple_level().decode())


def output_shape(
    name: str, g: ConvGeometry, x: Sequence[int], residual: Sequence[int] | None
) -> tuple[int, int, int, int]:
    """Return the shape of an operator's outputs for inputs of shape x and a residual, if there is one.

    Raises:
        ValueError: they do not fit the layer; the message begins with the operator's name.
    """
    if len(x) != 4 or x[1] != g.n_i:
        raise ValueError(f"{name}: the input has shape {tuple(x)}, not (n, {g.n_i}, h, w)")
    n, _, h, w = x
    size = g.output_size(h, w)
    if min(size) < 1:
        raise ValueError(f"{name}: an input of {h}×{w} is smaller than the kernel")
    y = (n, g.n_o, *size)
    if residual is not None and tuple(residual) != y:
        raise ValueError(f"{name}: the residual has shape {tuple(residual)}, not {y}")
    return y


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_i", "n_o", "groups", "rows", "kh", "kw")),
        ("strides", ctypes.c_int64 * 2),
        ("pads", ctypes.c_int64 * 4),
        ("dilations", ctypes.c_int64 * 2),
        ("minimum", ctypes.c_float),
        ("maximum", ctypes.c_float),
    )


class _OpenMP(ctypes.Structure):
    _fields_ = (("parallel", ctypes.c_void_p), ("threads", ctypes.c_uint))


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(check_available()))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.netdecouple_create.restype = pointer
    library.netdecouple_create.argtypes = [pointer] * 6 + [ctypes.c_char_p, ctypes.c_size_t]
    library.netdecouple_run.argtypes = [pointer] * 4 + [integer] * 3 + [pointer] * 2
    library.netdecouple_openmp_for.restype = None
    library.netdecouple_destroy.argtypes = [pointer]
    library.netdecouple_destroy.restype = None
    library.netdecouple_level.restype = ctypes.c_char_p
    return library


@cache
def _gomp_parallel() -> int | None:
    """Where the OpenMP that this process has loaded begins a parallel region; None if it has none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):  # no such symbol; or no way to ask
        return None


class DecoupledConv:
    """A depthwise and a pointwise stage packed together, run on NumPy arrays.

    Args:
        factorization: a depthwise stage and a pointwise one (`Factorization.is_separable`).
        slope: factors for negative outputs (n_o,), as PReLU has; None for none.
        limits: what outputs are clipped to; (0, inf) is ReLU.

    Raises:
        ValueError: the factorization cannot be fused, or its bias or the slope do not fit it.
        UnavailableError: the operator was not built.
    """

    def __init__(
        self,
        factorization: Factorization,
        slope: Array | None = None,
        limits: Sequence[float] = (-np.inf, np.inf),
    ) -> None:
        if not factorization.is_separable:
            raise ValueError("only a depthwise stage and a pointwise one can be fused")
        self._geometry = g = factorization.geometry
        if slope is not None and np.shape(slope) != (g.n_o,):
            raise ValueError(f"the slope has shape {np.shape(slope)}, not {(g.n_o,)}")
        bias = np.zeros(g.n_o) if factorization.bias is None else factorization.bias
        if np.shape(bias) != (g.n_o,):
            raise ValueError(f"the bias has shape {np.shape(bias)}, not {(g.n_o,)}")
        depthwise, pointwise = factorization.stages
        rows, groups = depthwise.geometry.n_o, pointwise.geometry.groups
        shape = _Shape(g.n_i, g.n_o, groups, rows, g.kh, g.kw, g.strides, g.pads, g.dilations, *limits)
        channels = np.ascontiguousarray(depthwise.reads, np.int64)
        weights = [np.ascontiguousarray(a, np.float32) for a in (depthwise.weight, pointwise.weight, bias)]
        slopes = None if slope is None else np.ascontiguousarray(slope, np.float32)
        error = ctypes.create_string_buffer(256)
        self._library = _library()
        arrays = (channels, *weights, slopes)
        self._handle = self._library.netdecouple_create(
            ctypes.addressof(shape), *map(_data, arrays), error, len(error)
        )
        if not self._handle:
            raise ValueError(f"{OPERATOR}: {error.value.decode()}")

    def __call__(
        self, x: NDArray[np.float32], residual: NDArray[np.float32] | None = None, threads: int = 1
    ) -> NDArray[np.float32]:
        """Return (n, n_o, h', w') for x (n, n_i, h, w); ``residual`` is added before slope and limits.

        More ``threads`` than the calling one are those of the OpenMP library that the process has loaded,
        as PyTorch does; where there is none, that many are not used.

        Raises:
            ValueError: the input does not fit the layer.
        """
        residual_shape = None if residual is None else residual.shape
        y = np.empty(output_shape(OPERATOR, self._geometry, x.shape, residual_shape), np.float32)
        n, _, h, w = x.shape
        x = np.ascontiguousarray(x, np.float32)
        added = None if residual is None else np.ascontiguousarray(residual, np.float32)
        pool = _OpenMP(_gomp_parallel(), threads) if threads > 1 and _gomp_parallel() else None
        shared = (None, None) if pool is None else (self._library.netdecouple_openmp_for, ctypes.byref(pool))
        if self._library.netdecouple_run(self._handle, *map(_data, (x, added, y)), n, h, w, *shared):
            raise MemoryError(f"{OPERATOR}: out of memory")
        return y

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.netdecouple_destroy(self._handle)


def _data(array: NDArray[Any] | None) -> int | None:
    return None if array is None else int(array.ctypes.data)
