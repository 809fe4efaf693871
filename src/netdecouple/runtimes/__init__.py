"""Open, run and time networks in the runtimes that deploy them.

A runtime opens a model for a number of threads and returns a session, which runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

from netdecouple.errors import UnavailableError
from netdecouple.runtimes.protocol import Feeds, Input, Runtime, Session

__all__ = ["NAMES", "Feeds", "Input", "Runtime", "Session", "runtime"]

NAMES = ("onnxruntime", "openvino", "torch", "torch.compile")


def runtime(name: str, *, trust: bool = False, custom_ops: Sequence[str] = ()) -> Runtime:
    """Find a runtime by its name.

    ``trust`` allows it to open files that may run any code, as PyTorch's do; ``custom_ops`` are libraries of
    operators for ONNX Runtime.

    Raises:
        UnavailableError: there is none of this name, or its package is not installed.
    """
    try:
        if name == "onnxruntime":
            from netdecouple.runtimes.onnxruntime import OnnxRuntime

            return OnnxRuntime(custom_ops)
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
