"""Times as data; JSON out. `report.text` prints them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from netdecouple.runtimes.timing import Ratio, Timing


@dataclass(frozen=True)
class TimedModel:
    """One network in one runtime. Milliseconds are per call, of the whole batch; MACs are per image."""

    model: str
    runtime: str
    version: str
    threads: int
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    macs: int | None  # None: not counted, the network has operators or inputs that are not known here
    timing: Timing
    faster: Ratio | None  # than the first network in this runtime with so many threads; None for that one


@dataclass(frozen=True)
class TimedLayer:
    """One layer of the original network, and what each network spends on it (``None``: it has it not)."""

    name: str
    timings: tuple[Timing | None, ...]
    faster: tuple[Ratio | None, ...]  # than in the first network; None for that one


@dataclass(frozen=True)
class LayerTimes:
    """Where the time goes, by ONNX Runtime's profiler, which itself takes a little."""

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
        """The times as text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"
