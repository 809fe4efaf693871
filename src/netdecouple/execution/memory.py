"""Arrays kept in memory up to a limit, and beyond it in temporary files."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch


class ArrayStore:
    """A mapping from keys to arrays that spills to disk what memory should not hold.

    Args:
        limit: bytes to hold in memory.
        beside: where to put the rest; None: where temporary files go.
    """

    def __init__(self, limit: int, beside: Path | None = None) -> None:
        self._limit = limit
        self._beside = beside
        self._held = 0
        self._arrays: dict[Hashable, NDArray[Any] | Path] = {}
        self._folder: Scratch | None = None
        self._written = 0

    def __setitem__(self, key: Hashable, array: NDArray[Any]) -> None:
        self.pop(key)
        if self._held + array.nbytes <= self._limit:
            self._held += array.nbytes
            self._arrays[key] = array
            return
        try:
            if self._folder is None:
                self._folder = Scratch(self._beside)
            path = Path(self._folder.name) / f"{self._written}.npy"
            self._written += 1
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            place = self._beside or tempfile.gettempdir()
            raise OutputError(
                f"{place}: no room for {array.nbytes / 1e6:.0f} MB ({error.strerror or error}); make room, "
                "or let TMPDIR or --work name another place"
            ) from error
        self._arrays[key] = path

    def __getitem__(self, key: Hashable) -> NDArray[Any]:
        array = self._arrays[key]
        return np.load(array, allow_pickle=False) if isinstance(array, Path) else array

    def __contains__(self, key: Hashable) -> bool:
        return key in self._arrays

    def __len__(self) -> int:
        return len(self._arrays)

    def pop(self, key: Hashable) -> None:
        """Forget ``key`` if it is held."""
        array = self._arrays.pop(key, None)
        if isinstance(array, Path):
            array.unlink()
        elif array is not None:
            self._held -= array.nbytes
