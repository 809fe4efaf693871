"""Measure time: the only place where networks are timed.

Networks that are compared run in turn, round by round, in a new random order each time: other load of the
machine affects all alike, and none always runs after the same other. A speedup is the median of the ratios
within rounds; there is none where the quartiles are on both sides of 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netdecouple.execution.progress import Progress, quiet

WARM_UP = 3  # calls before the first round
FEWEST = 5  # rounds, however short the time
FEW = 3  # the same where slow rounds are corrected for other work
FINE = 1e-6  # seconds that a clock can tell apart, if it is to measure single calls
TURN = 5.0  # ms that a turn lasts at least: long enough for the caches to hold the network's data


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: quartiles over rounds."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, times: NDArray[np.floating]) -> Timing:
        """Summarise milliseconds per call (rounds,)."""
        lower, median, upper = np.percentile(times, (25, 50, 75))
        return cls(float(lower), float(median), float(upper))


@dataclass(frozen=True)
class Ratio:
    """How many times faster one network is than another: quartiles of the ratios within each round."""

    lower: float
    median: float | None  # None: no measurable difference, the quartiles are on both sides of 1
    upper: float

    @classmethod
    def of(cls, slower: NDArray[np.floating], faster: NDArray[np.floating]) -> Ratio:
        """Compare milliseconds per call (rounds,) of two networks that took turns."""
        lower, median, upper = (float(q) for q in np.percentile(slower / faster, (25, 50, 75)))
        return cls(lower, None if lower <= 1 <= upper else median, upper)


def rounds(
    count: int,
    seconds: float,
    *,
    fewest: int | None = None,
    most: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> Iterator[list[int]]:
    """Yield the order in which ``count`` networks run, round by round, until the time is over.

    ``progress`` is called with the seconds that have passed.
    """
    rng = np.random.default_rng(seed)
    start, total = time.perf_counter(), ceil(seconds)
    done, passed = 0, 0.0
    while done < (fewest or FEWEST) or (passed < seconds and (most is None or done < most)):
        yield rng.permutation(count).tolist()
        done, passed = done + 1, time.perf_counter() - start
        progress("Timing", min(int(passed), total), total)
    progress("Timing", total, total)


def measure(
    calls: Sequence[Callable[[], Any]], seconds: float, *, seed: int = 0, progress: Progress = quiet
) -> NDArray[np.float64]:
    """Return milliseconds per call (rounds, calls), measured in turn for ``seconds``."""
    repeats = [_repeats(call) for call in calls]
    rows: list[list[float]] = []
    for order in rounds(len(calls), seconds, seed=seed, progress=progress):
        row = [0.0] * len(calls)
        for index in order:
            row[index] = _turn(calls[index], repeats[index])
        rows.append(row)
    return np.array(rows)


class Stopwatch:
    """Measures calls in turn, as they are when nothing else runs; for plans, which are to be the same then.

    Other processes only add to times, so each call's lowest decile counts. Calls that run in one thread are
    measured in this process's own time, which stands still while another one has the core.
    """

    def __init__(self, threads: int) -> None:
        is_fine = time.get_clock_info("process_time").resolution <= FINE
        self._clock = time.process_time if threads == 1 and is_fine else time.perf_counter
        self._needed = self._spent = 0.0

    @property
    def lost(self) -> float:
        """The share of the time of all calls so far that other work took."""
        return max(1 - self._needed / self._spent, 0.0) if self._spent else 0.0

    def times(self, calls: Sequence[Callable[[], Any]], seconds: float) -> NDArray[np.float64]:
        """Return milliseconds per call (calls,), measured for ``seconds``."""
        repeats = [_repeats(call) for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        for order in rounds(len(calls), seconds, fewest=FEW):
            for index in order:
                begin = time.perf_counter()
                for _ in range(repeats[index]):
                    start = self._clock()
                    calls[index]()
                    times[index].append(self._clock() - start)
                self._spent += time.perf_counter() - begin
        lowest = np.array([np.quantile(of_call, 0.1) for of_call in times])
        self._needed += float(lowest @ [len(of_call) for of_call in times])
        return 1e3 * lowest


def _repeats(call: Callable[[], Any]) -> int:
    """Warm up, and return how many calls fill a turn; the first call is enough if it takes far longer."""
    last = _turn(call, 1)
    for _ in range(WARM_UP - 1 if last < 4 * TURN else 0):
        last = min(last, _turn(call, 1))
    return max(1, ceil(TURN / max(last, 1e-3)))


def _turn(call: Callable[[], Any], repeats: int) -> float:
    """Measure milliseconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - start) / repeats
