"""Arrays kept in memory up to a limit, and beyond it in temporary files."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netdecouple.scratch import Scratch

DEFAULT_LIMIT = 2 << 30  # bytes


class ArrayStore:
    """A mapping from keys to arrays that spills to disk what memory should not hold."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
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
        if self._folder is None:
            self._folder = Scratch()
        path = Path(self._folder.name) / f"{self._written}.npy"
        self._written += 1
        np.save(path, array, allow_pickle=False)
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
