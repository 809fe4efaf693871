"""Work that others do: on more cores, or more machines, through `concurrent.futures`.

A piece of work is a function and what it is done with; it gives the same whoever does it, so one that was
lost is done again. What many pieces need, a network above all, is opened by every worker once, and held.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as ended
from typing import Any

from netdecouple.errors import ModelError, UnavailableError
from netdecouple.execution import threads

HELD = 4  # things that a worker keeps
LOSSES = 3  # times that a piece of work may be lost with the worker that does it


@dataclass(frozen=True)
class Common:
    """Something large that many pieces of work need.

    Args:
        key: tells it from all else, in every process.
        here: it, in this process.
        recipe: a function, to be pickled, that makes it elsewhere.
    """

    key: str
    here: Callable[[], Any]
    recipe: Callable[[], Callable[[], Any]]


@dataclass
class _Lane:
    """A worker, or several that share their work out themselves, and how to get others when they are gone."""

    executor: Executor
    name: str = ""
    renew: Callable[[], _Lane] | None = None
    end: Callable[[], object] | None = None  # whatever is being done

    def take(self, other: _Lane) -> None:
        """Have another's workers."""
        self.executor, self.end = other.executor, other.end


@dataclass
class _Piece:
    """A piece of work under way."""

    own: tuple[Any, ...]
    lane: _Lane
    future: Future[Any]
    losses: int = 0


@dataclass(frozen=True)
class _Missing:
    """What a worker answers that does not hold something."""

    keys: tuple[str, ...]


