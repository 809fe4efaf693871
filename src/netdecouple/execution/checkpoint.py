"""What a run has found so far, in a folder, so that whatever ends it, it can go on.

Every entry is one file, NumPy arrays and JSON, written under a temporary name and renamed once it is on the
disk: it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import IO, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import OutputError

T = TypeVar("T")
HEADER, LOCK, SCRATCH = "run.json", "lock", "scratch"
VALUE = "value"  # the member of an entry that is JSON


class Checkpoint:
    """A folder of entries by name, all of one run; without a folder nothing is kept.

    Args:
        folder: is made if it is not there.
        identity: all that the run's result depends on; JSON.

    Raises:
        OutputError: it cannot be written, is in use, holds other files, or another run's entries.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any] = {}) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock: IO[bytes] | None = None
        if self.folder is None:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder)
            self._claim(self.folder, json.loads(json.dumps(identity)))
            shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)  # of a run that was killed
            (self.folder / SCRATCH).mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise _unwritable(self.folder, error) from error
        except OutputError:
            self.close()
            raise

    @staticmethod
    def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
        try:
            known = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            if {path.name for path in folder.iterdir()} - {HEADER, LOCK, SCRATCH}:
                raise OutputError(
                    f"{folder}: holds other files; give --work a new folder, or one of an earlier run"
                ) from None
            (folder / SCRATCH).mkdir(exist_ok=True)
            text = json.dumps(identity, indent=1, ensure_ascii=False)
            _publish(folder, HEADER, lambda file: file.write(text.encode()))
            return
        for key in (*identity, *known):
            if known.get(key) != identity.get(key):
                told = f"{str(known.get(key))[:60]} there, {str(identity.get(key))[:60]} here"
                raise OutputError(
                    f"{folder}: is of another run ({key}: {told}); give --work another folder, or remove this"
                )

    @property
    def scratch(self) -> Path | None:
        """Where temporary files go, so that those of a run that was killed are found."""
        return None if self.folder is None else self.folder / SCRATCH

    def close(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            self._lock.close()

    @staticmethod
    def key(kind: str, value: object) -> str:
        """A name for what depends on a value that shows itself in full."""
        return f"{kind}-{hashlib.sha256(repr(value).encode()).hexdigest()[:16]}"

    def once(self, name: str, kind: Any, work: Callable[[], T]) -> T:
        """Load an entry; if there is none, do the work and keep it."""
        known: T | None = self.load(name, kind)
        if known is None:
            known = work()
            self.save(name, known)
        return known

    def load(self, name: str, kind: Any) -> Any:
        """Read an entry of a type (dataclasses, arrays, tuples, mappings, texts, numbers, None).

        None if there is none, or none that can be read: the work is done again then.
        """
        if self.folder is None:
            return None
        try:
            with np.load(self._path(name), allow_pickle=False) as members:
                return _unpack(kind, json.loads(members[VALUE].tobytes()), members)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, name: str, value: Any) -> None:
        """Keep an entry, in the place of one of the same name.

        Raises:
            OutputError: the disk is full, or something like that; what is there already stays.
        """
        if self.folder is None:
            return
        arrays: dict[str, NDArray[Any]] = {}
        tree = json.dumps(_packed(value, arrays)).encode()
        members = {VALUE: np.frombuffer(tree, np.uint8)} | arrays
        try:
            _publish(self.folder, self._path(name).name, lambda file: np.savez(file, **members))
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def drop(self, name: str) -> None:
        """Forget an entry, if it is there."""
        if self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.npz"


NOWHERE = Checkpoint(None)


def _locked(folder: Path) -> IO[bytes] | None:
    """Hold the folder for this process, as long as the file is open."""
    if sys.platform == "win32":
        return None
    import fcntl

    file = (folder / LOCK).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OutputError(f"{folder}: another run is at work there; wait, or give --work another") from error
    return file


def _publish(folder: Path, name: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file, bring it to the disk, and only then give it its name."""
    partial = folder / SCRATCH / name
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / name)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if sys.platform != "win32":  # the new name is to be on the disk as well
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder}: cannot write there ({error.strerror or error}); make room, or choose another place, "
        "and start again: what was found so far is kept"
    )


def _packed(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    """A value as JSON, but for its arrays, which are put aside under numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _packed(getattr(value, f.name), arrays) for f in fields(value) if f.init}
    if isinstance(value, np.ndarray):
        arrays[str(len(arrays))] = value
        return str(len(arrays) - 1)
    if isinstance(value, Mapping):
        return {key: _packed(inner, arrays) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_packed(inner, arrays) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpack(kind: Any, tree: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Build a value of a type again.

    Raises:
        KeyError, TypeError, ValueError: it is not of this type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # T | None
        return None if tree is None else _unpack(arguments[0], tree, arrays)
    if origin is np.ndarray:
        return arrays[tree]
    if origin is tuple:
        inner = arguments[:1] * len(tree) if arguments[-1] is Ellipsis else arguments
        return tuple(_unpack(a, v, arrays) for a, v in zip(inner, tree, strict=True))
    if origin is dict:
        return {key: _unpack(arguments[1], value, arrays) for key, value in tree.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: _unpack(hints[name], value, arrays) for name, value in tree.items()})
    if not (type(tree) is kind or (kind is float and type(tree) is int)):
        raise TypeError(f"{tree!r:.80} is no {kind}")
    return tree
