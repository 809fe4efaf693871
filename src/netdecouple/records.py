"""Frozen dataclasses out of JSON files: every field's presence and type is checked."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from netdecouple.errors import PlanError
from netdecouple.execution import limits

T = TypeVar("T")
INFINITY = float("inf")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file of a size that can be meant.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no file, too large, or not UTF-8.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder, a device or a pipe")
    limits.TEXT_BYTES.check(path.stat().st_size, str(path), PlanError)
    return path.read_text(encoding="utf-8")


def read(cls: type[T], data: Any, *, signed: bool = False) -> T:
    """Build a dataclass of what ``json.loads`` made of one; tuples are lists there.

    Args:
        cls: the class; its fields are numbers, texts, tuples, dataclasses, any of these or None.
        data: the JSON value.
        signed: whether numbers may be negative.

    Raises:
        ValueError: a field is missing, unknown or of another type; one line that names it.
    """
    hints = get_type_hints(cls)
    if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:  # type: ignore[arg-type]
        raise ValueError(f"{cls.__name__} has missing or unknown fields")
    return cls(**{name: _typed(hints[name], value, name, signed) for name, value in data.items()})


def _typed(kind: Any, value: Any, name: str, signed: bool) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        return read(kind, value, signed=signed)
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):  # T | None
        return None if value is None else _typed(arguments[0], value, name, signed)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name!r} must be a list")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise ValueError(f"{name!r} must be a list of {len(arguments)}")
        return tuple(_typed(a, v, name, signed) for a, v in zip(arguments, value, strict=True))
    if not (type(value) is kind or (kind is float and type(value) is int)):
        raise ValueError(f"{name!r} must be {kind.__name__}, not {value!r:.80}")
    if kind in (int, float) and not (-INFINITY < value < INFINITY and (signed or value >= 0)):
        raise ValueError(f"{name!r} must be finite{'' if signed else ' and not negative'}, not {value!r}")
    return value
