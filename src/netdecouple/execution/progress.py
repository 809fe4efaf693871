"""How long computations report their progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # name of the step, what is done, what there is to do


def quiet(step: str, done: int, total: int) -> None:
    """Report no progress."""


def with_suffix(suffix: str, progress: Progress) -> Progress:
    """Add a suffix to the name of every step."""
    return lambda step, done, total: progress(f"{step} {suffix}", done, total)
