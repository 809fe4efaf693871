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
from netdecouple.network import Layer

VERSION = 4


@dataclass(frozen=True)
class LayerPlan:
    """What is done to one layer, and what that was predicted to cost and lose."""

    name: str
    operator: str
    family: str  # families joined by "+", outermost first: "sd+nd-dp"; or "kept"
    reason: str  # why it is kept, if it is
    sizes: tuple[int, ...]  # of every application of a family, as in `families.combined`
    channels: tuple[tuple[int, ...], ...]  # what each of them reads; empty until the plan has been applied
    ridge: float  # chosen on held-back inputs: of wide layers when they were weighed, of all others
    #   when the plan was applied; 0 until then
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    predicted_error: float  # relative to the variance of the layer's output
    predicted_loss: float
    form: str = ""  # how it is written, if it is changed or run by the fused operator as it is
    data_free: bool = False  # fitted from its weights alone: asked for, or for want of memory or samples

    @property
    def changed(self) -> bool:
        return self.family != "kept"

    @property
    def steps(self) -> tuple[Step, ...]:
        """The sizes with their channels, as far as these are known."""
        known = self.channels or ((),) * len(self.sizes)
        return tuple(
            Step(size, np.array(read) if read else None) for size, read in zip(self.sizes, known, strict=True)
        )

    def with_steps(self, steps: Iterable[Step]) -> LayerPlan:
        """The same with the channels that fitting has chosen."""
        read = [() if s.channels is None else tuple(int(c) for c in s.channels) for s in steps]
        return replace(self, channels=tuple(read))


@dataclass(frozen=True)
class Plan:
    """What is done to a network."""

    version: int
    model: str  # fingerprint of the network it was made for
    images: str  # fingerprint of the calibration images
    samples: int
    seed: int
    loss: str  # "kl" or "relative"
    data_free: bool
    uniform_rank: bool
    budget: str
    layers: tuple[LayerPlan, ...]

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_before(self) -> int:
        return sum(layer.macs_before for layer in self.layers)

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters_before(self) -> int:
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def predicted_loss(self) -> float:
        return sum(layer.predicted_loss for layer in self.layers)

    def adopted(self, fingerprint: str, layers: Sequence[Layer]) -> Plan:
        """The same plan for one network that another front door has read; its layers have other names there.

        Raises:
            PlanError: it is not the network that the plan was made for.
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
        """The plan as text; equal plans give equal text."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, origin: str = "the plan") -> Plan:
        """Read a plan back.

        Raises:
            PlanError: not a plan, of another version, or with a field missing or of the wrong type.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{origin}: not a plan file ({error}); write one with --plan-out") from error
        if not isinstance(data, dict) or "version" not in data:
            raise PlanError(f"{origin}: not a plan file; write one with --plan-out")
        if data["version"] != VERSION:
            raise PlanError(
                f"{origin}: plan version {data['version']!r}, this netdecouple reads {VERSION}; make it again"
            )
        try:
            return records.read(cls, data)
        except ValueError as error:
            raise PlanError(f"{origin}: {error}; write the plan again with --plan-out") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: it cannot be read.
        """
        try:
            text = limits.read_text(path)
        except (OSError, ValueError) as error:
            raise PlanError(f"{path}: cannot read the plan ({error}); write one with --plan-out") from error
        return cls.from_json(text, str(path))
