"""Execute tasks in this process, in worker processes, on a Dask cluster, or in any executor.

A task is a function of a module and its arguments. It returns the same wherever it is executed, so a task
that was lost together with its worker is executed again. Large arguments that many tasks share are `Shared`:
each worker receives them once and keeps them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import Any

from netdecouple.errors import ModelError, NetDecoupleError, UnavailableError
from netdecouple.execution import threads

Task = Callable[..., Any]
Args = Iterable[tuple[Any, ...]]
RECENT = 4  # shared arguments without a group that a worker keeps
LOSSES = 3  # times that a task may be lost together with the worker that executes it


@dataclass(frozen=True)
class Shared:
    """An argument that many tasks share, or that a worker changes from task to task.

    Args:
        key: identifies it in every process.
        load: returns it in this process; for workers it is pickled.
        group: empty: it never changes, and workers keep those used last. Otherwise tasks change it, and
            workers keep it until `Workers.forget`, or until they receive one of another group.
    """

    key: str
    load: Callable[[], Any]
    group: str = ""


class Stale(Exception):
    """Raised by a task if an argument with a group is not in the state that the task needs.

    The argument is loaded and sent again, and the task is executed again.
    """


class ThisProcess:
    """Executes tasks in this process, one after the other; its methods are those of `Workers`."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def map(self, task: Task, args: Args, *, ordered: bool = True, pinned: bool = False) -> Iterator[Any]:
        for arguments in args:
            yield task(*(self._value(a) if isinstance(a, Shared) else a for a in arguments))

    def _value(self, shared: Shared) -> Any:
        if shared.key not in self._loaded:
            self._loaded[shared.key] = shared.load()
        return self._loaded[shared.key]

    def forget(self, group: str) -> None:
        self._loaded.clear()


@dataclass(eq=False)
class _Submitted:
    arguments: tuple[Any, ...]
    slot: int
    executor: Executor | None = None
    future: Future[Any] = field(default_factory=Future)
    losses: int = 0

    @property
    def has_result(self) -> bool:
        f = self.future
        return f.done() and f.exception() is None and not isinstance(f.result(), _Missing)


