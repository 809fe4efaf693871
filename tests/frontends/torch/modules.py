"""Small PyTorch modules with seeded random weights, and what decoupling them gives, quickly."""

# mypy: allow-subclassing-any

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

import netdecouple
from netdecouple import Settings

SHAPE = (3, 16, 16)  # large enough for the fused operator


class SamePadded(nn.Conv2d):
    """Pads as TensorFlow does, like timm's Conv2dSame: what its attributes say is not how it pads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(
            functional.pad(x, (0, 1, 0, 1)),
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )


class Net(nn.Module):
    """A residual network with BatchNorms, a stride, a subclass, grouped channels, and a tied 1×1."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
        self.same = SamePadded(c, c, 3, 2)
        self.conv = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(c)
        self.grouped = nn.Conv2d(c, 2 * c, 3, padding=1, groups=2)
        self.head = nn.Linear(2 * c, 5)
        self.tied = nn.Linear(2 * c, 5)
        self.tied.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.same(self.stem(x)))
        x = functional.relu(x + self.norm(self.conv(x)))
        x = self.grouped(x).mean((2, 3))
        return self.head(x) + 0.1 * self.tied(x)


def net(seed: int = 0, channels: int = 8) -> nn.Module:
    """The network in evaluation mode, with BatchNorm statistics as after training."""
    torch.manual_seed(seed)
    module = Net(channels)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module.eval()


def inputs(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def decoupled(module: nn.Module, method: str = "nd-dp", share: float = 0.5) -> Any:
    """By one method, from the weights alone."""
    settings = Settings(data_free=True, families=(method,))
    return netdecouple.decouple(module, inputs(12), macs=share, settings=settings)
