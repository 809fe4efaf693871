"""A module that holds the weights of the fused operator, and has everything that it can compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from netdecouple.convolution import Array, ConvGeometry, Factorization
from netdecouple.kernels.torch import decoupled_conv, forget


class DecoupledConv2d(torch.nn.Module):
    """A depthwise and a pointwise convolution, computed by the operator, with PReLU, limits and a residual.

    Weights are packed again in every call with gradients, as in decoupled layers of networks.

    Args:
        geometry: of the convolution that the module replaces.
        rows: number of depthwise filters.
        slope: whether negative outputs are multiplied by factors, as in PReLU.
        limits: least and largest output; (0, inf) is ReLU.
    """

    def __init__(
        self,
        geometry: ConvGeometry,
        rows: int,
        *,
        slope: bool = False,
        limits: Sequence[float] = (-math.inf, math.inf),
    ) -> None:
        super().__init__()
        self.geometry = g = geometry
        low, high = map(float, limits)
        self.minimum, self.maximum = None if low == -math.inf else low, None if high == math.inf else high
        self.depthwise = torch.nn.Parameter(torch.zeros(rows, 1, g.kh, g.kw))
        self.pointwise = torch.nn.Parameter(torch.zeros(g.n_o, rows // g.groups, 1, 1))
        self.bias = torch.nn.Parameter(torch.zeros(g.n_o))
        self.register_parameter("slope", torch.nn.Parameter(torch.zeros(g.n_o)) if slope else None)
        self.register_buffer("channels", torch.zeros(rows, dtype=torch.int64))  # read by the filters

    @classmethod
    def of(
        cls, factorization: Factorization, *, slope: Array | None = None, **options: Any
    ) -> DecoupledConv2d:
        """Copy the weights of a depthwise stage and a pointwise one."""
        depthwise, pointwise = factorization.stages
        module = cls(factorization.geometry, depthwise.geometry.n_o, slope=slope is not None, **options)
        arrays = {
            "depthwise": depthwise.weight,
            "pointwise": pointwise.weight,
            "bias": factorization.bias,
            "slope": slope,
            "channels": depthwise.reads,
        }
        with torch.no_grad():
            for name, array in arrays.items():
                if array is not None:
                    getattr(module, name).copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return module

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return (n, n_o, h', w') for x (n, n_i, h, w); ``residual`` is added before slope and limits."""
        g = self.geometry
        if self.pointwise.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            forget([self.pointwise])
        return decoupled_conv(
            *(x, self.depthwise, self.pointwise, self.bias, self.channels, self.slope, residual),
            *(g.n_i, list(g.strides), list(g.pads), list(g.dilations), g.groups, self.minimum, self.maximum),
        )
