"""How many threads may be used: all there are, unless this is one of several workers; BLAS often fewer.

Small problems are slower with several threads, far slower on a busy machine.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController

# Unknowns per output below which one thread is as fast as two. To weigh a layer of 1,152 takes two of them
# 1.8 times as long, of 2,304 1.15 times, of 4,608 0.7 times.
SMALL = 3000

_limit: int | None = None


def available() -> int:
    """Threads that this process may use: processors, where the system tells; as many as it was limited to."""
    if _limit is not None:
        return _limit
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit(count: int) -> None:
    """Use so many threads at most, from now on, in NumPy, ONNX Runtime and PyTorch."""
    global _limit
    _limit = count
    importlib.import_module("scipy.linalg")  # what is not there yet would not be limited
    ThreadpoolController().limit(limits=count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def for_unknowns(count: int) -> AbstractContextManager[object]:
    """Limit BLAS to one thread within, if the problem is small."""
    limit: AbstractContextManager[object] = _controller().limit(
        limits=1 if count < SMALL else None, user_api="blas"
    )
    return limit
