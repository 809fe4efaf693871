"""Memory under a limit, speedup with workers, and what all of ImageNet would take. Prints tables.

python benchmarks/scale.py --only local,dask                      # minutes
python benchmarks/scale.py --only imagenet                        # ten minutes, 2 GB
python benchmarks/scale.py --only resnet152,vgg19,wide            # hours, within --memory
python benchmarks/scale.py --only external                        # a model above 2 GB; 18 GB of memory

Networks have random weights and see noise: neither memory nor time depend on the numbers. Every network of
the first table is decoupled by a process of its own, whose peak is the system's count of its resident pages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import netdecouple
from netdecouple import Resources, Settings
from netdecouple.execution import threads
from netdecouple.execution.executors import Workers, dask, processes
from netdecouple.execution.memory import Memory
from netdecouple.families import Problem
from netdecouple.families.chain import method
from netdecouple.fitting.ridge import best_ridge
from netdecouple.fitting.sampling import sample_positions
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.moments import Moments
from netdecouple.network import Layer
from netdecouple.planning.analysis import groups_of
from netdecouple.planning.candidates import candidates
from netdecouple.planning.eligibility import kept_reasons
from netdecouple.planning.sensitivity import LEAST_SAMPLES, PROBE_MACS

DEMO = Path(netdecouple.__file__).parent / "demo"
IMAGENET = 1_281_167  # training images
TASKS = 200  # empty ones, to see what handing out a piece of work costs
CALIBRATION_BYTES = 4 * 3 * 224 * 224  # of one image


class Graph:
    """A network in the making; every method returns what it makes."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def _weight(self, *shape: int, gain: float = 2.0) -> str:
        name = f"weight{len(self.weights)}"
        scale = np.float32(np.sqrt(gain / np.prod(shape[1:])))
        array = self._rng.standard_normal(shape, np.float32) * scale
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, n_i: int, n_o: int, k: int, stride: int = 1, gain: float = 2.0) -> str:
        weight = self._weight(n_o, n_i, k, k, gain=gain)
        return self.node("Conv", x, weight, strides=[stride] * 2, pads=[k // 2] * 4)

    def relu(self, x: str) -> str:
        return self.node("Relu", x)

    def dense(self, x: str, n_i: int, n_o: int) -> str:
        return self.node("Gemm", x, self._weight(n_o, n_i), transB=1)

    def pooled(self, x: str) -> str:
        return self.node("Flatten", self.node("GlobalAveragePool", x))

    def model(self, output: str, size: int) -> onnx.ModelProto:
        kind = TensorProto.FLOAT
        shapes = ("image", ["N", 3, size, size]), (output, ["N", "classes"])
        inputs, outputs = ([helper.make_tensor_value_info(name, kind, shape)] for name, shape in shapes)
        graph = helper.make_graph(self.nodes, "scale", inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resnet(blocks: Sequence[int]) -> onnx.ModelProto:
    """A ResNet of so many bottlenecks (He et al. 2016) in each stage, at 224 × 224, BatchNorm folded."""
    g = Graph()
    x = g.node(
        "MaxPool", g.relu(g.conv("image", 3, 64, 7, 2)), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
    )
    n_i = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            short = x if index else g.conv(x, n_i, 4 * width, 1, stride, gain=1.0)
            y = g.relu(g.conv(x, n_i, width, 1))
            y = g.conv(g.relu(g.conv(y, width, width, 3, stride)), width, 4 * width, 1, gain=0.1)
            x, n_i = g.relu(g.node("Add", y, short)), 4 * width
    return g.model(g.dense(g.pooled(x), n_i, 1000), 224)


def vgg19() -> onnx.ModelProto:
    """VGG19 (Simonyan and Zisserman 2015) at 448 × 448; fully connected layers see 7 × 7 pixels as ever."""
    g = Graph()
    x, n_i = "image", 3
    for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(count):
            x, n_i = g.relu(g.conv(x, n_i, width, 3)), width
        x = g.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = g.node("Flatten", g.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]))
    x = g.relu(g.dense(x, 512 * 49, 4096))
    return g.model(g.dense(g.relu(g.dense(x, 4096, 4096)), 4096, 1000), 448)


def wide() -> onnx.ModelProto:
    """A 3×3 layer with 2,048 channels, on maps of 14 × 14."""
    g = Graph()
    x = g.relu(g.conv("image", 3, 64, 7, 4))
    x = g.relu(g.conv(g.relu(g.conv(x, 64, 2048, 1, 4)), 2048, 2048, 3))
    return g.model(g.dense(g.pooled(x), 2048, 1000), 224)


def external() -> onnx.ModelProto:
    """Above 2 GB, nearly all of it in two fully connected layers."""
    g = Graph()
    x = g.pooled(g.relu(g.conv(g.relu(g.conv("image", 3, 64, 3, 2)), 64, 64, 3)))
    x = g.relu(g.dense(x, 64, 17_000))
    return g.model(
        g.dense(g.relu(g.dense(g.relu(g.dense(x, 17_000, 17_000)), 17_000, 17_000)), 17_000, 10), 64
    )


@dataclass(frozen=True)
class Case:
    """A network, and what it is decoupled with."""

    make: Callable[[], onnx.ModelProto]
    size: int  # of an image
    images: int
    macs: str = "60%"  # that may stay
    limited: bool = True  # to --memory


CASES = {
    "resnet152": Case(lambda: resnet((3, 8, 36, 3)), 224, 128),
    "vgg19": Case(vgg19, 448, 64),
    "wide": Case(wide, 224, 128),
    "external": Case(external, 64, 32, "95%", limited=False),  # wide fully connected layers stay
}


def main(
    only: Annotated[
        str, typer.Option(help="Some of resnet152,vgg19,wide,external,local,dask,imagenet.")
    ] = "local,dask",
    memory: Annotated[str, typer.Option(help="The limit of the first table.")] = "4GB",
    workers: Annotated[int, typer.Option(help="That all of ImageNet is planned for.")] = 32,
    gigabits: Annotated[
        float, typer.Option(help="Per second, between them and where the run was started.")
    ] = 10.0,
) -> None:
    """Measure what is asked for, in this order."""
    console = Console(width=120)
    wanted = only.split(",")
    if unknown := set(wanted) - {*CASES, "local", "dask", "imagenet"}:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}")
    chosen = [name for name in CASES if name in wanted]
    if chosen:
        table = _table("Peak memory", "network", "images", "model", "limit", "peak", "time", "MACs left")
        for name in chosen:
            table.add_row(*peak(name, CASES[name], memory))
        console.print(table)
    if "local" in wanted:
        console.print(speedups("Processes on this machine", (1, 2), processes))
    if "dask" in wanted:
        console.print(speedups("Dask on this machine", (1, 2, 4), dask_cluster))
    if "imagenet" in wanted:
        console.print(imagenet(workers, gigabits))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def peak(name: str, case: Case, memory: str) -> list[str]:
    """One line of the first table."""
    with tempfile.TemporaryDirectory() as folder:
        model, images = Path(folder) / "model.onnx", Path(folder) / "images.npy"
        # made elsewhere, so that what that takes is not inherited
        code = f"import scale; scale.made({name!r}, {folder!r})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
        command = [
            sys.executable,
            "-m",
            "netdecouple",
            "run",
            str(model),
            "-o",
            f"{folder}/out.onnx",
            "--json",
        ]
        command += [
            "--calib",
            str(images),
            "--macs",
            case.macs,
            "--families",
            "nd",
            "--samples",
            str(case.images),
        ]
        command += ["--memory", memory] if case.limited else []
        began = time.perf_counter()
        with (Path(folder) / "told.json").open("w") as told:
            running = subprocess.Popen([*command, "--quiet"], stdout=told)
            _, status, usage = os.wait4(running.pid, 0)
        seconds = time.perf_counter() - began
        running.returncode = os.waitstatus_to_exitcode(status)
        found = json.loads((Path(folder) / "told.json").read_text())
        bytes_read = sum(path.stat().st_size for path in Path(folder).glob("model.*"))
    left = f"{100 * found['macs'] / found['macs_before']:.0f}%" if not running.returncode else found["error"]
    limit = memory if case.limited else "none"
    size = f"{bytes_read / 1e9:.2f} GB"
    return [
        name,
        str(case.images),
        size,
        limit,
        f"{usage.ru_maxrss * 1024 / 1e9:.2f} GB",
        _time(seconds),
        left,
    ]


