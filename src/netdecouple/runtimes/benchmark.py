"""How fast networks are: in every runtime, and layer by layer in ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from netdecouple.errors import ModelError
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.scratch import Scratch
from netdecouple.runtimes import Feeds, Input, Runtime
from netdecouple.runtimes.feeds import describe_shape, random_feeds
from netdecouple.runtimes.layers import REORDER, REST, TOTAL, Owners, by_layer, original_layers, with_names
from netdecouple.runtimes.onnxruntime import OnnxRuntime, Profiled
from netdecouple.runtimes.timing import WARM_UP, Ratio, Timing, measure, rounds
from netdecouple.version import __version__

SECONDS = 4.0  # for each runtime and number of threads
SHORT = 2.0  # the same for a report, which is about more than time
BRIEF = 0.3  # the same for one line of it
DECOUPLED = "decoupled"  # what reports call the network that was made
PROFILED = 200  # runs at most; a profile holds an event for every node of every run

Shapes = tuple[tuple[int, ...], ...]
OpenNetwork = Callable[[Any, Shapes], Any]
"""Opens an ONNX model for inputs of some shapes: a `frontends.onnx.network.OnnxNetwork`."""


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """One network in one runtime. Milliseconds are per call, of the whole batch; MACs are per image."""

    model: str
    runtime: str
    version: str
    threads: int
    shapes: Shapes  # of the inputs
    macs: int | None  # None: not counted, the network has operators or inputs that are not known here
    timing: Timing
    faster: Ratio | None  # than the first network of the same group; None for the first network

    @property
    def group(self) -> tuple[object, ...]:
        """Runtime, version, threads and shapes: networks with the same group are compared with each other."""
        return self.runtime, self.version, self.threads, self.shapes


@dataclass(frozen=True, kw_only=True)
class TimedLayer:
    """One layer of the original network, and what each network spends on it (``None``: it has it not)."""

    name: str
    timings: tuple[Timing | None, ...]
    faster: tuple[Ratio | None, ...]  # than in the first network; None for that one


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Where the time goes, by ONNX Runtime's profiler, which itself takes a little."""

    models: tuple[str, ...]
    version: str
    threads: int
    layers: tuple[TimedLayer, ...]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Every network in every runtime with every number of threads."""

    netdecouple: str
    models: tuple[TimedModel, ...]
    layers: tuple[LayerTimes, ...] = ()

    @property
    def headline(self) -> tuple[TimedModel, TimedModel] | None:
        """The times that are quoted first: the first network's and the next one's in the first runtime."""
        new = next((row for row in self.models if row.faster is not None), None)
        if new is None:
            return None
        return next(row for row in self.models if row.faster is None and row.group == new.group), new

    def to_json(self) -> str:
        """The times as text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def benchmark(
    models: Sequence[object],
    runtimes: Sequence[Runtime],
    open_network: OpenNetwork,
    *,
    names: Sequence[str] | None = None,
    threads: Sequence[int] = (1,),
    shape: tuple[int, ...] | None = None,
    feeds: Feeds | None = None,
    constants: Mapping[str, Any] = {},
    seconds: float = SECONDS,
    progress: Progress = quiet,
) -> Benchmark:
    """Time networks against each other; those of one runtime and number of threads take turns.

    Args:
        models: paths, or what the runtimes open: ModelProto, nn.Module, ExportedProgram.
        runtimes: see `netdecouple.runtimes.runtime`.
        open_network: counts the MACs of ONNX models.
        names: of the networks; None: their files' names.
        threads: the numbers of threads to time with.
        shape: of the input, where the networks leave more than the batch open.
        feeds: inputs by name, instead of random ones.
        constants: values of some inputs, beside the random ones.
        seconds: how long to measure, for each runtime and number of threads.
        progress: called with the seconds that have passed.

    Raises:
        ModelError: a network cannot be opened or run, or takes another input than the first.
    """
    names = names or model_names(models)
    pairs = product(runtimes, threads)
    make = partial(random_feeds, shape=shape, constants=constants) if feeds is None else lambda _: feeds
    groups = [_timed(models, names, runtime, n, make, seconds, progress) for runtime, n in pairs]
    macs = [_macs(model, row.shapes, open_network) for model, row in zip(models, groups[0], strict=True)]
    rows = tuple(replace(row, macs=n) for group in groups for row, n in zip(group, macs, strict=True))
    return Benchmark(netdecouple=__version__, models=rows)


def model_names(models: Sequence[object]) -> list[str]:
    """Call networks by their files' names, by the whole paths where two have the same name."""
    short = [_name(model) for model in models]
    return [
        os.fspath(model) if isinstance(model, str | os.PathLike) and short.count(name) > 1 else name
        for model, name in zip(models, short, strict=True)
    ]


