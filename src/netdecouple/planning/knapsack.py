"""The choice of one option per layer: least total loss, every total cost within its limit.

A multiple-choice knapsack, solved exactly by HiGHS through scipy.optimize.milp.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from netdecouple.errors import BudgetError

GAP = 1e-5  # relative to the best total loss: closer solutions count as equal
SECONDS = 60.0  # for one solution
# The solver may overshoot a limit by its tolerance of 1e-6, the choice may not: then it is solved again for
# limits that are smaller by these shares.
SLACKS = (0.0, 2e-6, 1e-5)
ROUNDING = 1e-12  # relative; of sums of costs


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a layer: its loss, and its cost in the unit of every budget."""

    loss: float
    costs: tuple[float, ...]


def choose(layers: Sequence[Sequence[Option]], limits: Sequence[float]) -> list[int]:
    """Return the index of one option per layer: minimal total loss with every total cost at most its limit.

    Raises:
        BudgetError: no choice meets the limits.
    """
    sizes = [len(options) for options in layers]
    ends = np.cumsum(sizes, dtype=np.int64)
    starts = ends - sizes
    losses = np.array([o.loss for options in layers for o in options])
    costs = np.array([o.costs for options in layers for o in options], float).T  # (budgets, options)
    least = np.minimum.reduceat(costs, starts, axis=1)  # (budgets, layers)
    fewest, limit = least.sum(axis=1), np.asarray(limits, float)
    # a limit that is the least but for rounding can be met
    limit = np.where(limit >= fewest * (1 - ROUNDING), np.maximum(limit, fewest), limit)
    room = limit - fewest  # (budgets,) to spend beyond the least
    above = costs - np.repeat(least, sizes, axis=1)
    possible = np.all(above <= room[:, None], axis=0)
    scale = np.where(room > 0, room, 1.0)
    # options beyond the room are excluded by their bounds; huge coefficients would only disturb the solver
    above = np.where(possible, above / scale[:, None], 0.0)
    one_each = np.repeat(np.eye(len(layers)), sizes, axis=1)
    for slack in SLACKS:
        with _native_output_discarded():
            solution = milp(
                losses / max(losses.max(initial=0.0), np.finfo(float).tiny),
                constraints=[
                    LinearConstraint(one_each, 1, 1),
                    LinearConstraint(above, -np.inf, room / scale * (1 - slack)),
                ],
                integrality=np.ones(len(losses)),
                bounds=Bounds(0, possible.astype(float)),
                # without presolve HiGHS prints fewer lines, whatever its options
                options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": False},
            )
        if solution.x is None:
            break
        picks = [int(np.argmax(solution.x[start:end])) for start, end in zip(starts, ends, strict=True)]
        if np.all(costs[:, np.array(picks) + starts].sum(axis=1) <= limit):
            return picks
    raise BudgetError("the budgets cannot be met together; let more stay of one of them")


@contextmanager
def _native_output_discarded() -> Iterator[None]:
    """Discard what HiGHS prints to descriptor 1 now and then, unless Python prints there as well.

    The command line lets Python print to another one.
    """
    try:
        is_shared = sys.stdout.fileno() == 1
    except (AttributeError, OSError, ValueError):  # it is closed, or no file
        is_shared = True
    if is_shared or os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush  # C holds back what goes to files and pipes
    flush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
