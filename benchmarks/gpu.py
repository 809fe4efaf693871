"""Decoupled layers and a VGG16 on a CUDA GPU, as cuDNN runs them. Prints a table.

python benchmarks/gpu.py
python benchmarks/gpu.py --store docs/gpu.jsonl    # the documentation's table is made from it

Layers are 3×3, stride 1, n → n channels, in channels_last format; all calls are replayed from CUDA graphs, so
that the CPU's share in launching them is not part of the figures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import rows
from conversion import WIDTHS
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method, sizes_for
from netdecouple.runtimes.timing import measure

if TYPE_CHECKING:  # the documentation's table is made without PyTorch
    import torch
    from torch import nn

    from netdecouple.frontends.torch.convolutions import Convolution, Factorized

SHAPES = ((64, 56), (128, 28), (256, 14), (256, 28), (512, 14))  # channels, height and width
BATCHES = (1, 32)
TYPES = ("float16", "float32")
SHARES = (0.5, 0.25)  # of the MACs
FAMILIES = ("nd-dp", "sd", "cd", "cp")
CALLS = 10  # in a graph


@dataclass(frozen=True)
class Row:
    """What fewer MACs make of a network's time: microseconds are medians, of a call."""

    where: str
    network: str
    batch: int
    type: str
    share: float  # of the MACs, at most
    family: str
    macs: float  # times fewer
    dense: float
    made: float
    faster: tuple[float, float, float]  # times, quartiles over rounds


def vgg16() -> nn.Sequential:
    """The convolutions of VGG16 (Simonyan and Zisserman 2015, configuration D)."""
    from torch import nn

    layers: list[nn.Module] = []
    n_i = 3
    for widths in WIDTHS:
        for n_o in widths:
            layers += [nn.Conv2d(n_i, n_o, 3, padding=1), nn.ReLU()]
            n_i = n_o
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@cache
def decoupled(convolution: Convolution, family: str, share: float, size: int) -> tuple[Factorized, int]:
    """A layer with weights made up, with a share of its MACs at most, and how many these are."""
    from netdecouple.frontends.torch.convolutions import Factorized

    chosen, g = method(family, uniform=True, rounds=0), convolution.geometry
    step = Step(sizes_for(chosen.families[0], g, (size, size), (share,))[0])
    weight = np.random.default_rng(0).standard_normal(g.weight_shape)
    fitted, _ = chosen.fit(Problem.data_free(g, weight, np.zeros(g.n_o)), (step,))
    return Factorized.of(convolution, fitted.astype(np.float32)), fitted.macs(size, size)


def smaller(network: nn.Sequential, family: str, share: float, size: int) -> tuple[nn.Sequential, float]:
    """Every convolution but the first of a colour picture in two stages, and how many times fewer MACs."""
    from torch import nn

    from netdecouple.frontends.torch.convolutions import Convolution
    from netdecouple.frontends.torch.replacement import substitute

    made = copy.deepcopy(network)
    before = after = 0
    for name, layer in network.named_children():
        if isinstance(layer, nn.MaxPool2d):
            size //= 2
        if isinstance(layer, nn.Conv2d):
            convolution = Convolution.of(layer)
            macs = convolution.macs((size, size))
            before += macs
            if layer.in_channels > 3:
                factorized, macs = decoupled(convolution, family, share, size)
                substitute(made, name, copy.deepcopy(factorized))
            after += macs
    return made, before / after


def graphed(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Capture some calls of a module, and return what replays them and waits for their end."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # cuDNN looks for its fastest algorithms
            module(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            module(x)

    def replay(held: object = (module, x)) -> None:  # the graph reads where their numbers lie
        graph.replay()
        torch.cuda.synchronize()

    return replay


def cases() -> Iterator[tuple[str, nn.Sequential, int, int]]:
    """What it is, the network, and its channels and size of input."""
    from torch import nn

    for n, size in SHAPES:
        yield f"{n} @ {size}", nn.Sequential(nn.Conv2d(n, n, 3, padding=1)), n, size
    yield "VGG16 @ 224", vgg16(), 3, 224


def timed(seconds: float) -> Iterator[Row]:
    """Time every case, dense and in every family, in turn."""
    import torch

    where = (
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    )
    for name, network, n, size in cases():
        ways = [(s, family, *smaller(network, family, s, size)) for s in SHARES for family in FAMILIES]
        for batch in BATCHES:
            for kind in TYPES:
                dtype = getattr(torch, kind)
                x = torch.randn(batch, n, size, size, device="cuda", dtype=dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                placed: dict[str, Any] = {
                    "device": "cuda",
                    "dtype": dtype,
                    "memory_format": torch.channels_last,
                }
                modules = [network, *(way[2] for way in ways)]
                calls = [graphed(copy.deepcopy(module).to(**placed), x) for module in modules]
                times = 1e3 * measure(calls, seconds) / CALLS
                for index, (share, family, _, macs) in enumerate(ways, start=1):
                    quartiles = np.percentile(times[:, 0] / times[:, index], (25, 50, 75)).tolist()
                    dense, made = np.median(times[:, [0, index]], axis=0).tolist()
                    yield Row(where, name, batch, kind, share, family, macs, dense, made, tuple(quartiles))


def tables(found: Iterable[Row]) -> Iterator[Table]:
    """A table for every machine; a line for every network, batch size, type and share of the MACs."""
    lines: dict[str, dict[tuple[str, int, str, float], dict[str, Row]]] = {}
    for row in found:
        key = (row.network, row.batch, row.type, row.share)
        lines.setdefault(row.where, {}).setdefault(key, {})[row.family] = row
    for where, own in lines.items():
        out = Table(title=where)
        for column in ("n @ size", "batch", "type", "dense", "MACs", *FAMILIES):
            out.add_column(column, justify="right")
        for (name, batch, kind, share), made in own.items():
            dense = f"{next(iter(made.values())).dense:.1f} µs"
            faster = (f"{made[family].faster[1]:.2f}×" for family in FAMILIES)
            out.add_row(name, str(batch), kind, dense, f"{100 * share:.0f} %", *faster)
        yield out


def main(
    seconds: Annotated[float, typer.Option(help="For each line.")] = 1.0,
    store: Annotated[Path | None, typer.Option(help="Keep rows here: docs/gpu.jsonl.")] = None,
) -> None:
    """Print the table."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here, or PyTorch was built without CUDA")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    found = []
    for row in timed(seconds):
        found.append(row)
        rows.keep(store, row)
    for table in tables(found):
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
