"""What a run may use, as the user sets it (`Resources`), and the run itself once it is open (`Run`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from netdecouple.errors import BudgetError
from netdecouple.execution.checkpoint import Checkpoint
from netdecouple.execution.executors import Args, Task, ThisProcess, Workers
from netdecouple.execution.memory import Memory, parse_bytes

SHARDS = 8  # with workers, unless another number is asked for


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a run may use. Results stay the same up to rounding, except with very little memory.

    Args:
        work: a folder that keeps intermediate results. An interrupted run that is started again with the
            same folder continues from there, and ends with the same bytes.
        memory: bytes that the process may take; "4GB" is understood. None: as much as is of use, 5.3 GB
            plus what the model and the widest layer take. Layers that are too wide for it are fitted from
            their weights alone.
        workers: processes or machines that share the work, by `netdecouple.execution.executors.processes`,
            `dask`, or `Workers.of` for any executor. None: this process does all of it.
        shards: parts into which the inputs are cut, each a task of its own; 8 with workers, otherwise 1.
            With the same shards, results are the same whatever executes the tasks.

    Raises:
        BudgetError: the memory is not a number of bytes, or there is less than one shard.
    """

    work: str | os.PathLike[str] | None = None
    memory: int | str | None = None
    workers: Workers | None = None
    shards: int | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.shards is not None and self.shards < 1:
            raise BudgetError(f"shards={self.shards}: give 1 or more")

    @contextmanager
    def opened(self, model: int = 0, inputs: int = 0) -> Iterator[Run]:
        """Open a run on a model and inputs of so many bytes. Call `Run.claim` before it keeps anything.

        Raises:
            BudgetError: the model and the inputs alone take more than the memory.
            OutputError: the work folder cannot be written, is in use, or holds other files.
        """
        shards = self.shards or (1 if self.workers is None else SHARDS)
        memory = Memory.within(None if self.memory is None else parse_bytes(self.memory), model, inputs)
        shards_per_worker = -(-shards // (1 if self.workers is None else self.workers.count))
        store, worker_store = memory.store_bytes // shards, memory.store_bytes // shards_per_worker
        with closing(Checkpoint(self.work)) as checkpoint:
            folder = checkpoint.scratch
            memory = replace(memory, store_bytes=store, worker_store_bytes=worker_store, scratch=folder)
            yield Run(checkpoint=checkpoint, memory=memory, workers=self.workers, shards=shards)


@dataclass(frozen=True, kw_only=True)
class Run:
    """An open run. The default keeps nothing and executes everything in this process."""

    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    memory: Memory = field(default_factory=Memory)
    workers: Workers | None = None
    shards: int = 1

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the work folder this run's, by all that its results depend on (JSON), or raise OutputError."""
        about = {"memory": self.memory.limit, "shards": self.shards, "workers": self.workers is not None}
        self.checkpoint.claim({**identity, **about})

    def parts(self, count: int) -> list[slice]:
        """Cut so many inputs into shards of one input or more."""
        edges = [count * i // self.shards for i in range(self.shards + 1)]
        return [slice(a, b) for a, b in pairwise(edges) if a < b]

    def map(self, task: Task, args: Args, *, ordered: bool = True) -> Iterator[Any]:
        """Yield the results of a task for all ``args``, executed by the workers if there are any."""
        return (self.workers or ThisProcess()).map(task, args, ordered=ordered)

    def for_shards(self) -> Workers | ThisProcess:
        """Return an executor that keeps a shard's state from task to task, or a new one in this process."""
        return self.workers if self.workers is not None and self.workers.can_pin else ThisProcess()