def made(name: str, folder: str) -> None:
    """Write a network and its images."""
    case = CASES[name]
    model = case.make()
    outside = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > 1 << 30
    onnx.save_model(model, f"{folder}/model.onnx", save_as_external_data=outside, location="model.data")
    rng = np.random.default_rng(0)
    np.save(f"{folder}/images.npy", rng.standard_normal((case.images, 3, case.size, case.size), np.float32))


def speedups(
    title: str, counts: Sequence[int], start: Callable[[int], AbstractContextManager[Workers]]
) -> Table:
    """The demo's network, decoupled by so many workers of one thread each; and by nobody but this process."""
    images = np.load(DEMO / "digits.npz")["calib"].transpose(0, 3, 1, 2).astype(np.float32) / 255
    table = _table(
        f"{title}: digits.onnx, {len(images)} images, 8 shards, {os.cpu_count()} cores",
        *("workers", "whole run", "times as fast", "CPU here", "CPU of the busiest", "handing out a task"),
    )
    plans: list[Any] = []
    first = 0.0
    for count in (0, *counts):
        hands: AbstractContextManager[Any] = start(count) if count else _one_thread()
        with hands as workers:
            overhead = handed_out(workers) if count else 0.0
            before = busy(workers)
            began, here = time.perf_counter(), time.process_time()
            result = netdecouple.decouple(
                str(DEMO / "digits.onnx"), images, macs=0.5, resources=Resources(workers=workers, shards=8)
            )
            seconds, here = time.perf_counter() - began, time.process_time() - here
            busiest = max((after - before.get(pid, 0.0) for pid, after in busy(workers).items()), default=0.0)
        first = first or seconds
        plans.append([(row.name, row.family, row.sizes) for row in result.plan.layers])
        assert plans[-1] == plans[0], "the plan depends on who works"
        task = f"{1000 * overhead:.1f} ms" if count else ""
        own = f"{here:.1f} s", f"{busiest:.1f} s" if count else "", task
        table.add_row(str(count or "none"), f"{seconds:.1f} s", f"{first / seconds:.2f}", *own)
    return table


