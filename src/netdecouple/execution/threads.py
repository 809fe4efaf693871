"""How many threads this process may use, and BLAS with fewer of them for small problems."""

from __future__ import annotations

import importlib
import math
import os
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from threadpoolctl import ThreadpoolController

# Unknowns per output below which one thread is as fast as two. Evaluating a layer of 1,152 unknowns takes two
# threads 1.8 times as long as one, of 2,304 1.15 times, of 4,608 0.7 times; a busy machine makes it far
# worse.
SMALL = 3000
CGROUPS = Path("/sys/fs/cgroup")

_limit: int | None = None  # of the whole process, as the limits of BLAS and PyTorch are; workers set it


def available(cgroups: Path = CGROUPS) -> int:
    """Return how many threads this process may use.

    That is its `limit`; otherwise the processors it may run on, or fewer if a container's quota is less.
    """
    if _limit is not None:
        return _limit
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(_quota(cgroups))))


def _quota(cgroups: Path) -> float:
    """Return a container's quota in processors, by version 2 or 1 of Linux's control groups."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = map(int, " ".join((cgroups / name).read_text() for name in names).split())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            return quota / period
    return sys.maxsize


def limit(count: int) -> None:
    """Let NumPy, ONNX Runtime and PyTorch use at most so many threads in this process from now on."""
    global _limit
    _limit = count
    importlib.import_module("scipy.linalg")  # a library that is loaded later would not be limited
    ThreadpoolController().limit(limits=count)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def for_unknowns(count: int) -> AbstractContextManager[object]:
    """Limit BLAS to one thread within the context if a problem has so few unknowns per output."""
    limit: AbstractContextManager[object] = _controller().limit(
        limits=1 if count < SMALL else None, user_api="blas"
    )
    return limit
