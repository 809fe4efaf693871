"""What every runtime offers: it opens a model, and the session that it returns runs it."""

from __future__ import annotations

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


class Session(Protocol):
    """A model that is ready to run."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs that the model declares; empty if it declares none."""

    def run(self, feeds: Feeds) -> list[NDArray[Any]]:
        """Run once and return every output.

        Raises:
            ModelError: the inputs do not fit the network, or it fails on them.
        """


class Runtime(Protocol):
    """Runs networks on the CPU."""

    @property
    def name(self) -> str:
        """One of `netdecouple.runtimes.NAMES`."""

    @property
    def version(self) -> str:
        """The version of its package."""

    def open(self, model: object, threads: int) -> Session:
        """Open ``model`` (a path, or the runtime's own kind of object) to run with so many threads.

        Raises:
            ModelError: this runtime cannot open it.
        """
