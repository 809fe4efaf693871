"""What every runtime offers: it opens a model, and the session that it returns runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Input:
    """An input as a model declares it; sizes that it leaves open are None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Session:
    """A model that is ready to run."""

    inputs: tuple[Input, ...]  # that it declares; empty if it declares none
    run: Callable[[Feeds], list[NDArray[Any]]]  # to every output; raises ModelError if it fails on the inputs


class Runtime(Protocol):
    """Runs networks on the CPU."""

    name: str  # one of `netdecouple.runtimes.NAMES`
    version: str  # of its package

    def open(self, model: object, threads: int) -> Session:
        """Open a path or the runtime's own kind of object for so many threads; else raise ModelError."""
