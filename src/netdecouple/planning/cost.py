"""What layers cost, and budgets for it.

A MAC is one multiply-add and counts as 1. Convolutions, fully connected and recurrent layers and matrix
products count; bias, BatchNorm, activations and additions do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from netdecouple.convolution import Structure
from netdecouple.errors import BudgetError
from netdecouple.network import Layer


@dataclass(frozen=True)
class Costs:
    """What a network's layers cost for one input."""

    macs: int
    parameters: int


class Replacement(Protocol):
    """What may replace a layer: a `planning.candidates.Candidate`."""

    @property
    def method(self) -> str: ...
    @property
    def structure(self) -> Structure: ...


class Cost(Protocol):
    """A counter of what layers cost, in one unit."""

    unit: str
    fixed: float  # cost of the network outside its layers

    def dense(self, layer: Layer) -> float:
        """Return the cost of the layer as it is."""

    def decoupled(self, layer: Layer, candidate: Replacement) -> float:
        """Return the cost of a candidate in the place of the layer."""


def total_cost(cost: Cost, layers: Iterable[Layer]) -> float:
    """Return the cost of the original network."""
    return cost.fixed + sum(cost.dense(layer) for layer in layers)


class Macs:
    """MACs for one input of the calibration inputs' size."""

    unit = "MACs"
    fixed = 0.0

    def dense(self, layer: Layer) -> int:
        return layer.macs

    def decoupled(self, layer: Layer, candidate: Replacement) -> int:
        return round(candidate.structure.macs(*layer.size) * layer.maps)


class Parameters:
    """Weights and biases."""

    unit = "parameters"
    fixed = 0.0

    def dense(self, layer: Layer) -> int:
        return layer.parameters

    def decoupled(self, layer: Layer, candidate: Replacement) -> int:
        return candidate.structure.parameters


@dataclass(frozen=True)
class Budget:
    """A limit on a network's total cost, as a share of the original's."""

    cost: Cost
    share: float

    def limit(self, layers: Iterable[Layer]) -> float:
        """Return the most that all layers together may cost."""
        return self.share * total_cost(self.cost, layers) - self.cost.fixed

    def __str__(self) -> str:
        return f"{100 * self.share:.4g}% {self.cost.unit}"


def parse_share(text: str | float) -> float:
    """Read a budget: 0.5, "50%" and "2x" (two times fewer) all mean one half.

    Raises:
        BudgetError: ``text`` is none of these, or the share is not above 0 and at most 1.
    """
    try:
        number, unit = str(text).strip()[:-1], str(text).strip()[-1:].lower()
        share = float(number) / 100 if unit == "%" else 1 / float(number) if unit == "x" else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise BudgetError(f"{text!r} is not a budget; write 50%, 2x or 0.5") from error
    if not 0 < share <= 1:
        raise BudgetError(f"a budget of {text} makes no sense; it is the share that may stay: 50%, 2x or 0.5")
    return share


def budgets_of(macs: str | float | None, parameters: str | float | None) -> list[Budget]:
    """Return the budgets that are given, of these two, in the notations of `parse_share`.

    Raises:
        BudgetError: one of them cannot be read.
    """
    given = ((Macs(), macs), (Parameters(), parameters))
    return [Budget(cost, parse_share(share)) for cost, share in given if share is not None]
