"""The stopwatch's arithmetic on made-up times, and in which order things take their turns."""

from __future__ import annotations

import time
from collections import Counter
from math import ceil

import numpy as np
import pytest

from netdecouple.runtimes.timing import FEWEST, TURN, WARM_UP, Ratio, Stopwatch, Timing, measure, rounds


def test_timing_is_quartiles():
    """A quarter of the rounds was faster than `lower`, half than `median`, three quarters than `upper`."""
    assert Timing.of(np.array([5.0, 1.0, 2.0, 4.0, 3.0])) == Timing(2, 3, 4)


def test_timing_withstands_an_interruption():
    """One round in which the machine did something else moves none of the three."""
    times = np.full(9, 2.0)
    times[4] = 500.0
    assert Timing.of(times) == Timing(2, 2, 2)


def test_ratio_is_how_many_times_faster():
    """10 ms against 5 ms is twice as fast; 5 ms against 10 ms half."""
    slow, fast = np.full(7, 10.0), np.full(7, 5.0)
    assert Ratio.of(slow, fast) == Ratio(2, 2, 2)
    assert Ratio.of(fast, slow) == Ratio(0.5, 0.5, 0.5)


def test_ratio_pairs_the_rounds():
    """The machine slows down fourfold meanwhile: each network's times spread, their ratio does not."""
    drift = np.linspace(1, 4, 50)
    assert Timing.of(10 * drift).lower < Timing.of(12 * drift).median < Timing.of(10 * drift).upper
    ratio = Ratio.of(12 * drift, 10 * drift)
    assert ratio.median == pytest.approx(1.2)
    assert ratio.upper - ratio.lower == pytest.approx(0)


def test_ratio_is_not_of_the_medians():
    """Three rounds, with ratios 1.5, 2 and 4."""
    assert Ratio.of(np.array([3.0, 4.0, 20.0]), np.array([2.0, 2.0, 5.0])).median == 2


@pytest.mark.parametrize(
    "ratios", [[0.9, 0.95, 1.0, 1.05, 1.1], [0.97, 0.99, 1.2, 1.3], [1.0, 1.0, 1.0], [0.8, 0.9, 1.3]]
)
def test_ratio_that_spreads_beyond_one_is_refused(ratios: list[float]):
    """If 1 lies within the quartiles there is no median to quote; the interval is told."""
    ratio = Ratio.of(np.array(ratios), np.ones(len(ratios)))
    assert ratio.median is None
    assert (ratio.lower, ratio.upper) == pytest.approx(tuple(np.percentile(ratios, (25, 75))))


def test_a_small_difference_that_is_steady_is_quoted():
    """Two percent in every round."""
    assert Ratio.of(np.linspace(1.015, 1.025, 21), np.ones(21)).median == pytest.approx(1.02)


def test_the_same_network_twice_is_refused():
    """Noise on both sides, no difference."""
    first, second = np.random.default_rng(0).lognormal(0, 0.1, (2, 200))
    assert Ratio.of(first, second).median is None


def test_rounds_take_all_and_mix_them():
    """Every round has everyone once, and nobody always comes after the same other."""
    orders = list(rounds(3, 3600, most=60))
    assert len(orders) == 60
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(Counter(map(tuple, orders))) == 6


def test_rounds_are_the_same_every_time():
    """The order follows from the seed."""
    assert list(rounds(4, 0, seed=1)) == list(rounds(4, 0, seed=1)) != list(rounds(4, 0, seed=2))


def test_there_are_a_few_rounds_however_short_the_time():
    """Quartiles need them."""
    assert len(list(rounds(2, 0))) == FEWEST


@pytest.mark.parametrize(("first", "warm_up"), [(2.0, WARM_UP), (60.0, 1)])
def test_measure_warms_up_and_calls_everyone_as_often(
    first: float, warm_up: int, monkeypatch: pytest.MonkeyPatch
):
    """A row per round, a column per call; the first calls are not counted, one if it takes long.

    On a clock on which every call takes 2 ms, but for the first ones.
    """
    now, calls = [0.0], [0, 0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(index: int) -> None:
        calls[index] += 1
        now[0] += 1e-3 * (2.0 if calls[index] > 1 else first)

    times = measure([lambda: work(0), lambda: work(1)], 0)
    np.testing.assert_allclose(times, np.full((FEWEST, 2), 2.0))
    turn = 1 if warm_up == 1 else ceil(TURN / 2.0)
    assert calls == [warm_up + turn * FEWEST] * 2


def test_a_stopwatch_stands_still_while_others_have_the_processor():
    """With one thread. With more, this process's time says nothing about how long a call takes.

    Nothing here starts threads of NumPy's: they go on counting for a while after their work.
    """
    calls = [lambda: time.sleep(0.005), lambda: sum(range(50_000))]
    for threads in (1, 2):
        stopwatch = Stopwatch(threads)
        assert stopwatch.lost == 0
        waiting, computing = stopwatch.times(calls, 0.1)
        assert computing > 0
        assert (waiting < 2.5) == (threads == 1)
        assert (stopwatch.lost > 0.1) or threads > 1


def test_a_stopwatch_passes_over_calls_that_were_interrupted(monkeypatch: pytest.MonkeyPatch):
    """A clock on which every other call takes ten times as long, the rest 1 ms."""
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 0.01 if calls[0] % 2 else 0.001

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    stopwatch = Stopwatch(2)
    assert stopwatch.times([call], 0.5) == pytest.approx([1.0])
    assert stopwatch.lost == pytest.approx(1 - 2 / 11, abs=0.05)
