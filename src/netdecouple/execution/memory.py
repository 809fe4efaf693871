"""How many bytes each part of a run may take, and arrays that go to disk beyond their share."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netdecouple.errors import BudgetError, OutputError
from netdecouple.execution.scratch import Scratch

BASE = 300 << 20  # bytes: Python, NumPy and a runtime
STEADY, PASSING = 2.1, 4.0  # times a model's size: taken during the whole run, and at its peaks on top
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that each part of a run may take in one process; the defaults hold without a limit."""

    limit: int | None = None  # of the process; with one, weights are mapped from files
    moment_bytes: int = 5 << 29  # moments of a group of layers; a single layer may have more
    row_bytes: int = 5 << 26  # moments of a layer with one sample per image; a wider one is left alone
    fit_bytes: float = float("inf")  # one layer while it is fitted
    store_bytes: int = 1 << 30  # one shard's targets, and again its live tensors; the rest goes to disk
    worker_store_bytes: int = 1 << 30  # the same in a worker process
    batch_bytes: int = 1 << 28  # activations of one batch
    scratch: Path | None = None  # folder of what goes to disk; None: where temporary files go

    @classmethod
    def within(cls, limit: int | None, model: int, inputs: int) -> Memory:
        """Divide what a model and inputs of so many bytes leave of ``limit``, or raise BudgetError."""
        if limit is None:
            return cls()
        taken = BASE + int(STEADY * model) + inputs
        least = taken + max(int(PASSING * model), BASE)
        if least > limit:
            raise BudgetError(
                f"memory={limit / 1e9:.3g}GB is too little: the model and its inputs take "
                f"{least / 1e9:.2g} GB; give more memory= or fewer samples="
            )
        left = limit - taken
        return cls(
            limit=limit,
            moment_bytes=left // 4,
            row_bytes=left // 16,
            fit_bytes=left * 3 // 4,
            store_bytes=left // 8,
            worker_store_bytes=left // 8,
            batch_bytes=left // 16,
        )

    @property
    def in_worker(self) -> Memory:
        """The same for a worker process, which may be on another machine: nothing goes to the work folder."""
        return replace(self, store_bytes=self.worker_store_bytes, scratch=None)


def parse_bytes(text: int | str) -> int:
    """Read 4GB, 500 MB, 3.5GiB, or a number of bytes; raise BudgetError for any other text."""
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*(|[KMGT]I?)B?\s*", str(text).upper())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise BudgetError(f"memory={text!r}: write an amount like 4GB, 500MB or 3.5GiB")
    return int(float(match[1]) * UNITS[match[2]])


class ArrayStore:
    """A mapping from keys to arrays: in memory up to a limit, beyond it in temporary files.

    Args:
        limit: bytes to hold in memory.
        folder: where temporary files go; None: where the system puts them.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self._limit = limit
        self._parent = folder
        self._in_memory = 0  # bytes
        self._arrays: dict[Hashable, NDArray[Any] | Path] = {}
        self._scratch: Scratch | None = None
        self._written = 0

    def __setitem__(self, key: Hashable, array: NDArray[Any]) -> None:
        self.pop(key)
        if self._in_memory + array.nbytes <= self._limit:
            self._in_memory += array.nbytes
            self._arrays[key] = array
            return
        try:
            if self._scratch is None:
                self._scratch = Scratch(self._parent)
            path = Path(self._scratch.name) / f"{self._written}.npy"
            self._written += 1
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            place = self._parent or tempfile.gettempdir()
            raise OutputError(
                f"{place}: no room for {array.nbytes / 1e6:.0f} MB ({error.strerror or error}); make room, "
                "or name another place with work= or TMPDIR"
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
        """Remove ``key`` if it is there."""
        array = self._arrays.pop(key, None)
        if isinstance(array, Path):
            array.unlink()
        elif array is not None:
            self._in_memory -= array.nbytes
