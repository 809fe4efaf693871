"""Open, run and time networks in the runtimes that deploy them.

A runtime opens a model for a number of threads and returns a session, which runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import UnavailableError

Feeds = dict[str, NDArray[Any]]
NAMES = ("onnxruntime", "openvino", "torch", "torch.compile")


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
        """One of `NAMES`."""

    @property
    def version(self) -> str:
        """The version of its package."""

    def open(self, model: object, threads: int) -> Session:
        """Open ``model`` (a path, or the runtime's own kind of object) to run with so many threads.

        Raises:
            ModelError: this runtime cannot open it.
        """


def runtime(name: str, *, trust: bool = False) -> Runtime:
    """Find a runtime by its name.

    ``trust`` allows it to open files that may run any code, as PyTorch's do.

    Raises:
        UnavailableError: there is none of this name, or its package is not installed.
    """
    try:
        if name == "onnxruntime":
            from netdecouple.runtimes.onnxruntime import OnnxRuntime

            return OnnxRuntime()
        if name == "openvino":
            from netdecouple.runtimes.openvino import OpenVino

            return OpenVino()
        if name in ("torch", "torch.compile"):
            from netdecouple.runtimes.torch import Torch

            return Torch(compiled=name == "torch.compile", trust=trust)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise UnavailableError(
            f"{package} is not installed; install it with: pip install 'netdecouple[{package}]'"
        ) from error
    raise UnavailableError(f"there is no runtime {name!r}; there are {', '.join(NAMES)}")