class Workers:
    """Those who work.

    Args:
        lanes: one executor for each worker, or a single one for all.
        count: how many pieces of work they do at once.
        threads: that each may use; None: whatever it does.
        present: tells who is there now.
    """

    def __init__(
        self,
        lanes: Sequence[_Lane],
        count: int,
        threads: int | None = 1,
        present: Callable[[], list[_Lane]] | None = None,
    ) -> None:
        self._lanes = list(lanes)
        self.count = count
        self._threads = threads
        self._present = present

    @property
    def is_steady(self) -> bool:
        """Whether each of them can be spoken to, and so can keep something for later."""
        return len(self._lanes) == self.count

    def refresh(self) -> None:
        """Put others in the place of those that are gone, where that is not found out by itself."""
        if self._present is None:
            return
        there = {lane.name: lane for lane in self._present()}
        others = list(there.values())
        self._lanes = [
            there.get(lane.name, others[i % len(others)] if others else lane)
            for i, lane in enumerate(self._lanes)
        ]

    @classmethod
    def of(cls, executor: Executor, count: int) -> Workers:
        """Anybody's executor, that does ``count`` things at once. When it breaks, the run ends."""
        return cls([_Lane(executor)], count, None)

    def each(
        self,
        work: Callable[..., Any],
        common: Sequence[Common],
        owns: Iterable[tuple[Any, ...]],
        ordered: bool = True,
        places: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """Yield ``work(*common, *own)`` for all of ``owns``; one more than there are workers is under way.

        Args:
            work: a function of a module.
            common: what all pieces need.
            owns: what each has of its own, to be pickled.
            ordered: keep the order, or yield what there is as soon as it is there.
            places: numbers that tell who does each: equal ones, the same worker; None: who has least to do.

        Raises:
            UnavailableError: workers keep dying.
            Exception: whatever the work raises.
        """
        keys = tuple(part.key for part in common)
        recipes: dict[str, bytes] = {}

        def begin(own: tuple[Any, ...], lane: _Lane, missing: Sequence[str] = ()) -> Future[Any]:
            for part in common:
                if part.key in missing and part.key not in recipes:
                    recipes[part.key] = _pickled(part.recipe())
            given = {key: recipes[key] for key in missing}
            return lane.executor.submit(_done, work, keys, given, own, self._threads)

        source, wanted = iter(owns), None if places is None else iter(places)
        pieces: list[_Piece] = []
        try:
            while True:
                while len(pieces) <= self.count and (own := next(source, None)) is not None:
                    place = None if wanted is None else next(wanted) % len(self._lanes)
                    lane = self._idlest(pieces) if place is None else self._lanes[place]
                    pieces.append(self._started(own, lane, begin))
                if not pieces:
                    return
                wait([p.future for p in pieces if not _is_found(p)], return_when=FIRST_COMPLETED)
                for piece in [p for p in pieces if p.future.done()]:
                    try:
                        found = piece.future.result()
                    except Exception as error:
                        self._again(piece, error, begin)
                        continue
                    if isinstance(found, _Missing):
                        piece.future = begin(piece.own, piece.lane, found.keys)
                found_ones = [p for p in pieces if _is_found(p)]
                if ordered:
                    found_ones = pieces[
                        : next((i for i, p in enumerate(pieces) if not _is_found(p)), len(pieces))
                    ]
                for piece in found_ones:
                    pieces.remove(piece)
                    yield piece.future.result()
        finally:
            for piece in pieces:
                piece.future.cancel()

    def _idlest(self, pieces: Sequence[_Piece]) -> _Lane:
        return min(self._lanes, key=lambda lane: sum(piece.lane is lane for piece in pieces))

    def _started(self, own: tuple[Any, ...], lane: _Lane, begin: Callable[..., Future[Any]]) -> _Piece:
        try:
            return _Piece(own, lane, begin(own, lane))
        except BrokenExecutor as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return _Piece(own, lane, failed)

    def _again(self, piece: _Piece, error: Exception, begin: Callable[..., Future[Any]]) -> None:
        """Do a piece of work again whose worker is gone.

        Raises:
            UnavailableError: that has happened too often, or there are no others.
            Exception: the error, if it is the work's own.
        """
        if not isinstance(error, BrokenExecutor) and type(error).__name__ != "KilledWorker":
            raise error
        piece.losses += 1
        if piece.losses > LOSSES or piece.lane.renew is None:
            raise UnavailableError(
                f"workers ended while they were at work ({error}); if they ran out of memory, give fewer "
                "--workers or less --memory, and start again"
            ) from error
        if isinstance(error, BrokenExecutor) and _is_broken(piece.lane.executor):
            piece.lane.take(piece.lane.renew())
        piece.future = begin(piece.own, piece.lane)

    def close(self) -> None:
        """Let them go; what they are at is lost."""
        for lane in self._lanes:
            lane.executor.shutdown(wait=False, cancel_futures=True)
            if lane.end is not None:
                lane.end()


def _is_found(piece: _Piece) -> bool:
    future = piece.future
    return future.done() and future.exception() is None and not isinstance(future.result(), _Missing)


def _is_broken(executor: Executor) -> bool:
    """Whether nobody else has renewed it meanwhile."""
    try:
        executor.submit(_nothing).cancel()
    except BrokenExecutor:
        return True
    return False


def _nothing() -> None:
    """What tells that an executor still takes work."""


def _pickled(recipe: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(recipe)
    except Exception as error:  # modules may hold anything
        raise ModelError(f"the network cannot be sent to workers ({error}); run without them") from error


_held: OrderedDict[str, Any] = OrderedDict()
_at_work = threading.Lock()


def _done(
    work: Callable[..., Any],
    keys: Sequence[str],
    given: dict[str, bytes],
    own: tuple[Any, ...],
    count: int | None,
) -> Any:
    """Do a piece of work, in a worker; one at a time, where workers are threads of one process."""
    with _at_work:
        if count is not None and count != threads.available():
            threads.limit(count)
        for key, recipe in given.items():
            if key not in _held:
                _held[key] = _made(recipe)
        for key in keys:
            if key in _held:
                _held.move_to_end(key)
        while len(_held) > HELD:
            _held.popitem(last=False)
        missing = tuple(key for key in keys if key not in _held)
        return _Missing(missing) if missing else work(*(_held[key] for key in keys), *own)


def _made(recipe: bytes) -> Any:
    """Make what the run itself has described."""
    try:
        described = pickle.loads(recipe)
    except Exception as error:  # importing a module may do anything
        raise ModelError(
            f"a worker cannot open what it was sent ({type(error).__name__}: {error}); have the same "
            "packages and modules there as here"
        ) from error
    return described()


def each(
    workers: Workers | None,
    work: Callable[..., Any],
    common: Sequence[Common],
    owns: Iterable[tuple[Any, ...]],
    ordered: bool = True,
) -> Iterator[Any]:
    """Do as `Workers.each`; without any, here, one after the other."""
    if workers is not None:
        yield from workers.each(work, common, owns, ordered)
        return
    for own in owns:
        yield work(*(part.here() for part in common), *own)


@contextmanager
def processes(count: int) -> Iterator[Workers]:
    """Processes on this machine, of one thread each; one that dies is replaced.

    Raises:
        UnavailableError: fewer than one is asked for.
    """
    if count < 1:
        raise UnavailableError(f"--workers {count}: give 1 or more")
    workers = Workers([_process() for _ in range(count)], count)
    try:
        yield workers
    finally:
        workers.close()


def _process() -> _Lane:
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(1, context, _begun, (theirs,))
    return _Lane(pool, renew=_process, end=ours.close)


def _begun(other: Connection) -> None:
    """Get ready, in a new process: Ctrl-C is not for it, and it ends when nobody wants it any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    watched = [other] if parent is None else [other, parent.sentinel]
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: list[Any]) -> None:
    """Whatever may be going on, end when the other end of a pipe does, or the process that began this."""
    ended(watched)
    os._exit(1)


@contextmanager
def dask(address: str) -> Iterator[Workers]:
    """The workers of a Dask cluster, by its scheduler's address: tcp://host:8786.

    Raises:
        UnavailableError: Dask is not installed, or there is no scheduler, or it has no workers.
    """
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise UnavailableError(
            f"--scheduler needs Dask ({error}); pip install 'netdecouple[dask]', here and on the workers"
        ) from error
    try:
        client = distributed.Client(address, timeout="10s", set_as_default=False)
    except Exception as error:  # OSError, ValueError, TimeoutError, as it comes
        raise UnavailableError(f"--scheduler {address}: nobody answers there ({error})") from error
    try:
        found = client.nthreads()
        if not found:
            raise UnavailableError(
                f"--scheduler {address}: it has no workers; start some: dask worker {address}"
            )

        def present() -> list[_Lane]:
            """One lane for each; what is lost with a worker, Dask has another do again."""
            return [
                _Lane(client.get_executor(workers=[worker], allow_other_workers=True), worker)
                for worker in client.nthreads()
            ]

        with warnings.catch_warnings():  # shards and moments are what is to be sent
            warnings.filterwarnings("ignore", "Sending large graph")
            yield Workers(present(), len(found), present=present)
    finally:
        client.close()


def opened(workers: int | None, scheduler: str | None) -> AbstractContextManager[Workers | None]:
    """A context of workers, as the command line names them; of none at all if it names none.

    Raises:
        UnavailableError: both are named, or they are not to be had.
    """
    if workers is not None and scheduler is not None:
        raise UnavailableError("give --workers or --scheduler, and not both")
    if scheduler is not None:
        return dask(scheduler)
    return nullcontext() if workers is None else processes(workers)


def same(value: Any) -> Callable[[], Any]:
    """A recipe that holds the thing itself."""
    return partial(_same, value)


def _same(value: Any) -> Any:
    return value
