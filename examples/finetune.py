"""Train, decouple, fine-tune: ``python examples/finetune.py`` (needs ``netdecouple[torch]``).

The script trains a small network on the digits that come with the package, decouples it to an eighth of its
multiply-adds, and trains it a little more. Half a minute on one core.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import netdecouple

TRAIN = 700  # of the 1,000 labelled images; the test uses the others


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the package's labelled images (N, 1, 32, 32) in 0..1, and their labels (N,)."""
    with np.load(Path(netdecouple.__file__).parent / "demo" / "digits.npz") as data:
        x, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    return functional.avg_pool2d(x.permute(0, 3, 1, 2) / 255, 2), labels


def network() -> nn.Module:
    """Build a network of four convolutions with BatchNorms."""
    layers: list[nn.Module] = []
    for n_i, n_o, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 2)):
        conv = nn.Conv2d(n_i, n_o, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(n_o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(net: nn.Module, x: torch.Tensor, labels: torch.Tensor, epochs: int, rate: float) -> None:
    """Train a network; a decoupled module is trained like any other."""
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            shift = torch.randint(-3, 4, (2,)).tolist()  # few images: shift them
            optimizer.zero_grad()
            functional.cross_entropy(net(x[batch].roll(shift, (2, 3))), labels[batch]).backward()
            optimizer.step()
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    return (net(x).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, labels = images()
    training, test = (x[:TRAIN], labels[:TRAIN]), (x[TRAIN:], labels[TRAIN:])
    net = network()
    train(net, *training, epochs=30, rate=3e-3)
    print(f"as trained   {accuracy(net, *test):.1%}", flush=True)

    small = netdecouple.decouple(net, training[0], macs=0.12, settings=netdecouple.Settings(families=("nd",)))
    report = small.decoupling.report
    print(
        f"decoupled    {accuracy(small, *test):.1%} with {report.macs_before / report.macs:.1f}× fewer MACs"
    )

    train(small, *training, epochs=10, rate=3e-4)
    print(f"fine-tuned   {accuracy(small, *test):.1%}")


if __name__ == "__main__":
    main()
