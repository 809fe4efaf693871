"""The recommended point of a curve of networks that get smaller and lose more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEGLIGIBLE = 0.01  # KL or relative error; a smaller loss cannot be noticed
RUINED = 0.5  # KL or relative error; beyond, a network is of no use, however large the loss
BEND = 0.05  # of the curve's height: how far below its chord a knee must lie


def is_flat(losses: Sequence[float]) -> bool:
    """Return whether no point loses anything that can be noticed."""
    return max(losses, default=0.0) < NEGLIGIBLE


def knee(reductions: Sequence[float], losses: Sequence[float]) -> int | None:
    """Return the index of the point beyond which every further saving costs more than those before.

    The curve starts at the original network, which loses nothing, and goes through the points in the plane of
    the logarithm of the reduction (how many times fewer MACs) and the loss. Points that another one beats in
    both are left out. A loss beyond 0.5 counts as 0.5, and the first such point ends the curve. Both axes are
    scaled to 1. The knee is the point farthest below the chord from the curve's start to its end (Satopää et
    al. 2011, "Kneedle").

    If all losses are below 0.01 the curve is flat, and the point of the greatest reduction is recommended. If
    no point lies 0.05 below the chord (a straight line, or all is lost at once) there is no knee: None.
    """
    if not losses:
        return None
    if is_flat(losses):
        return max(range(len(losses)), key=lambda i: reductions[i])
    front: list[int] = []
    for i in sorted(range(len(losses)), key=lambda i: (-reductions[i], losses[i])):
        if not front or losses[i] < losses[front[-1]]:
            front.append(i)
    front.reverse()  # the smallest reduction first
    end = next((n for n, i in enumerate(front) if losses[i] >= RUINED), len(front))
    front = front[: end + 1]
    saved = np.log([reductions[i] for i in front])
    lost = np.minimum([losses[i] for i in front], RUINED)
    if saved[-1] <= 0 or lost[-1] <= 0:
        return None
    below = saved / saved[-1] - lost / lost[-1]
    best = int(np.argmax(below))
    return front[best] if below[best] >= BEND else None
