"""ResNet-20 and ResNet-56 through the PyTorch front door, beside the ONNX one. Prints a table.

The modules are built here and take their weights from the pretrained ONNX networks (NETDECOUPLE_SHARED, or
../shared beside the repository). Same images and settings: the doors differ in which pixels they sample.

    python benchmarks/torch_accuracy.py --network resnet20 --ratio 2
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import netdecouple
from accuracy import CIFAR10, shared
from netdecouple.data.calibration import load
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.pipeline import accuracy


class Block(nn.Module):
    """He et al. 2016, with the shortcut of option A: every other pixel, and channels of zeros."""

    def __init__(self, n_i: int, n_o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_i, n_o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_o)
        self.conv2 = nn.Conv2d(n_o, n_o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_o)
        self.stride, self.extra = stride, (n_o - n_i) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """ResNet of 6 n + 2 layers for 32 × 32 images."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, width in enumerate((16, 32, 64), 1):
            before = max(width // 2, 16)
            blocks = [
                Block(before if i == 0 else width, width, 2 if i == 0 < stage - 1 else 1) for i in range(n)
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def pretrained(name: str) -> ResNet:
    """A module with the weights of one of the pretrained ONNX networks."""
    proto = onnx.load(shared() / "models" / f"{name}.onnx")
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.graph.initializer}
    module = ResNet((int(name.removeprefix("resnet")) - 2) // 6)
    wanted = module.state_dict()
    module.load_state_dict({k: weights.get(k, v) for k, v in wanted.items()})
    missing = [k for k in wanted if k not in weights and not k.endswith("num_batches_tracked")]
    assert not missing, f"{name} has no {missing}"
    return module.eval()


def main(
    network: Annotated[list[str] | None, typer.Option()] = None,
    ratio: Annotated[list[float] | None, typer.Option(help="Times fewer MACs.")] = None,
    images: Annotated[int, typer.Option(help="Calibration images.")] = 1000,
    families: Annotated[str, typer.Option(help="As in `netdecouple run`.")] = "all",
) -> None:
    """Print the table."""
    data = np.load(shared() / "data" / "cifar10.npz")
    test, labels = CIFAR10(data["test"]), data["test_labels"]
    source = f"{shared()}/data/cifar10.npz:calib"
    calib = load(source, channels=3, size=(32, 32), preprocessing=CIFAR10, samples=images, seed=0).images
    settings = netdecouple.Settings(families=(families,))
    table = Table(title="CIFAR-10 test, 1,000 images")
    for column in ("network", "door", "MACs", "top-1 before", "top-1", "seconds"):
        table.add_column(column, justify="left" if column in ("network", "door") else "right")
    for name in network or ["resnet20", "resnet56"]:
        module = pretrained(name)
        path = shared() / "models" / f"{name}.onnx"
        for asked in ratio or [2.0]:
            for door, model in (("PyTorch", module), ("ONNX", path)):
                start = time.perf_counter()
                new: Any = netdecouple.decouple(model, calib, macs=1 / asked, settings=settings, samples=None)
                seconds = time.perf_counter() - start
                report = new.decoupling.report if door == "PyTorch" else new.report
                if door == "PyTorch":
                    with torch.no_grad():
                        outputs = [m(torch.from_numpy(test)).numpy() for m in (module, new)]
                else:
                    original = OnnxNetwork(read_model(path), test)
                    outputs = [original.run(test)[0], original.run_built(new.model, test)[0]]
                before, after = (accuracy([o], labels) for o in outputs)
                made = f"{report.macs_before / report.macs:.2f}× fewer"
                table.add_row(name, door, made, f"{100 * before:.1f}", f"{100 * after:.1f}", f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
