"""The fused operator against dense convolutions and the best form in standard operators. Prints a table.

python benchmarks/kernel.py               # one thread and two
python benchmarks/kernel.py --threads 1 --chain 4

Layers are 3×3, stride 1, n → n channels, batch 1, in ONNX Runtime; `--chain 4` puts four in a row, each with
weights of its own. Efficiency is the speedup over the ratio of MACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, Structure
from netdecouple.families.decoupling import DepthwisePointwise
from netdecouple.frontends.onnx.emission import FORMS, Form, emit
from netdecouple.latency import placeholder
from netdecouple.runtimes.onnxruntime import OnnxRuntime
from netdecouple.runtimes.timing import Ratio, measure

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


def main(
    threads: Annotated[list[int] | None, typer.Option()] = None,
    layers: Annotated[int, typer.Option("--chain", help="Layers in a row.")] = 1,
    seconds: Annotated[float, typer.Option(help="For each line.")] = 4.0,
) -> None:
    """Print the table."""
    console = Console(width=130)
    columns = (
        "n @ size",
        "T",
        "MAC ratio",
        "dense ms",
        "standard ms",
        "form",
        "fused ms",
        "speedup",
        "quartiles",
    )
    for count in threads or [1, 2]:
        where = f"ONNX Runtime {OnnxRuntime.version}, {kernels.level()}, {count} thread(s)"
        title = f"{layers} in a row, per layer; {where}"
        table = Table(title=title)
        for column in (*columns, "efficiency", "of standard"):
            table.add_column(column, justify="right")
        for n, size, terms in SHAPES:
            g = ConvGeometry(n, n, 3, 3, pads=(1, 1, 1, 1))
            low = [placeholder(with_terms(g, terms), seed) for seed in range(layers)]
            models = [chain([dense(g, seed) for seed in range(layers)], size, "gather")]
            models += [chain(low, size, form) for form in FORMS]
            sessions = [OnnxRuntime().open(model, count) for model in models]
            x = np.random.default_rng(0).standard_normal((1, n, size, size)).astype(np.float32)
            times = measure([partial(session.run, {"x": x}) for session in sessions], seconds) / layers
            medians = np.median(times, axis=0)
            standard = min(range(1, len(FORMS)), key=lambda i: medians[i])
            macs = g.macs(size, size) / low[0].macs(size, size)
            faster = Ratio.of(times[:, 0], times[:, -1])
            speedup = float(np.median(times[:, 0] / times[:, -1]))
            cells = (
                f"{n} @ {size}",
                f"{terms}",
                f"{macs:.2f}",
                f"{medians[0]:.3f}",
                f"{medians[standard]:.3f}",
                FORMS[standard - 1],
                f"{medians[-1]:.3f}",
                f"{speedup:.2f}×",
                f"{faster.lower:.2f}–{faster.upper:.2f}",
                f"{100 * speedup / macs:.0f}%",
                f"{medians[standard] / medians[-1]:.2f}×",
            )
            table.add_row(*cells)
            console.log(" ".join(cells))
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