def _name(model: object) -> str:
    if isinstance(model, str | os.PathLike):
        return Path(model).name
    return model.graph.name if isinstance(model, onnx.ModelProto) else type(model).__name__


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the network's name before what is wrong with it."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from error


def _timed(
    models: Sequence[object],
    names: Sequence[str],
    runtime: Runtime,
    threads: int,
    feeds: Callable[[Sequence[Input]], Feeds],
    seconds: float,
    progress: Progress,
) -> list[TimedModel]:
    calls, given = [], []
    for model, name in zip(models, names, strict=True):
        with _naming(name):
            session = runtime.open(model, threads)
            given.append(feeds(session.inputs))
            calls.append(partial(session.run, given[-1]))
            calls[-1]()
    shapes = [tuple(array.shape for array in fed.values()) for fed in given]
    for name, taken in zip(names, shapes, strict=True):
        if taken != shapes[0]:
            this, first = (", ".join(map(describe_shape, s)) for s in (taken, shapes[0]))
            raise ModelError(
                f"{name} takes {this}, and {names[0]} {first}; compare networks that take the same"
            )
    times = measure(calls, seconds, progress=progress)  # (rounds, models)
    return [
        TimedModel(
            model=name,
            runtime=runtime.name,
            version=runtime.version,
            threads=threads,
            shapes=shapes[index],
            macs=None,
            timing=Timing.of(times[:, index]),
            faster=Ratio.of(times[:, 0], times[:, index]) if index else None,
        )
        for index, name in enumerate(names)
    ]


def _macs(model: object, shapes: Shapes, open_network: OpenNetwork) -> int | None:
    """Count MACs per image; None if the model has operators or inputs that are not known."""
    if not isinstance(model, str | os.PathLike | onnx.ModelProto):
        return None
    try:
        network = open_network(model, shapes)
    except ModelError:  # no convolutions, or several inputs; it was timed all the same
        return None
    return sum(layer.macs for layer in network.layers) if network.counts_everything else None


def layer_times(
    models: Sequence[object],
    open_network: OpenNetwork,
    threads: int,
    *,
    names: Sequence[str] | None = None,
    shape: tuple[int, ...] | None = None,
    feeds: Feeds | None = None,
    constants: Mapping[str, Any] = {},
    seconds: float = SECONDS,
    progress: Progress = quiet,
    custom_ops: Sequence[str] = (),
) -> LayerTimes:
    """Measure the time per layer with ONNX Runtime's profiler; arguments are those of `benchmark`.

    ``custom_ops`` are libraries of operators that the networks use.

    Raises ModelError if a network is no ONNX model, or cannot be run.
    """
    names = names or model_names(models)
    networks, given = [], []
    for model, name in zip(models, names, strict=True):
        with _naming(name):
            if not isinstance(model, str | os.PathLike | onnx.ModelProto):
                raise ModelError("times per layer are measured for ONNX models only")
            session = OnnxRuntime(custom_ops).open(model, threads)
            random = random_feeds(session.inputs, shape, constants=constants) if feeds is None else feeds
            given.append(random)
            networks.append(open_network(model, tuple(array.shape for array in given[-1].values())))
    layers = original_layers(layer.name for network in networks for layer in network.layers)
    owners = [Owners.of(network.model.proto.graph, layers) for network in networks]
    with Scratch() as folder:
        watched = [
            Profiled(with_names(network.model.proto), threads, Path(folder) / str(index), custom_ops)
            for index, network in enumerate(networks)
        ]
        for profiled, fed in zip(watched, given, strict=True):
            for _ in range(WARM_UP):
                profiled.run(fed)
        for order in rounds(len(watched), seconds, most=PROFILED, progress=progress):
            for index in order:
                watched[index].run(given[index])
        runs = [
            [by_layer(run, owner) for run in profiled.finish()[WARM_UP:]]
            for profiled, owner in zip(watched, owners, strict=True)
        ]
    rows = [_layer(name, runs) for name in (*layers, REORDER, REST, TOTAL)]
    shown = tuple(row for row in rows if any(row.timings))
    return LayerTimes(models=tuple(names), version=OnnxRuntime.version, threads=threads, layers=shown)


def _layer(name: str, runs: Sequence[Sequence[dict[str, float]]]) -> TimedLayer:
    """Summarise what every network's runs, in the order of the rounds, spent on one layer."""
    spent = [np.array([run.get(name, 0.0) for run in of_model]) for of_model in runs]
    there = [bool(times.any()) for times in spent]
    ratios = [
        Ratio.of(spent[0], times) if index and there[0] and times.all() else None
        for index, times in enumerate(spent)
    ]
    timings = [Timing.of(times) if some else None for times, some in zip(spent, there, strict=True)]
    return TimedLayer(name=name, timings=tuple(timings), faster=tuple(ratios))
