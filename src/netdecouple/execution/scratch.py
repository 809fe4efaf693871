"""Temporary folders, where results may be written, and renaming them to their final names.

All of it goes through this module, so that an interrupted command can remove what is temporary, and say
what it has written, while a thread that cannot be stopped is still running.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from netdecouple.errors import OutputError

StrPath = str | os.PathLike[str]

TRIES = 5  # to remove a folder that a thread is still writing into

# Global, because Ctrl-C ends the process from its main thread, which has no reference to what another one
# opened.
_lock = threading.Lock()
_open: weakref.WeakSet[Scratch] = weakref.WeakSet()
_written: list[Path] = []


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder; put what is to be renamed into one in the ``parent`` of its final place."""

    def __init__(self, parent: Path | None = None) -> None:
        with _lock:
            super().__init__(prefix="netdecouple-" if parent is None else ".netdecouple-", dir=parent)
            _open.add(self)


@contextmanager
def publishing(target: str | os.PathLike[str]) -> Iterator[None]:
    """Rename the files of one result within this context: all or none of them if Ctrl-C interrupts."""
    with _lock:
        yield
        _written.append(Path(target))


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Check before the work that a file can be written; return its real path: symbolic links stay.

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


def check_onnx(path: StrPath) -> None:
    """Raise OutputError unless a network's file is named as an ONNX file."""
    if Path(path).suffix != ".onnx":
        raise OutputError(
            f"{path}: ONNX networks are written as .onnx files; write {Path(path).with_suffix('.onnx')}"
        )


def check_apart(outputs: Iterable[StrPath], inputs: Iterable[StrPath]) -> None:
    """Check before the work that no output replaces an input or another output, also through links.

    ``inputs`` are files; they are not iterated over where no output exists yet.

    Raises:
        OutputError: one does.
    """
    places: dict[object, StrPath] = {}
    for output in outputs:
        replaced = {_identity(path): path for path in _replaced(output)}
        if places.keys() & replaced.keys():
            raise OutputError(f"{output}: is asked for twice; give every result a name of its own")
        places |= replaced
    if not any(map(os.path.exists, places.values())):
        return
    for identity in map(_identity, inputs):
        if identity in places:
            raise OutputError(
                f"{places[identity]}: is an input, and inputs are never overwritten; choose another name"
            )


def _replaced(output: StrPath) -> Iterator[StrPath]:
    """Yield what writing an output replaces: a folder's files; beside a model, the weights of a large one."""
    path = Path(output)
    if os.path.isdir(path):
        yield from path.iterdir()
    yield output
    if path.suffix == ".onnx":
        yield path.with_name(f"{path.name}.data")


def _identity(path: StrPath) -> object:
    """Return what two names of one file have in common."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError:
        return real
    return status.st_dev, status.st_ino


def unwritable(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """Return the error to raise where the system refuses to write."""
    return OutputError(f"{path}: cannot write there ({error.strerror or error}); choose another place")


def forget() -> None:
    """Forget what has been written: a command begins."""
    _written.clear()


def abandon() -> list[Path]:
    """Remove all temporary folders and return what has been written. Writers wait for ever from then on.

    Call it from another thread than those that write, before the process is ended.
    """
    _lock.acquire()
    for folder in list(_open):
        for _ in range(TRIES):
            shutil.rmtree(folder.name, ignore_errors=True)
            if not os.path.exists(folder.name):
                break
    return list(dict.fromkeys(_written))