class Workers:
    """Executes tasks on several workers.

    Args:
        slots: one executor for each worker, or a single one for all of them.
        count: how many tasks are executed at once.
        threads: how many each worker may use; None: workers keep the number that they have.
        start: makes an executor in place of one that has broken; None: the run ends.
    """

    def __init__(
        self,
        slots: Sequence[Executor],
        count: int,
        threads: int | None = 1,
        start: Callable[[], Executor] | None = None,
    ) -> None:
        self._slots = list(slots)
        self.count = count
        self._threads = threads
        self._start = start

    @classmethod
    def of(cls, executor: Executor, count: int) -> Workers:
        """Use any executor, which executes ``count`` tasks at once. When it breaks, the run ends."""
        return cls([executor], count, None)

    @property
    def can_pin(self) -> bool:
        """Whether tasks can be pinned to one worker each, so that workers can keep state between tasks."""
        return len(self._slots) == self.count

    def map(self, task: Task, args: Args, *, ordered: bool = True, pinned: bool = False) -> Iterator[Any]:
        """Yield ``task(*arguments)`` for all ``args``; one more task than there are workers is submitted.

        Args:
            task: a function of a module.
            args: arguments, to be pickled, and `Shared` ones.
            ordered: keep the order; otherwise results are yielded as they arrive.
            pinned: execute the n-th task of every call on the same worker.

        Raises:
            UnavailableError: workers keep dying.
            ModelError: a shared argument cannot be pickled, or not unpickled by the workers.
            Exception: whatever the task raises.
        """
        self._refresh()
        pickled: dict[str, bytes] = {}

        def submit(t: _Submitted, missing: Collection[str] = ()) -> None:
            given = {}
            for shared in (a for a in t.arguments if isinstance(a, Shared) and a.key in missing):
                given[shared.key] = pickled.get(shared.key) or _pickled(shared)
                if not shared.group:  # other tasks need it as well
                    pickled[shared.key] = given[shared.key]
            sent = [_Reference(a.key, a.group) if isinstance(a, Shared) else a for a in t.arguments]
            t.executor = self._slots[t.slot]
            try:
                t.future = t.executor.submit(_execute, task, sent, given, self._threads)
            except BrokenExecutor as error:
                t.future = Future()
                t.future.set_exception(error)

        numbered = enumerate(args)
        tasks: list[_Submitted] = []
        try:
            while True:
                for index, arguments in islice(numbered, self.count + 1 - len(tasks)):
                    load = Counter(t.slot for t in tasks)
                    least = min(range(len(self._slots)), key=load.__getitem__)
                    tasks.append(_Submitted(arguments, index % len(self._slots) if pinned else least))
                    submit(tasks[-1])
                if not tasks:
                    return
                wait([t.future for t in tasks if not t.has_result], return_when=FIRST_COMPLETED)
                for t in [t for t in tasks if t.future.done() and not t.has_result]:
                    error = t.future.exception()
                    if error is not None:
                        self._lost(t, error)
                    submit(t, () if error is not None else t.future.result().keys)
                for t in list(tasks):
                    if t.has_result:
                        tasks.remove(t)
                        yield t.future.result()
                    elif ordered:
                        break
        finally:
            for t in tasks:
                t.future.cancel()

    def _lost(self, t: _Submitted, error: BaseException) -> None:
        """Prepare for executing a task again whose worker has died, unless that has happened too often.

        Raises the error itself if the task raised it.
        """
        if not isinstance(error, BrokenExecutor) and type(error).__name__ != "KilledWorker":  # Dask's
            raise error
        t.losses += 1
        if t.losses > LOSSES or not self._replaced(t.slot, t.executor):
            raise UnavailableError(
                f"workers died while they executed tasks ({error}); if they ran out of memory, give fewer "
                "workers= or less memory=, and start again"
            ) from error

    def _refresh(self) -> None:
        """Replace workers that have gone, where nothing else does."""

    def _replaced(self, slot: int, executor: Executor | None) -> bool:
        """Replace a slot's broken executor, if it is still this one; return whether that can be done."""
        if self._start is not None and self._slots[slot] is executor:
            self._slots[slot] = self._start()
        return self._start is not None

    def forget(self, group: str) -> None:
        """Have all workers drop the shared arguments of a group."""
        list(self.map(_forget, [(group,)] * len(self._slots), pinned=True))

    def close(self) -> None:
        """End the workers, with what they are executing."""
        for executor in self._slots:
            executor.shutdown(wait=False, cancel_futures=True)


def _pickled(shared: Shared) -> bytes:
    try:
        return pickle.dumps(shared.load())
    except NetDecoupleError:
        raise
    except Exception as error:  # modules may hold anything
        raise ModelError(f"the network cannot be sent to workers ({error}); run without workers=") from error


@dataclass(frozen=True)
class _Reference:
    """Stands for a shared argument on its way to a worker."""

    key: str
    group: str


@dataclass(frozen=True)
class _Missing:
    """A worker's answer if it does not have some shared arguments."""

    keys: tuple[str, ...]