def busy(workers: Workers | None) -> dict[int, float]:
    """Seconds that each worker has used its core, by process."""
    if workers is None:
        return {}
    return dict(workers.map(core_seconds, [()] * workers.count, pinned=True))


def core_seconds() -> tuple[int, float]:
    """This process, and how long it has used its core."""
    return os.getpid(), time.process_time()


@contextmanager
def _one_thread() -> Iterator[None]:
    """This process alone, with one thread, as each of the workers has."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        with threadpool_limits(1):  # whose threads are there already, and may be on other cores
            yield
    finally:
        os.sched_setaffinity(0, cores)


def handed_out(workers: Workers) -> float:
    """Seconds per piece of work that is nothing, workers awake."""
    list(workers.map(nothing, [()] * 4 * workers.count))
    began = time.perf_counter()
    list(workers.map(nothing, [()] * TASKS))
    return (time.perf_counter() - began) / TASKS


def nothing() -> None:
    """A task that does nothing."""


@contextmanager
def dask_cluster(count: int) -> Iterator[Workers]:
    """A scheduler and workers on loopback, each a process, as Dask's own commands start them."""
    import distributed

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/scheduler.json"
        shared = ["--scheduler-file", place, "--host", "127.0.0.1", "--no-dashboard"]
        commands = [["dask_scheduler", *shared, "--port", "0"]]
        commands += [
            ["dask_worker", *shared, "--nthreads", "1", "--no-nanny", "--local-directory", folder]
        ] * count
        running = [
            subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.{name}", *words],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for name, *words in commands
        ]
        try:
            with distributed.Client(scheduler_file=place, timeout="60s", set_as_default=False) as client:
                client.wait_for_workers(count, timeout=60)
                address = client.scheduler.address
            with dask(address) as workers:
                yield workers
        finally:
            for process in reversed(running):
                process.kill()
                process.wait()


