"""What a run may use: where it keeps what it has found, and how much memory it takes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from netdecouple.errors import BudgetError
from netdecouple.execution.checkpoint import NOWHERE, Checkpoint
from netdecouple.execution.executors import Workers

BASE = 300 << 20  # bytes: Python, NumPy and a runtime
STEADY, PASSING = 2.1, 4.0  # times a model's size: what there is of it all the time, and at times on top
SHARDS = 8  # unless more or fewer are asked for
DEFAULT_MOMENTS, DEFAULT_ROW, DEFAULT_STORE, DEFAULT_BATCH = 5 << 29, 5 << 26, 1 << 30, 1 << 28  # bytes
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


@dataclass(frozen=True)
class Resources:
    """What a run may use. None of it changes the result by more than rounding, but for very little memory.

    Args:
        work: a folder for what has been found so far. A run that was ended by whatever it may be, started
            again with the same folder, goes on, and ends with the same bytes.
        memory: bytes that the process may take; "4GB" is understood. None: as much as is of use, 5.3 GB
            and what the model and the widest layer take. Layers that are too wide for it are fitted from
            their weights alone.
        workers: who shares in the work: `netdecouple.execution.executors.processes`, `dask`, or `Workers.of`
            any executor. None: this process does all of it.
        shards: parts that the inputs are cut into, each one piece of work; 8 with workers, else 1. With the
            same shards, results are the same whoever does the work.

    Raises:
        BudgetError: the memory is no number of bytes, or there is less than one shard.
    """

    work: str | os.PathLike[str] | None = None
    memory: int | str | None = None
    workers: Workers | None = None
    shards: int | None = None
    checkpoint: Checkpoint = field(default=NOWHERE, repr=False, compare=False)  # opened in ``work``
    taken: int = field(default=0, repr=False)  # of the memory, by what is there all the time
    sharing: int = field(default=1, repr=False)  # shards that one process holds something of

    def __post_init__(self) -> None:
        if self.memory is not None:
            object.__setattr__(self, "memory", parse_bytes(self.memory))
        if self.shards is not None and self.shards < 1:
            raise BudgetError(f"--shards {self.shards}: give 1 or more")

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[Resources]:
        """The same, while the work folder is open for the run that ``identity`` describes.

        Raises:
            OutputError: it cannot be written, is in use, or is another run's.
        """
        about = {"memory": self.memory, "shards": self.parts, "workers": self.workers is not None}
        checkpoint = Checkpoint(self.work, {**identity, **about})
        try:
            yield replace(self, checkpoint=checkpoint)
        finally:
            checkpoint.close()

    def beside(self, model: int, inputs: int) -> Resources:
        """The same, beside a model and inputs of so many bytes.

        Raises:
            BudgetError: these alone take more than there is.
        """
        if self.memory is None:
            return self
        taken = BASE + int(STEADY * model) + inputs
        least = taken + max(int(PASSING * model), BASE)
        if least > int(self.memory):
            raise BudgetError(
                f"--memory {int(self.memory) / 1e9:.3g}GB is too little: the model and its inputs take "
                f"{least / 1e9:.2g} GB; give more, or fewer --samples"
            )
        return replace(self, taken=taken)

    @property
    def parts(self) -> int:
        """How many shards there are."""
        return self.shards or (1 if self.workers is None else SHARDS)

    def shards_of(self, count: int) -> list[slice]:
        """Cut so many inputs into shards; where there are fewer, each is one."""
        edges = [count * i // self.parts for i in range(self.parts + 1)]
        return [slice(a, b) for a, b in pairwise(edges) if a < b]

    @property
    def elsewhere(self) -> Resources:
        """What a worker may use."""
        sharing = -(-self.parts // (1 if self.workers is None else self.workers.count))
        return Resources(memory=self.memory, taken=self.taken, sharing=sharing)

    @property
    def _left(self) -> int:
        assert self.memory is not None
        return int(self.memory) - self.taken

    @property
    def moment_bytes(self) -> int:
        """Of moments held at once, unless a single layer has more."""
        return DEFAULT_MOMENTS if self.memory is None else self._left // 4

    @property
    def row_bytes(self) -> int:
        """Of a layer's moments that gets one sample per image: too few for so many inputs."""
        return DEFAULT_ROW if self.memory is None else self._left // 16

    @property
    def fit_bytes(self) -> float:
        """Of a single layer, while it is fitted."""
        return float("inf") if self.memory is None else self._left * 3 // 4

    @property
    def store_bytes(self) -> int:
        """Of targets, and of live tensors, that are held in memory; the rest goes to disk."""
        sharing = self.sharing if self.workers is not None else max(self.sharing, self.parts)
        return (DEFAULT_STORE if self.memory is None else self._left // 8) // sharing

    @property
    def batch_bytes(self) -> int:
        """Of activations that are made at once."""
        return DEFAULT_BATCH if self.memory is None else self._left // 16


def parse_bytes(text: int | str) -> int:
    """Read 4GB, 500 MB, 3.5GiB, or a number of bytes.

    Raises:
        BudgetError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*(|[KMGT]I?)B?\s*", str(text).upper())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise BudgetError(f"--memory {text!r}: write an amount like 4GB, 500MB or 3.5GiB")
    return int(float(found[1]) * UNITS[found[2]])
