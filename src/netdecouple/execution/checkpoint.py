"""Intermediate results of a run in a folder, from which an interrupted run continues.

Every entry is one file of NumPy arrays and JSON, written under a temporary name and renamed once it is on the
disk: it is there completely or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from netdecouple import records
from netdecouple.errors import OutputError

T = TypeVar("T")
HEADER, LOCK, SCRATCH = "run.json", "lock", "scratch"
VALUE = "value"  # the member of an entry that is JSON


class Checkpoint:
    """A folder of named entries, all of one run. `claim` says which run, before anything is loaded or saved.

    Args:
        folder: it is created if it does not exist; None: nothing is kept.

    Raises:
        OutputError: the folder cannot be written, is in use, or holds other files.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock: IO[bytes] | None = None
        self._is_claimed = False
        if self.folder is None:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder)
            if self._identity is None and {p.name for p in self.folder.iterdir()} - {HEADER, LOCK, SCRATCH}:
                raise OutputError(
                    f"{self.folder}: holds other files; give work= a new folder, or one of an earlier run"
                )
            shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)  # of a run that was killed
            (self.folder / SCRATCH).mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise _unwritable(self.folder, error) from error
        except OutputError:
            self.close()
            raise

    @property
    def _identity(self) -> dict[str, Any] | None:
        """All that the results of the folder's run depend on; None if it is not there or cut short."""
        assert self.folder is not None
        try:
            identity: dict[str, Any] = json.loads((self.folder / HEADER).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return identity if isinstance(identity, dict) else None

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder that of a run, by all that its results depend on (JSON), unless it is already.

        Raises:
            OutputError: the folder is of another run, or cannot be written.
        """
        if self.folder is None:
            return
        text = json.dumps(identity, indent=1, ensure_ascii=False)
        if self._identity is None:
            _publish(self.folder, HEADER, lambda file: file.write(text.encode()))
        there, now = self._identity or {}, json.loads(text)
        for key in (*now, *there):
            if there.get(key) != now.get(key):
                values = f"{str(there.get(key))[:60]} there, {str(now.get(key))[:60]} now"
                raise OutputError(
                    f"{self.folder}: is of another run ({key}: {values}); give work= another folder, "
                    "or remove this one"
                )
        self._is_claimed = True

    @property
    def scratch(self) -> Path | None:
        """Folder of temporary files. Those of a run that was killed are removed when the folder is opened."""
        return None if self.folder is None else self.folder / SCRATCH

    def close(self) -> None:
        """Release the folder for another run."""
        if self._lock is not None:
            self._lock.close()

    @staticmethod
    def key(kind: str, value: object) -> str:
        """Return a name for an entry that depends on a value, by its ``repr``."""
        return f"{kind}-{hashlib.sha256(repr(value).encode()).hexdigest()[:16]}"

    def once(self, name: str, kind: Any, compute: Callable[[], T]) -> T:
        """Load an entry; if there is none, compute and save it."""
        value: T | None = self.load(name, kind)
        if value is None:
            value = compute()
            self.save(name, value)
        return value

    def load(self, name: str, kind: Any) -> Any:
        """Read an entry of a type (dataclasses, arrays, tuples, mappings, texts, numbers, None).

        None if there is no such entry, or it cannot be read: it is computed again then.
        """
        if self.folder is None:
            return None
        try:
            with np.load(self._path(name), allow_pickle=False) as members:
                return records.unpack(kind, json.loads(members[VALUE].tobytes()), members)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, name: str, value: Any) -> None:
        """Write an entry; it replaces one of the same name.

        Raises:
            OutputError: it cannot be written, on a full disk for instance; an entry that is there stays.
        """
        if self.folder is None:
            return
        arrays: dict[str, NDArray[Any]] = {}
        tree = json.dumps(records.pack(value, arrays)).encode()
        members = {VALUE: np.frombuffer(tree, np.uint8)} | arrays
        _publish(self.folder, self._path(name).name, lambda file: np.savez(file, **members))

    def drop(self, name: str) -> None:
        """Remove an entry if it is there."""
        if self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        assert self._is_claimed, "claim() comes first"
        return self.folder / f"{name}.npz"


def _locked(folder: Path) -> IO[bytes] | None:
    """Lock the folder for this process as long as the file is open; Windows has no such lock."""
    if sys.platform == "win32":
        return None
    import fcntl

    file = (folder / LOCK).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OutputError(f"{folder}: another run is using it; wait, or give work= another folder") from error
    return file


def _publish(folder: Path, name: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file, flush it to the disk, and only then give it its name; else a file of that name stays."""
    partial = folder / SCRATCH / name
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / name)
        if sys.platform != "win32":  # the new name has to be on the disk as well
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder}: cannot write there ({error.strerror or error}); make room, or choose another place, "
        "and start again: earlier results are kept"
    )
