"""Frozen dataclasses to JSON and back: every field's presence and type is checked.

No library takes this code away: msgspec ignores unknown fields of dataclasses and accepts missing ones that
have a default, cattrs converts types silently, and neither refuses NaN or negative numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
INFINITY = float("inf")


def read(cls: type[T], data: Any, *, signed: bool = False) -> T:
    """Build a dataclass from what ``json.loads`` returned; JSON lists become tuples.

    It may hold numbers, texts, tuples, mappings, dataclasses, and any of these or None. Numbers must be
    finite, and not negative unless ``signed``. A ValueError names in one line what is wrong.
    """
    least, allowed = (-INFINITY, "finite") if signed else (0.0, "finite and not negative")
    value: T = _Reader(least, allowed).read(cls, data, cls.__name__)
    return value


def pack(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """Return a value as JSON; its arrays are added to ``arrays``, and their keys stand for them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: pack(getattr(value, f.name), arrays) for f in fields(value) if f.init}
    if isinstance(value, np.ndarray):
        key = str(len(arrays))
        arrays[key] = value
        return key
    if isinstance(value, Mapping):
        return {key: pack(inner, arrays) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [pack(inner, arrays) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def unpack(kind: Any, tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Build a value of a type (also arrays, and any numbers) from what `pack` returned.

    Raises KeyError or ValueError if it is not of this type.
    """
    return _Reader(None, "", arrays).read(kind, tree, "the value")


@dataclass(frozen=True)
class _Reader:
    """Builds values of a type. ``least`` bounds finite numbers from below; None: every number is allowed."""

    least: float | None
    allowed: str
    arrays: Mapping[str, NDArray[Any]] | None = None

    def read(self, kind: Any, value: Any, name: str) -> Any:
        origin, arguments = get_origin(kind), get_args(kind)
        if isinstance(kind, type) and is_dataclass(kind):
            if not isinstance(value, dict) or set(value) != {f.name for f in fields(kind) if f.init}:
                raise ValueError(f"{kind.__name__} has missing or unknown fields")
            hints = get_type_hints(kind)
            return kind(**{key: self.read(hints[key], inner, key) for key, inner in value.items()})
        if origin in (Union, UnionType):  # T | None
            return None if value is None else self.read(arguments[0], value, name)
        if origin is Literal:
            if value not in arguments:
                raise ValueError(f"{name!r} must be {' or '.join(map(repr, arguments))}, not {value!r:.80}")
            return value
        if origin is np.ndarray and self.arrays is not None:
            return self.arrays[value]
        if origin is dict:
            return {key: self.read(arguments[1], inner, name) for key, inner in value.items()}
        if origin is tuple:
            if not isinstance(value, list):
                raise ValueError(f"{name!r} must be a list")
            inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            if len(inner) != len(value):
                raise ValueError(f"{name!r} must be a list of {len(inner)}")
            return tuple(self.read(k, v, name) for k, v in zip(inner, value, strict=True))
        if not (type(value) is kind or (kind is float and type(value) is int)):
            raise ValueError(f"{name!r} must be {kind.__name__}, not {value!r:.80}")
        checked = kind in (int, float) and self.least is not None
        if checked and not (-INFINITY < value < INFINITY and value >= self.least):
            raise ValueError(f"{name!r} must be {self.allowed}, not {value!r}")
        return value
