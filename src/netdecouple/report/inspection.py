"""The layers of a network before it is decoupled: costs, principal components, smallest budgets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from netdecouple.families import Problem
from netdecouple.families.base import reference
from netdecouple.network import Array, Layer
from netdecouple.planning.candidates import least_cost
from netdecouple.planning.cost import Macs, Parameters
from netdecouple.report.build import describe


@dataclass(frozen=True)
class Inspection:
    """The layers of a network; ``energy`` are cumulative shares of their weights' energy by T."""

    model: str
    layers: tuple[Layer, ...]
    energy: dict[str, Array]
    least_macs: int
    least_parameters: int

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    def to_json(self) -> str:
        """Return everything but the weights as JSON text."""
        layers = [
            {
                "name": layer.name,
                "operator": layer.operator,
                "shape": describe(layer),
                "macs": layer.macs,
                "parameters": layer.parameters,
                "reason": layer.reason,
                "energy": [float(share) for share in self.energy.get(layer.name, ())],
            }
            for layer in self.layers
        ]
        totals = {
            "model": self.model,
            "macs": self.macs,
            "least_macs": self.least_macs,
            "parameters": self.parameters,
            "least_parameters": self.least_parameters,
        }
        return json.dumps(totals | {"layers": layers}, indent=1, ensure_ascii=False) + "\n"


def energies(layers: Iterable[Layer]) -> dict[str, Array]:
    """The share of the weights' energy in their first T components, of every layer that can be decoupled."""
    family = reference()()
    return {
        layer.name: family.energies(Problem.data_free(layer.geometry, layer.weight, layer.bias))
        for layer in layers
        if layer.geometry is not None and not layer.reason and not layer.geometry.is_pointwise
    }


def inspection(origin: str, layers: tuple[Layer, ...]) -> Inspection:
    """Compute the inspection of the layers of a network."""
    energy = energies(layers)
    least = [
        sum(cost.dense(layer) if layer.reason else least_cost(layer, cost) for layer in layers)
        for cost in (Macs(), Parameters())
    ]
    return Inspection(origin, layers, energy, *least)
