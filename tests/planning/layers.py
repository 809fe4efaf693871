"""Layers without a network, for counting and planning."""

from __future__ import annotations

import numpy as np

from netdecouple.convolution import ConvGeometry
from netdecouple.network import Layer


def conv(name: str, n_i: int, n_o: int, size: int, k: int = 3, reason: str = "", groups: int = 1) -> Layer:
    """A k × k convolution that keeps the image size."""
    pad = k // 2
    g = ConvGeometry(n_o, n_i, k, k, pads=(pad, pad, pad, pad), groups=groups)
    weight = np.zeros(g.weight_shape, np.float32)
    return Layer(
        name,
        "Conv",
        g.macs(size, size),
        weight.size + n_o,
        g,
        weight,
        np.zeros(n_o, np.float32),
        (size, size),
        reason,
    )


def linear(name: str, n_i: int, n_o: int) -> Layer:
    g = ConvGeometry(n_o, n_i, 1, 1)
    weight, bias = np.broadcast_to(np.float32(0), g.weight_shape), np.zeros(n_o, np.float32)
    return Layer(name, "Gemm", n_i * n_o, n_i * n_o + n_o, g, weight, bias, (1, 1), is_linear=True)


def vgg16() -> list[Layer]:
    """VGG16 at 224 × 224 (Simonyan and Zisserman 2015, configuration D)."""
    widths = [(64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]
    layers, n_i, size = [], 3, 224
    for stage in widths:
        for n_o in stage:
            layers.append(conv(f"conv{len(layers)}", n_i, n_o, size))
            n_i = n_o
        size //= 2
    return [*layers, linear("fc6", 512 * 49, 4096), linear("fc7", 4096, 4096), linear("fc8", 4096, 1000)]
