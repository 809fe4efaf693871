"""Tasks for workers, in a module that imports little: every worker that starts imports it."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from netdecouple.errors import ModelError
from netdecouple.execution.executors import Shared, Stale


def times(factor: int, number: int) -> int:
    return factor * number


def process(factor: int, number: int) -> int:
    return os.getpid()


def failing(factor: int, number: int) -> int:
    raise ModelError(f"layer {number} is no good")


def once_deadly(factor: int, folder: str, number: int) -> int:
    """Kill the worker the first time that a number comes."""
    mark = Path(folder) / str(number)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return factor * number


def deadly(factor: int, number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def counted(counter: list[int], expected: int) -> tuple[int, int]:
    """Count calls in a shared argument; it is stale if there were not as many as expected."""
    if len(counter) != expected:
        raise Stale
    counter.append(os.getpid())
    return len(counter), os.getpid()


def factor(value: int = 3) -> Shared:
    return Shared(f"factor {value}", lambda: value)


def each(count: int, value: int = 3) -> Iterator[tuple[Shared, int]]:
    """Arguments of so many tasks: a shared factor, and a number."""
    return ((factor(value), n) for n in range(count))


class Unknown:
    """An object whose module does not exist in workers."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("no_such_module",)
