"""The plan: what is done to every layer, and everything needed to do it again. Frozen; JSON in and out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from netdecouple import records
from netdecouple.errors import PlanError
from netdecouple.execution import limits
from netdecouple.families.chain import Step
from netdecouple.network import INPUT_SHAPE, Layer
from netdecouple.planning.cost import Costs
from netdecouple.planning.divergence import Loss
from netdecouple.version import __version__

VERSION = 5
KEPT = "kept"  # the family of layers that are not changed


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is done to one layer, and the predicted cost and loss of that."""

    name: str
    operator: str
    family: str  # families joined by "+", outermost first: "sd+nd-dp"; or "kept"
    reason: str = ""  # why the layer is kept
    sizes: tuple[int, ...] = ()  # of every family, as in `families.chain`
    channels: tuple[tuple[int, ...], ...] = ()  # the channels that every family reads; empty until applied
    ridge: float = 0.0  # chosen on held-out inputs when the plan is applied, 0 until then; of wide layers by
    #   the analysis
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    predicted_error: float = 0.0  # on held-out inputs, relative to the variance of the layer's output
    predicted_loss: float = 0.0  # divergence of the network's outputs if only this layer changes
    form: str = ""  # how the layer is written, if it is changed, or if the fused operator runs it as it is
    data_free: bool = False  # fitted from the weights alone: as requested, or for lack of memory or samples

    @classmethod
    def kept(cls, layer: Layer, reason: str) -> LayerPlan:
        """Return the plan for a layer that is not changed."""
        return cls(
            name=layer.name,
            operator=layer.operator,
            family=KEPT,
            reason=reason,
            macs_before=layer.macs,
            macs=layer.macs,
            parameters_before=layer.parameters,
            parameters=layer.parameters,
        )

    @property
    def changed(self) -> bool:
        return self.family != KEPT

    @property
    def steps(self) -> tuple[Step, ...]:
        """The sizes with their channels, as far as they are known."""
        channels = self.channels or ((),) * len(self.sizes)
        pairs = zip(self.sizes, channels, strict=True)
        return tuple(Step(size, np.array(read) if read else None) for size, read in pairs)

    def with_steps(self, steps: Iterable[Step]) -> LayerPlan:
        """Return a copy with the channels of fitted steps."""
        read = [() if s.channels is None else tuple(int(c) for c in s.channels) for s in steps]
        return replace(self, channels=tuple(read))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done to a network."""

    version: int = VERSION
    model: str  # fingerprint of the network
    images: str  # fingerprint of the calibration inputs
    samples: int  # number of calibration inputs
    seed: int
    loss: Loss  # "kl", "relative" or "boxes"
    data_free: bool
    uniform_rank: bool
    budget: str
    layers: tuple[LayerPlan, ...]
    trial_loss: float | None = None  # divergence of the whole network in a trial with part of the inputs

    @property
    def before(self) -> Costs:
        """Costs of the original network."""
        rows = self.layers
        return Costs(sum(row.macs_before for row in rows), sum(row.parameters_before for row in rows))

    @property
    def after(self) -> Costs:
        """Costs of the decoupled network."""
        return Costs(sum(row.macs for row in self.layers), sum(row.parameters for row in self.layers))

    @property
    def predicted_loss(self) -> float:
        """Predicted divergence of the network's outputs: the trial's, or the sum over the layers."""
        if self.trial_loss is not None:
            return self.trial_loss
        return sum(layer.predicted_loss for layer in self.layers)

    def metadata(self, shape: Sequence[int] | None) -> dict[str, str]:
        """Return what is noted in a model that was made by this plan, from inputs of some shape."""
        noted = {"netdecouple.version": __version__, "netdecouple.plan": self.to_json(indent=None)}
        return noted if shape is None else {**noted, INPUT_SHAPE: "x".join(map(str, shape))}

    def adopted(self, fingerprint: str, layers: Sequence[Layer]) -> Plan:
        """Return the plan for a network as this frontend reads it; another frontend gives layers other names.

        Raises:
            PlanError: the plan was made for another network.
        """
        if fingerprint == self.model:
            return self
        pairs = list(zip(self.layers, layers, strict=False))
        alike = len(self.layers) == len(layers) and all(
            row.macs_before == layer.macs and (not row.changed or row.parameters_before == layer.parameters)
            for row, layer in pairs
        )
        if not alike or all(row.name == layer.name for row, layer in pairs):
            raise PlanError(
                "the plan was made for another model than this one (their weights or layers differ); "
                "make a plan for this one"
            )
        rows = (replace(row, name=layer.name, operator=layer.operator) for row, layer in pairs)
        return replace(self, model=fingerprint, layers=tuple(rows))

    def to_json(self, indent: int | None = 1) -> str:
        """Return the plan as text; equal plans give equal text."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, origin: str = "the plan") -> Plan:
        """Read a plan back.

        Raises:
            PlanError: it is not a plan, or one of another version, or a field is missing or of a wrong type.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{origin}: not a plan file ({error}); write one with Plan.to_json") from error
        if not isinstance(data, dict) or "version" not in data:
            raise PlanError(f"{origin}: not a plan file; write one with Plan.to_json")
        if data["version"] != VERSION:
            raise PlanError(
                f"{origin}: plan version {data['version']!r}, this netdecouple reads {VERSION}; make it again"
            )
        try:
            return records.read(cls, data)
        except ValueError as error:
            raise PlanError(f"{origin}: {error}; write the plan again with Plan.to_json") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: the file cannot be read, or `from_json` refuses its text.
        """
        try:
            text = limits.read_text(path)
        except PlanError:  # it is too large
            raise
        except (OSError, ValueError) as error:
            raise PlanError(f"{path}: cannot read the plan ({error}); write one with Plan.to_json") from error
        return cls.from_json(text, str(path))
