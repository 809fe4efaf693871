"""Measured times as data; JSON out. `report.text` and `report.html` print them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from netdecouple.runtimes.timing import Ratio, Timing


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """One network in one runtime. Milliseconds are per call, of the whole batch; MACs are per image."""

    model: str
    runtime: str
    version: str
    threads: int
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    macs: int | None  # None if the network has operators or inputs that are not counted
    timing: Timing
    faster: Ratio | None  # than the first network of the same group; None for the first network

    @property
    def group(self) -> tuple[object, ...]:
        """Runtime, version, threads and shapes: networks with the same group are compared with each other."""
        return self.runtime, self.version, self.threads, self.shapes


@dataclass(frozen=True)
class TimedLayer:
    """One layer of the original network, and its time in every network (None: it has no such layer)."""

    name: str
    timings: tuple[Timing | None, ...]
    faster: tuple[Ratio | None, ...]  # than in the first network; None for that network


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Time per layer by ONNX Runtime's profiler, which adds a little to every layer."""

    models: tuple[str, ...]
    version: str
    threads: int
    layers: tuple[TimedLayer, ...]


@dataclass(frozen=True)
class Benchmark:
    """Every network in every runtime with every number of threads."""

    netdecouple: str
    models: tuple[TimedModel, ...]
    layers: tuple[LayerTimes, ...] = ()

    def to_json(self) -> str:
        """Return the times as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
