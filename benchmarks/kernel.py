"""The fused operator against dense convolutions and the best form in standard operators. Prints a table.

python benchmarks/kernel.py               # one thread and two
python benchmarks/kernel.py --threads 1 --chain 4
python benchmarks/kernel.py --store docs/kernel.jsonl    # the documentation's table is made from it
python benchmarks/kernel.py --peak        # every instruction set of this processor, against its own limit

Layers are 3×3, stride 1, n → n channels, batch 1, in ONNX Runtime; `--chain 4` puts four in a row, each with
weights of its own. Efficiency is the speedup over the ratio of MACs. `--peak` compares the multiply-adds that
a layer computes in a second with those that the same instructions do on numbers in registers.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

import rows
from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, Structure, placeholder
from netdecouple.execution.machine import machine
from netdecouple.families.nd import DepthwisePointwise
from netdecouple.frontends.onnx.emission import FORMS, Form, emit
from netdecouple.runtimes.onnxruntime import OnnxRuntime
from netdecouple.runtimes.timing import Stopwatch, measure

SHAPES = (  # channels, height and width, terms per channel
    (64, 112, 4),
    (64, 112, 2),
    (64, 56, 4),
    (64, 56, 2),
    (128, 112, 4),
    (128, 56, 3),
    (256, 56, 4),
    (512, 28, 4),
    (512, 14, 4),
    (32, 32, 2),
    (16, 32, 3),
)
SMALL = ((64, 8, 4), (128, 4, 3), (512, 7, 4))  # maps
LEVELS = ("avx512", "avx2", "baseline")


def chain(factorizations: Sequence[Factorization], size: int, form: Form) -> onnx.ModelProto:
    """One layer, or several in a row and a pooling, as a network would have it."""
    nodes, weights, x, n = [], [], "x", factorizations[0].geometry.n_i
    for index, factorization in enumerate(factorizations):
        made = emit(factorization, f"layer{index}", x, f"y{index}", form)
        nodes += made[0]
        weights += made[1]
        x = f"y{index}"
    shape = [1, n, size, size]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)]
    if len(factorizations) > 1:
        nodes.append(helper.make_node("GlobalAveragePool", [x], ["out"]))
        outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, n, 1, 1])]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        outputs,
        weights,
    )
    domains = [helper.make_opsetid("", 13), helper.make_opsetid(kernels.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=domains if form == "fused" else domains[:1], ir_version=8)


def with_terms(geometry: ConvGeometry, terms: int) -> Structure:
    """The layer with the same number of depthwise separable terms for every channel."""
    stages = DepthwisePointwise().structure(geometry, terms * geometry.weight_shape[1])
    return replace(stages, channels=(np.arange(geometry.n_i).repeat(terms), None))


def dense(geometry: ConvGeometry, seed: int) -> Factorization:
    """A regular convolution with weights made up."""
    kernel = np.random.default_rng(seed).standard_normal(geometry.weight_shape, np.float32)
    scaled = kernel / np.float32(np.sqrt(np.prod(geometry.weight_shape[1:])))
    return Factorization(geometry, (ConvStage(geometry, scaled),), np.zeros(geometry.n_o, np.float32))


@dataclass(frozen=True)
class Row:
    """A layer, measured: milliseconds are medians, per layer."""

    where: str
    chain: int  # layers in a row
    threads: int
    channels: int
    size: int
    terms: int
    macs: float  # times fewer
    dense: float
    form: str  # the fastest in standard operators
    standard: float
    fused: float
    faster: tuple[float, float, float]  # times, quartiles over rounds

    @property
    def efficiency(self) -> float:
        """The speedup over the ratio of MACs."""
        return self.faster[1] / self.macs


def timed(shape: tuple[int, int, int], layers: int, threads: int, seconds: float) -> Row:
    """Time one kind of layer in all its forms, in turn."""
    n, size, terms = shape
    g = ConvGeometry(n, n, 3, 3, pads=(1, 1, 1, 1))
    low = [placeholder(with_terms(g, terms), seed) for seed in range(layers)]
    models = [chain([dense(g, seed) for seed in range(layers)], size, "gather")]
    models += [chain(low, size, form) for form in FORMS]
    sessions = [OnnxRuntime().open(model, threads) for model in models]
    x = np.random.default_rng(0).standard_normal((1, n, size, size)).astype(np.float32)
    times = measure([partial(session.run, {"x": x}) for session in sessions], seconds) / layers
    medians = np.median(times, axis=0).tolist()
    standard = min(range(1, len(FORMS)), key=lambda i: medians[i])
    lower, median, upper = np.percentile(times[:, 0] / times[:, -1], (25, 50, 75)).tolist()
    return Row(
        where=f"{machine()}, ONNX Runtime {OnnxRuntime.version}, {kernels.level()}",
        chain=layers,
        threads=threads,
        channels=n,
        size=size,
        terms=terms,
        macs=g.macs(size, size) / low[0].macs(size, size),
        dense=medians[0],
        form=FORMS[standard - 1],
        standard=medians[standard],
        fused=medians[-1],
        faster=(lower, median, upper),
    )


def peak(library: ctypes.CDLL) -> float:
    """Multiply-adds in a nanosecond, of numbers in registers, with the level in use."""
    count = 1 << 18
    fastest = 1e9
    for _ in range(20):
        start = time.process_time()
        done = library.netdecouple_multiply(count)
        fastest = min(fastest, time.process_time() - start)
    return 1e-9 * done / fastest


def peak_table(shapes: Sequence[tuple[int, int, int]], layers: int, seconds: float) -> Table:
    """The share of its peak that every level reaches on every layer, and the peak."""
    library = ctypes.CDLL(str(kernels.library_path()))
    library.netdecouple_multiply.argtypes = [ctypes.c_int64]
    library.netdecouple_multiply.restype = ctypes.c_int64
    best = kernels.level()
    levels = [level for level in LEVELS if library.netdecouple_use_level(level.encode())]
    peaks, sessions = [], []
    for level in levels:
        library.netdecouple_use_level(level.encode())
        peaks.append(peak(library))
        low = [
            placeholder(with_terms(ConvGeometry(n, n, 3, 3, pads=(1, 1, 1, 1)), t), 0) for n, _, t in shapes
        ]
        pairs = zip(low, shapes, strict=True)
        models = [chain([factorization] * layers, size, "fused") for factorization, (_, size, _) in pairs]
        sessions.append([OnnxRuntime().open(model, 1) for model in models])
    library.netdecouple_use_level(best.encode())
    heads = (f"{level}, {2 * rate:.0f} GFLOP/s" for level, rate in zip(levels, peaks, strict=True))
    out = Table("n @ size", "T", *heads, title=f"Share of the multiply-adds that are possible, {machine()}")
    for (n, size, terms), factorization, *own in zip(shapes, low, *sessions, strict=True):
        x = np.random.default_rng(0).standard_normal((1, n, size, size)).astype(np.float32)
        times = Stopwatch(1).times([partial(session.run, {"x": x}) for session in own], seconds)
        shares = layers * factorization.macs(size, size) / (1e6 * times) / peaks
        out.add_row(f"{n} @ {size}", str(terms), *(f"{share:.0%}" for share in shares))
    return out


def tables(found: Iterable[Row]) -> Iterator[Table]:
    """A table for every machine, number of threads and length of chains; a line for every layer."""
    last = {(r.where, r.threads, r.chain, r.channels, r.size, r.terms): r for r in found}  # if run again
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for key, row in last.items():
        groups.setdefault(key[:3], []).append(row)
    for (where, threads, layers), own in groups.items():
        chained = f", {layers} in a row, per layer" if layers > 1 else ""
        out = Table(title=f"{where}, {threads} thread{'s' if threads > 1 else ''}{chained}")
        heads = (
            "n @ size",
            "T",
            "fewer MACs",
            "dense",
            "standard",
            "its form",
            "fused",
            "faster",
            "quartiles",
        )
        for column in (*heads, "efficiency", "over standard"):
            out.add_column(column, justify="right")
        for r in own:
            out.add_row(
                *(f"{r.channels} @ {r.size}", f"{r.terms}", f"{r.macs:.2f}×", f"{r.dense:.3f} ms"),
                *(f"{r.standard:.3f} ms", r.form, f"{r.fused:.3f} ms", f"{r.faster[1]:.2f}×"),
                f"{r.faster[0]:.2f}–{r.faster[2]:.2f}",
                f"{100 * r.efficiency:.0f} %",
                f"{r.standard / r.fused:.2f}×",
            )
        yield out


def main(
    threads: Annotated[list[int] | None, typer.Option()] = None,
    layers: Annotated[int, typer.Option("--chain", help="Layers in a row.")] = 1,
    seconds: Annotated[float, typer.Option(help="For each line.")] = 4.0,
    is_peak: Annotated[bool, typer.Option("--peak", help="Print the shares of the peak only.")] = False,
    store: Annotated[Path | None, typer.Option(help="Keep rows here: docs/kernel.jsonl.")] = None,
) -> None:
    """Print the tables."""
    console = Console(width=150)
    if is_peak:
        console.print(peak_table(SHAPES + SMALL, layers, seconds))
        return
    found = []
    for count in threads or [1, 2]:
        for shape in SHAPES:
            found.append(timed(shape, layers, count, seconds))
            rows.keep(store, found[-1])
            console.log(found[-1])
    for table in tables(found):
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
