"""How fast networks are: in every runtime, and layer by layer in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from netdecouple.errors import ModelError
from netdecouple.execution.scratch import Scratch
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.proto import nodes_of
from netdecouple.report.benchmark import Benchmark, LayerTimes, TimedLayer, TimedModel
from netdecouple.report.report import Report
from netdecouple.runtimes import Feeds, Runtime, runtime
from netdecouple.runtimes.feeds import describe_shape, random_feeds
from netdecouple.runtimes.layers import REORDER, REST, TOTAL, Owners, by_layer, original_layers, with_names
from netdecouple.runtimes.onnxruntime import OnnxRuntime, Profiled
from netdecouple.runtimes.timing import WARM_UP, Ratio, Timing, measure, rounds
from netdecouple.version import __version__

SECONDS = 4.0  # for each runtime and number of threads
SHORT = 2.0  # the same for a report, which is about more than time
DECOUPLED = "decoupled"  # what reports call the network that was made
PROFILED = 200  # runs at most; a profile holds an event for every node of every run


def benchmark(
    models: Sequence[object],
    runtimes: Sequence[Runtime] = (OnnxRuntime(),),
    *,
    threads: Sequence[int] = (1,),
    shape: tuple[int, ...] | None = None,
    feeds: Feeds | None = None,
    seconds: float = SECONDS,
    layers: bool = False,
) -> Benchmark:
    """Time networks against each other; those of one runtime and number of threads take turns.

    Args:
        models: paths, or what the runtimes open: ModelProto, nn.Module, ExportedProgram.
        runtimes: see `netdecouple.runtimes.runtime`.
        threads: the numbers of threads to time with.
        shape: of the input, where the networks leave more than the batch open.
        feeds: inputs by name, instead of random ones.
        seconds: how long to measure, for each runtime and number of threads.
        layers: also tell the time of every layer, by ONNX Runtime's profiler.

    Raises:
        ModelError: a network cannot be opened or run, or takes another input than the first.
    """
    names = model_names(models)
    groups = [
        _timed(models, names, runtime, count, shape, feeds, seconds)
        for runtime in runtimes
        for count in threads
    ]
    macs = [_macs(model, row.shapes) for model, row in zip(models, groups[0], strict=True)]
    timed = [replace(row, macs=n) for group in groups for row, n in zip(group, macs, strict=True)]
    profiled = [_profiled(models, names, count, shape, feeds, seconds) for count in threads] if layers else []
    return Benchmark(__version__, tuple(timed), tuple(profiled))


def timed(
    report: Report,
    models: Sequence[object],
    runtimes: Sequence[str],
    threads: Sequence[int],
    seconds: float | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    feeds: Feeds | None = None,
    layers: bool = False,
) -> Report:
    """Return the report of a run with more times in it: of the original, and of the network it became.

    Time per layer is told for ONNX Runtime and the first number of threads. Nothing fails: what cannot be
    timed is left out, and the report says why.
    """
    names, seconds = (report.model, DECOUPLED), SHORT if seconds is None else seconds
    known = report.benchmark or Benchmark(__version__, ())
    rows, profiles, reasons = list(known.models), list(known.layers), list(report.not_timed)
    for name in runtimes:
        try:
            found = benchmark(
                models, [runtime(name)], threads=threads, shape=shape, feeds=feeds, seconds=seconds
            )
            rows += [replace(row, model=names[i % len(names)]) for i, row in enumerate(found.models)]
            if layers and name == OnnxRuntime.name:
                profiles.append(_profiled(models, names, threads[0], shape, feeds, seconds))
        except Exception as error:  # whatever it is, the network was made, and that is what was asked for
            reasons.append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
    times = Benchmark(__version__, tuple(rows), tuple(profiles)) if rows else None
    return replace(report, benchmark=times, not_timed=tuple(reasons))


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
    shape: tuple[int, ...] | None,
    feeds: Feeds | None,
    seconds: float,
) -> list[TimedModel]:
    calls, given = [], []
    for model, name in zip(models, names, strict=True):
        with _naming(name):
            session = runtime.open(model, threads)
            given.append(random_feeds(session.inputs, shape) if feeds is None else feeds)
            calls.append(partial(session.run, given[-1]))
            calls[-1]()
    shapes = [tuple(array.shape for array in fed.values()) for fed in given]
    _check_same(names, shapes)
    times = measure(calls, seconds)  # (rounds, models)
    return [
        TimedModel(
            name,
            runtime.name,
            runtime.version,
            threads,
            shapes[index],
            None,
            Timing.of(times[:, index]),
            Ratio.of(times[:, 0], times[:, index]) if index else None,
        )
        for index, name in enumerate(names)
    ]


def _check_same(names: Sequence[str], shapes: Sequence[tuple[tuple[int, ...], ...]]) -> None:
    for name, shape in zip(names, shapes, strict=True):
        if shape != shapes[0]:
            this, first = (", ".join(map(describe_shape, s)) for s in (shape, shapes[0]))
            raise ModelError(
                f"{name} takes {this}, and {names[0]} {first}; compare networks that take the same"
            )


def _macs(model: object, shapes: tuple[tuple[int, ...], ...]) -> int | None:
    """MACs per image, or None if that cannot be told."""
    if not isinstance(model, str | os.PathLike | onnx.ModelProto):
        return None
    try:
        network = _network(model, shapes)
    except ModelError:  # has no convolutions, or several inputs; it was timed all the same
        return None
    counted = {node.output[0] for node in network.nodes.values()}
    known = all(
        node.domain in ("", "ai.onnx") or node.output[0] in counted
        for node in nodes_of(network.model.proto.graph)
    )
    return sum(layer.macs for layer in network.layers) if known else None


def _network(
    model: str | os.PathLike[str] | onnx.ModelProto, shapes: tuple[tuple[int, ...], ...]
) -> OnnxNetwork:
    opened = read_model(model)
    return OnnxNetwork(opened, np.zeros((opened.batch or 2, *shapes[0][1:]), np.float32))


def _profiled(
    models: Sequence[object],
    names: Sequence[str],
    threads: int,
    shape: tuple[int, ...] | None,
    feeds: Feeds | None,
    seconds: float,
) -> LayerTimes:
    networks, given = [], []
    for model, name in zip(models, names, strict=True):
        with _naming(name):
            if not isinstance(model, str | os.PathLike | onnx.ModelProto):
                raise ModelError("time per layer is told for ONNX models")
            session = OnnxRuntime().open(model, threads)
            given.append(random_feeds(session.inputs, shape) if feeds is None else feeds)
            networks.append(_network(model, tuple(array.shape for array in given[-1].values())))
    layers = original_layers(layer.name for network in networks for layer in network.layers)
    owners = [Owners.of(network.model.proto.graph, layers) for network in networks]
    with Scratch() as folder:
        watched = [
            Profiled(with_names(network.model.proto), threads, Path(folder) / str(index))
            for index, network in enumerate(networks)
        ]
        for profiled, fed in zip(watched, given, strict=True):
            for _ in range(WARM_UP):
                profiled.run(fed)
        for order in rounds(len(watched), seconds, most=PROFILED):
            for index in order:
                watched[index].run(given[index])
        runs = [
            [by_layer(run, owner) for run in profiled.finish()[WARM_UP:]]
            for profiled, owner in zip(watched, owners, strict=True)
        ]
    rows = [_layer(name, runs) for name in (*layers, REORDER, REST, TOTAL)]
    shown = tuple(row for row in rows if any(row.timings))
    return LayerTimes(tuple(names), OnnxRuntime.version, threads, shown)


def _layer(name: str, runs: Sequence[Sequence[dict[str, float]]]) -> TimedLayer:
    """Summarise what every network's runs, in the order of the rounds, spent on one layer."""
    spent = [np.array([run.get(name, 0.0) for run in of_model]) for of_model in runs]
    there = [bool(times.any()) for times in spent]
    ratios = [
        Ratio.of(spent[0], times) if index and there[0] and times.all() else None
        for index, times in enumerate(spent)
    ]
    timings = [Timing.of(times) if some else None for times, some in zip(spent, there, strict=True)]
    return TimedLayer(name, tuple(timings), tuple(ratios))
