"""Decoupled layers and networks in eager PyTorch: dense, plain stages, fused operator. Prints a table.

python benchmarks/torch_latency.py               # one thread and two
python benchmarks/torch_latency.py --threads 1 --seconds 1

Layers are 3×3, stride 1, n → n channels, batch 1, float32 on the CPU, without gradients. Ranks are T terms
for every channel, or on average where they differ from channel to channel. "of stages" above 1 says that
the operator is faster than the stages it stands for. With more threads than idle cores the stages wait for
each other, and the table says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from netdecouple import kernels
from netdecouple.convolution import Structure, placeholder
from netdecouple.families.nd import DepthwisePointwise
from netdecouple.frontends.torch import convolutions
from netdecouple.frontends.torch.convolutions import Convolution, Factorized
from netdecouple.frontends.torch.replacement import substitute
from netdecouple.runtimes.timing import Ratio, measure

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7), (32, 32))  # channels, height and width
TERMS = (2, 4)


class Block(nn.Module):
    """A residual block; where it halves the map, pooling makes its shortcut."""

    def __init__(self, n_i: int, n_o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_i, n_o, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_o)
        self.conv2 = nn.Conv2d(n_o, n_o, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_o)
        self.shortcut = nn.Identity() if n_i == n_o else nn.Conv2d(n_i, n_o, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """A small residual network for 56×56 images."""
    blocks = [Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1), Block(128, 256, 2), Block(256, 256, 1)]
    stem = nn.Conv2d(3, 64, 3, padding=1)
    return nn.Sequential(stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def structure(convolution: Convolution, terms: int, uniform: bool) -> Structure:
    """``terms`` depthwise filters per channel, or as many in all, drawn at random."""
    g = convolution.geometry
    counts = np.full(g.n_i, terms)
    if not uniform:
        shares = np.random.default_rng(0).dirichlet(np.ones(g.n_i))
        counts = np.minimum(np.floor(shares * terms * g.n_i).astype(int), g.kh * g.kw)
    made = DepthwisePointwise().structure(g, int(counts.sum()))
    return replace(made, channels=(np.arange(g.n_i).repeat(counts), None))


def cases() -> Iterator[tuple[str, nn.Module, nn.Module, torch.Tensor]]:
    """What it is, as it was, decoupled, and an input."""
    for n, size in SHAPES:
        dense = nn.Conv2d(n, n, 3, padding=1)
        convolution = Convolution.of(dense)
        for terms in TERMS:
            for uniform in (True, False):
                factorization = placeholder(structure(convolution, terms, uniform), 0)
                name = f"{n} @ {size}, T = {terms}{'' if uniform else ' on average'}"
                yield name, dense, Factorized.of(convolution, factorization), torch.randn(1, n, size, size)
    network = resnet().eval()
    made = copy.deepcopy(network)
    for name, layer in network.named_modules():
        if name.endswith(("conv1", "conv2")):
            convolution = Convolution.of(layer)
            factorization = placeholder(structure(convolution, 3, False), 0)
            substitute(made, name, Factorized.of(convolution, factorization))
    yield "ResNet, T = 3 on average", network, made, torch.randn(1, 3, 56, 56)


def unfused(module: nn.Module) -> nn.Module:
    """The same with its plain stages only."""
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, Factorized):
            part._fused = {}
    return module


def fused(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run with the operator wherever it can run, whether that pays or not."""
    pixels, convolutions.PIXELS = convolutions.PIXELS, 0
    try:
        return module(x)
    finally:
        convolutions.PIXELS = pixels


def main(
    threads: Annotated[list[int] | None, typer.Option()] = None,
    seconds: Annotated[float, typer.Option(help="For each line.")] = 2.0,
) -> None:
    """Print the table."""
    console = Console(width=110)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    kernels.check_available()
    for count in threads or [1, 2]:
        torch.set_num_threads(count)
        table = Table(title=f"PyTorch {torch.__version__}, {kernels.level()}, {count} thread(s)")
        for column in ("", "dense ms", "stages ms", "fused ms", "of dense", "of stages", "quartiles"):
            table.add_column(column, justify="right")
        for name, dense, made, x in cases():
            calls: list[Callable[[], Any]] = [partial(m, x) for m in (dense, unfused(made))]
            times = measure([*calls, partial(fused, made, x)], seconds)
            medians, ratio = np.median(times, axis=0), Ratio.of(times[:, 1], times[:, 2])
            faster = [np.median(times[:, i] / times[:, 2]) for i in (0, 1)]
            cells = [*(f"{m:.3f}" for m in medians), *(f"{f:.2f}×" for f in faster)]
            table.add_row(name, *cells, f"{ratio.lower:.2f}–{ratio.upper:.2f}")
            console.log(name, *cells, f"{ratio.lower:.2f}–{ratio.upper:.2f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
