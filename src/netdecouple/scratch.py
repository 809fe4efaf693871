"""Files in the making: temporary folders, and the moment at which a result takes its name.

All of both goes through here, so that a command that is interrupted can clean up, and say what it has
written, while a thread that nothing can stop is still at work.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRIES = 5  # to remove a folder that somebody is still writing into

_lock = threading.Lock()
_open: weakref.WeakSet[Scratch] = weakref.WeakSet()
_written: list[Path] = []


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder; one for what is to be renamed lies ``beside`` its place."""

    def __init__(self, beside: Path | None = None) -> None:
        with _lock:
            super().__init__(prefix="netdecouple-" if beside is None else ".netdecouple-", dir=beside)
            _open.add(self)


@contextmanager
def publishing(target: str | os.PathLike[str]) -> Iterator[None]:
    """Rename what makes up one result, all of it or nothing."""
    with _lock:
        yield
        _written.append(Path(target))


def forget() -> None:
    """Begin to count anew what has been written."""
    _written.clear()


def abandon() -> list[Path]:
    """Remove all temporary folders, and tell what has been written; from now on nothing is, ever.

    To be called from another thread than the one that writes, before the process is ended.
    """
    _lock.acquire()
    for folder in list(_open):
        for _ in range(TRIES):
            shutil.rmtree(folder.name, ignore_errors=True)
            if not os.path.exists(folder.name):
                break
    return list(dict.fromkeys(_written))
