"""Inputs to time a network with: random numbers of the shape it declares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import ModelError
from netdecouple.runtimes.protocol import Feeds, Input


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape such as 1x3x224x224; raise ModelError if the text is none."""
    try:
        shape = tuple(int(size) for size in text.lower().replace(",", "x").split("x"))
    except ValueError as error:
        raise ModelError(f"shape={text!r}: write 1x3x224x224") from error
    if min(shape) < 1:
        raise ModelError(f"shape={text!r}: write 1x3x224x224, every size 1 or more")
    return shape


def describe_shape(shape: Sequence[int | None]) -> str:
    """Format a shape, with question marks for open sizes: ?×3×224×224."""
    return "×".join("?" if size is None else str(size) for size in shape)


def random_feeds(
    inputs: Sequence[Input],
    shape: tuple[int, ...] | None = None,
    seed: int = 0,
    constants: Mapping[str, Any] = {},
) -> Feeds:
    """Make random inputs: one image where the batch is open, and ``shape`` where other sizes are.

    Some may have values that are given.

    Raises:
        ModelError: the shape is needed and not given, or does not fit.
    """
    rng = np.random.default_rng(seed)
    if not inputs:
        if shape is None:
            raise ModelError("it does not declare its inputs; give shape=, such as 1x3x224x224")
        return {"input": _numbers(rng, shape, np.dtype(np.float32))}
    given = {i.name: fitted(i, constants[i.name]) for i in inputs if i.name in constants}
    inputs = [i for i in inputs if i.name not in given]
    if shape is not None and len(inputs) != 1:
        raise ModelError(
            f"it has {len(inputs)} inputs; shape= is for networks with one, others need constants="
        )
    return {**{i.name: _numbers(rng, _resolve(i, shape), i.dtype) for i in inputs}, **given}


def fitted(declared: Input, value: Any) -> NDArray[Any]:
    """Convert the value of an input; of one value per sample, which must be the same, take the first.

    Raises:
        ModelError: it does not fit.
    """
    array, wanted = np.asarray(value), declared.shape
    what = f"input {declared.name!r} is {declared.dtype} {describe_shape(wanted)}".rstrip()
    rows = array.ndim == len(wanted) + 1 or (array.ndim == len(wanted) > 1 and wanted[0] in (None, 1))
    if rows and len(array) > 1:
        if not (array == array[:1]).all():
            raise ModelError(f"{what}, and its values differ; only the images may differ between samples")
        array = array[:1]
    if array.ndim != len(wanted) and array.size == math.prod(n or 1 for n in wanted):
        array = array.reshape([n or 1 for n in wanted])
    fits = len(array.shape) == len(wanted) and all(
        n in (None, m) for n, m in zip(wanted, array.shape, strict=True)
    )
    if array.dtype.kind not in "biuf" or declared.dtype.kind not in "biuf" or not fits:
        raise ModelError(f"{what}, which {array.dtype} {describe_shape(array.shape)} does not fit")
    return array.astype(declared.dtype)


def _resolve(declared: Input, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    what = f"input {declared.name!r} is {describe_shape(declared.shape)}"
    if shape is None:
        if None in declared.shape[1:]:
            raise ModelError(f"{what}; give its size with shape=, such as 1x3x224x224")
        return tuple(size or 1 for size in declared.shape)
    fits = len(shape) == len(declared.shape) and all(
        wanted in (None, given) for wanted, given in zip(declared.shape, shape, strict=True)
    )
    if not fits:
        raise ModelError(f"{what}, which shape={'x'.join(map(str, shape))} does not fit")
    return shape


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Make numbers: standard normal, or random bytes; other integers are 0, an index that always exists."""
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    return rng.integers(0, 256, shape, np.uint8) if dtype == np.uint8 else np.zeros(shape, dtype)