class _Kept:
    """The shared arguments that a worker process keeps, by group and key."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.groups: dict[str, dict[str, Any]] = {"": {}}

    def execute(self, task: Task, args: Sequence[Any], given: dict[str, bytes]) -> Any:
        """Return what a task returns, or which shared arguments are missing."""
        references = [a for a in args if isinstance(a, _Reference)]
        for r in references:
            if r.group not in self.groups:  # the others are of calls that have ended
                self.groups = {"": self.groups[""], r.group: {}}
            values = self.groups[r.group]
            if r.key in values:
                values[r.key] = values.pop(r.key)  # the last one is the one used last
            elif r.key in given:
                values[r.key] = _unpickled(given[r.key])
        for key in list(self.groups[""])[:-RECENT]:
            del self.groups[""][key]
        missing = tuple(r.key for r in references if r.key not in self.groups[r.group])
        if missing:
            return _Missing(missing)
        try:
            return task(*(self.groups[a.group][a.key] if isinstance(a, _Reference) else a for a in args))
        except Stale:
            stale = [r for r in references if r.group]
            for r in stale:
                del self.groups[r.group][r.key]
            return _Missing(tuple(r.key for r in stale))


_kept = _Kept()  # of this process; global, as executors of other libraries run no initialiser of ours


def _execute(task: Task, args: Sequence[Any], given: dict[str, bytes], count: int | None) -> Any:
    """Execute a task in a worker; only one at a time where workers are threads of one process."""
    with _kept.lock:
        if count is not None and count != threads.available():
            threads.limit(count)
        return _kept.execute(task, args, given)


def _forget(group: str) -> None:
    """Drop a group of shared arguments; a task."""
    _kept.groups.pop(group, None)


def _unpickled(data: bytes) -> Any:
    try:
        return pickle.loads(data)  # of the process that started the run
    except NetDecoupleError:
        raise
    except Exception as error:  # importing a module may do anything
        raise ModelError(
            f"a worker cannot open what it was sent ({type(error).__name__}: {error}); install the same "
            "packages and modules there"
        ) from error


class _Process(ProcessPoolExecutor):
    """One worker process, which ends with this one, and at once when it is shut down."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        theirs, self._pipe = context.Pipe(duplex=False)
        super().__init__(1, context, _initialise, (theirs,))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        self._pipe.close()


def _initialise(pipe: Connection) -> None:
    """Initialise a worker process: ignore SIGINT, and exit when the parent exits or closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    watched: list[Any] = [pipe] if parent is None else [pipe, parent.sentinel]

    def exit_with_parent() -> None:
        wait_for_any(watched)
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@contextmanager
def processes(count: int) -> Iterator[Workers]:
    """Start processes on this machine, of one thread each; one that dies is replaced.

    Raises:
        UnavailableError: the count is less than one.
    """
    if count < 1:
        raise UnavailableError(f"workers={count}: give 1 or more")
    with closing(Workers([_Process() for _ in range(count)], count, start=_Process)) as workers:
        yield workers


class _Dask(Workers):
    """The workers of a Dask cluster. Dask itself executes again what is lost with one of them."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._names = list(client.nthreads())
        super().__init__([self._executor(name) for name in self._names], len(self._names))

    def _executor(self, name: str) -> Executor:
        executor: Executor = self._client.get_executor(workers=[name], allow_other_workers=True)
        return executor

    def _refresh(self) -> None:
        present = list(self._client.nthreads())
        others = [name for name in present if name not in self._names] or present
        for slot, name in enumerate(self._names):
            if name not in present and others:
                self._names[slot] = others[slot % len(others)]
                self._slots[slot] = self._executor(self._names[slot])

    def _replaced(self, slot: int, executor: Executor | None) -> bool:
        self._refresh()
        return True


@contextmanager
def dask(address: str) -> Iterator[Workers]:
    """Use the workers of a Dask cluster, by its scheduler's address: tcp://host:8786.

    Raises:
        UnavailableError: Dask is not installed, no scheduler answers, or it has no workers.
    """
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise UnavailableError(
            f"scheduler= needs Dask ({error}); pip install 'netdecouple[dask]', here and on the workers"
        ) from error
    try:
        client = distributed.Client(address, timeout="10s", set_as_default=False)
    except Exception as error:  # OSError, ValueError or TimeoutError
        raise UnavailableError(f"scheduler={address}: no scheduler answers there ({error})") from error
    try:
        if not client.nthreads():
            raise UnavailableError(
                f"scheduler={address}: it has no workers; start some: dask worker {address}"
            )
        with warnings.catch_warnings():  # shards and moments are large
            warnings.filterwarnings("ignore", "Sending large graph")
            yield _Dask(client)
    finally:
        client.close()


def opened(workers: int | None, scheduler: str | None) -> AbstractContextManager[Workers | None]:
    """Start so many worker processes, use a scheduler's workers, or neither; UnavailableError for both."""
    if workers is not None and scheduler is not None:
        raise UnavailableError("give workers= or scheduler=, not both")
    if scheduler is not None:
        return dask(scheduler)
    return nullcontext() if workers is None else processes(workers)
