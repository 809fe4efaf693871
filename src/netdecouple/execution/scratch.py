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

from netdecouple.errors import OutputError

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


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Find out before the work, not after it, that a file cannot be written; return where: links stay.

    Raises:
        OutputError: the folder is missing or not writable, or the path is a folder or a device.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise OutputError(f"{path}: is a folder; give the name of a file")
        if target.exists() and not target.is_file():  # replacing /dev/null by a file would do harm
            raise OutputError(f"{path}: is a device or a pipe; give the name of a file")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise unwritable(path, error) from error
    return target


def unwritable(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """What to say where the system does not let us write."""
    return OutputError(f"{path}: cannot write there ({error.strerror or error}); choose another place")


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
