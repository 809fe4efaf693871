"""How many threads BLAS may use: small problems are slower with several, far slower on a busy machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController

SMALL = 1000  # unknowns per output below which one thread is as fast as many


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def for_unknowns(count: int) -> AbstractContextManager[object]:
    """Limit BLAS to one thread within, if the problem is small."""
    limit: AbstractContextManager[object] = _controller().limit(
        limits=1 if count < SMALL else None, user_api="blas"
    )
    return limit