def imagenet(workers: int, gigabits: float) -> Table:
    """What calibrating ResNet-50 on all of ImageNet would take, from costs that are measured on one core."""
    with _one_thread():
        images = np.random.default_rng(0).standard_normal((16, 3, 224, 224), np.float32)
        network = OnnxNetwork(read_model(resnet((3, 4, 6, 3))), images)
        layers = [la for la in network.layers if la.name not in kept_reasons(network.layers, Settings())]
        groups = len(list(groups_of(layers, (), Memory().moment_bytes)))
        network.run(images)
        forward = timed(lambda: network.run(images)) / len(images)
        positions = {la.name: sample_positions(la, IMAGENET, 0)[: len(images)] for la in layers}
        seen = timed(lambda: [s.patches for s in network.observe(images, positions)]) / len(images)
        gram = gram_seconds(layers)
        weighing, fitting = linear_algebra(layers)
    depth, total = len(layers), sum(la.macs for la in network.layers)
    trials = max(PROBE_MACS / (depth * total), LEAST_SAMPLES["kl"])
    moments = sum(16 * la.geometry.groups * _d(la) * (_d(la) + _m(la)) for la in layers if la.geometry)
    share = IMAGENET / workers
    seconds_per_byte = 8 / (gigabits * 1e9)
    rows = [
        (
            "watching the network",
            f"{groups} passes, {seen:.3f} s per image; Gram matrices {gram:.4f} s per image",
            share * (groups * seen + gram),
        ),
        ("weighing layers", f"{weighing:.0f} s of linear algebra", max(weighing / workers, 1)),
        (
            "probing the network",
            f"{depth} × {trials:.0f} images, {forward:.3f} s each",
            depth * trials * forward / workers,
        ),
        ("recording targets", f"{seen:.3f} s per image", share * seen),
        ("walking", f"{forward:.3f} s per image, Gram matrices as above", share * (forward + gram)),
        (
            "fitting layers",
            f"{fitting:.0f} s of linear algebra, one after the other, where the run was started",
            fitting,
        ),
        (
            "moving images",
            f"{groups + 1} × {IMAGENET * CALIBRATION_BYTES / 1e9:.0f} GB at {gigabits:g} Gbit/s",
            (groups + 1) * IMAGENET * CALIBRATION_BYTES * seconds_per_byte,
        ),
        (
            "moving moments",
            f"2 × {workers} × {moments / 1e9:.1f} GB",
            2 * workers * moments * seconds_per_byte,
        ),
    ]
    table = _table(
        f"ResNet-50 on {IMAGENET:,} images of ImageNet, {workers} workers of one core each: a plan",
        *("step", "measured here, one core", "time"),
    )
    for step, cost, seconds in rows:
        table.add_row(step, cost, _time(seconds))
    table.add_section()
    table.add_row("together", "", _time(sum(seconds for *_, seconds in rows)))
    return table


def timed(work: Callable[[], object]) -> float:
    """Seconds of one core that some work takes, whoever else keeps it busy."""
    began = time.process_time()
    work()
    return time.process_time() - began


def gram_seconds(layers: Sequence[Layer]) -> float:
    """Seconds per image that adding one position of every layer to its moments takes."""
    d, rows = 1152, 4608
    x = np.random.default_rng(0).standard_normal((rows, 1, d), np.float32)
    rate = rows * d * 2 * d / timed(lambda: Moments.of(x, x))  # of products, with targets as wide as inputs
    work = sum(
        sample_positions(la, IMAGENET, 0).shape[1] * la.geometry.groups * _d(la) * (_d(la) + _m(la))
        for la in layers
        if la.geometry
    )
    return work / rate


def linear_algebra(layers: Sequence[Layer]) -> tuple[float, float]:
    """Seconds to weigh, and to fit, all layers; every kind of layer is measured once."""
    weighing = fitting = 0.0
    kinds = Counter((la.geometry, la.size) for la in layers)
    for (geometry, size), count in kinds.items():
        layer = next(la for la in layers if (la.geometry, la.size) == (geometry, size))
        one, other = measured(layer)
        weighing, fitting = weighing + count * one, fitting + count * other
    return weighing, fitting


def measured(layer: Layer) -> tuple[float, float]:
    """Seconds to weigh a layer, and to fit what is 40 % of it."""
    d, m = _d(layer), _m(layer)
    assert layer.geometry is not None
    rng = np.random.default_rng(0)
    weight = layer.weight.reshape(m, d).T
    mixed = rng.standard_normal((d, 64), np.float32)

    def moments(rows: int) -> Moments:
        found = Moments.empty(1, d, m)
        for _ in range(0, rows, max(d // 2, 1)):
            inner = rng.standard_normal((max(d // 2, 1), 64), np.float32)
            x = inner @ mixed.T + 0.3 * rng.standard_normal((len(inner), d), np.float32)
            found.add(x[:, None], (x @ weight)[:, None])
        return found

    fitted, held_out = moments(2 * d), moments(d)
    problem = Problem.of(layer.geometry, layer.weight, fitted)
    settings = Settings()
    with threads.for_unknowns(d):
        began = time.process_time()
        found = candidates(layer, problem, held_out, settings.methods, False, 1)
        weighing = time.process_time() - began
        if not found.candidates:
            return weighing, 0.0
        wanted = 0.4 * layer.geometry.macs(*layer.size)
        best = min(found.candidates, key=lambda c: abs(c.structure.macs(*layer.size) - wanted))
        chosen = method(best.method)

        def fit() -> None:
            quick = method(best.method, rounds=1)
            _, regular = best_ridge(problem, held_out, lambda p: quick.fit(p, best.steps)[0])
            chosen.fit(regular, best.steps)

        return weighing, timed(fit)


def _d(layer: Layer) -> int:
    g = layer.geometry
    assert g is not None
    return g.n_i // g.groups * g.kh * g.kw


def _m(layer: Layer) -> int:
    assert layer.geometry is not None
    return layer.geometry.n_o // layer.geometry.groups


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    typer.run(main)
