"""The fused operator in PyTorch: ``netdecouple::decoupled_conv``, on the CPU.

Importing this file registers the operator, which must be done before an exported program that contains it is
loaded. Inputs and outputs are float32 tensors in contiguous memory format. Gradients are those of standard
operators, which also compute the outputs where the compiled library is missing.

The library packs the weights when they are first used, and when they have changed since by PyTorch's count of
changes. Optimizers may change weights without counting, and writing through ``weight.data`` or a NumPy view
is not counted either: callers `forget` the weights then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization

NAME = f"{kernels.DOMAIN}::decoupled_conv"
SCHEMA = (
    "(Tensor x, Tensor depthwise, Tensor pointwise, Tensor bias, Tensor channels, Tensor? slope, "
    "Tensor? residual, int in_channels, int[] strides, int[] pads, int[] dilations, int groups, "
    "float? minimum, float? maximum) -> Tensor"
)
TENSORS = 7  # the first arguments


def forget(weights: Iterable[torch.Tensor] | None = None) -> None:
    """Discard packed weights, so that the next call packs them again.

    Args:
        weights: pointwise weights whose layers are discarded; None: all layers.
    """
    if weights is None:
        _packs.clear()
    for weight in weights or ():
        _packs.pop(weight, None)


class _Call(NamedTuple):
    """The operator's arguments."""

    x: torch.Tensor  # (n, n_i, h, w)
    depthwise: torch.Tensor  # (rows, 1, kh, kw)
    pointwise: torch.Tensor  # (n_o, rows / groups, 1, 1)
    bias: torch.Tensor  # (n_o,)
    channels: torch.Tensor  # (rows,)
    slope: torch.Tensor | None  # (n_o,)
    residual: torch.Tensor | None  # as the output
    in_channels: int
    strides: list[int]
    pads: list[int]
    dilations: list[int]
    groups: int
    minimum: float | None
    maximum: float | None

    def geometry(self) -> ConvGeometry:
        """The geometry of the convolution that the weights replace."""
        (sh, sw), (top, left, bottom, right), (dh, dw) = self.strides, self.pads, self.dilations
        n_o, (kh, kw), pads = self.pointwise.shape[0], self.depthwise.shape[2:], (top, left, bottom, right)
        return ConvGeometry(n_o, self.in_channels, kh, kw, (sh, sw), pads, (dh, dw), self.groups)

    @property
    def weights(self) -> list[torch.Tensor]:
        """All weights that there are."""
        weights = self.depthwise, self.pointwise, self.bias, self.channels, self.slope
        return [tensor for tensor in weights if tensor is not None]

    def output_shape(self) -> tuple[int, int, int, int]:
        """Return the output's shape; ValueError if an argument has a wrong type, device or shape."""
        for name, tensor in zip(self._fields, self[:TENSORS], strict=False):
            _check_type(name, tensor, torch.int64 if name == "channels" else torch.float32)
        for name, tensor in (("depthwise", self.depthwise), ("pointwise", self.pointwise)):
            if tensor.ndim != 4:
                raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, not four dimensions")
        g, rows = self.geometry(), self.depthwise.shape[0]
        shapes: dict[str, tuple[int, ...]] = {
            "depthwise": (rows, 1, g.kh, g.kw),
            "pointwise": (g.n_o, rows // g.groups, 1, 1),
            "bias": (g.n_o,),
            "channels": (rows,),
            "slope": (g.n_o,),
        }
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, not {shape}")
        residual = None if self.residual is None else self.residual.shape
        return kernels.output_shape(NAME, g, self.x.shape, residual)

    def standard(self) -> torch.Tensor:
        """Compute the output with standard operators."""
        top, left, bottom, right = self.pads
        x = functional.pad(self.x, (left, right, top, bottom)).index_select(1, self.channels)
        rows = self.depthwise.shape[0]
        x = functional.conv2d(x, self.depthwise, None, self.strides, 0, self.dilations, rows)
        y = functional.conv2d(x, self.pointwise, self.bias, groups=self.groups)
        if self.residual is not None:
            y = y + self.residual
        if self.slope is not None:
            y = functional.prelu(y, self.slope)
        if self.minimum is not None or self.maximum is not None:
            y = y.clamp(self.minimum, self.maximum)
        return y.contiguous()

    def packed(self) -> kernels.DecoupledConv:
        """Pack the layer for the compiled library."""
        g, rows = self.geometry(), self.depthwise.shape[0]
        depthwise, pointwise, bias, channels, *rest = (t.numpy(force=True) for t in self.weights)
        slope = rest[0] if rest else None
        stages = (
            ConvStage(replace(g, n_o=rows, n_i=rows, groups=rows), depthwise, channels),
            ConvStage(ConvGeometry(g.n_o, rows, 1, 1, groups=g.groups), pointwise),
        )
        low, high = self.minimum, self.maximum
        limits = (-math.inf if low is None else low, math.inf if high is None else high)
        return kernels.DecoupledConv(Factorization(g, stages, bias), slope, limits)


def _check_type(name: str, tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    if tensor is not None and (tensor.dtype != dtype or tensor.device.type not in ("cpu", "meta")):
        raise ValueError(f"{NAME}: {name} must be {dtype} on the CPU, not {tensor.dtype} on {tensor.device}")


class _Pack:
    """A packed layer, with the state of its weights when they were packed.

    The weights are held by weak references, so that they can be freed. Their storages are held, so that no
    other tensor can be allocated at the same address.
    """

    def __init__(self, call: _Call) -> None:
        self._references = [TensorWeakRef(tensor) for tensor in call.weights]
        self._storages = [tensor.untyped_storage() for tensor in call.weights]
        self._states = list(map(_state, call.weights))  # first: they may change while they are packed
        self.layer = call.packed()

    def holds(self, call: _Call) -> bool:
        """Tell whether the weights are the same tensors, and have not changed since."""
        weights = call.weights
        return len(weights) == len(self._references) and all(
            reference() is tensor and _state(tensor) == state
            for tensor, reference, state in zip(weights, self._references, self._states, strict=True)
        )


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor's address and layout, and how often it was changed."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()


# Pointwise weight → the arguments that are not tensors → the layer as it was packed last. Two threads may
# pack the same layer at once; either result is right.
_packs = WeakTensorKeyDictionary()


def _layer(call: _Call) -> kernels.DecoupledConv | None:
    """Return the packed layer; None if the library is missing. Weights that do not fit are refused first."""
    arguments = repr(call[TENSORS:])
    pack = _packs.get(call.pointwise, {}).get(arguments)
    if pack is not None and pack.holds(call):
        layer: kernels.DecoupledConv = pack.layer
        return layer
    call.output_shape()
    if not kernels.available():
        return None
    if any(tensor.is_inference() for tensor in call.weights):
        return call.packed()  # PyTorch does not count changes of these
    pack = _Pack(call)
    _packs.setdefault(call.pointwise, {})[arguments] = pack
    return pack.layer


def _run(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    layer = _layer(call)
    if layer is None:
        return call.standard()
    _check_type("x", call.x)
    _check_type("residual", call.residual)
    residual = None if call.residual is None else call.residual.contiguous().numpy(force=True)
    x = call.x.contiguous().numpy(force=True)
    return torch.from_numpy(layer(x, residual, torch.get_num_threads()))


def _fake(*arguments: Any) -> torch.Tensor:
    call = _Call(*arguments)
    return call.x.new_empty(call.output_shape())


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.rest = inputs[TENSORS:]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needed = ctx.needs_input_grad[:TENSORS]
    with torch.enable_grad():
        # aliases, because one tensor may be two of the arguments
        tensors: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        y = _Call(*tensors, *ctx.rest).standard()
    inputs = [tensor for tensor, is_needed in zip(tensors, needed, strict=True) if is_needed]
    gradients = iter(torch.autograd.grad(y, inputs, gradient, create_graph=torch.is_grad_enabled()))
    return (*(next(gradients) if is_needed else None for is_needed in needed), *(None for _ in ctx.rest))


def _flops(x: Any, depthwise: Any, pointwise: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Count the operations of both stages, two to a MAC as PyTorch's counter does, from arguments' shapes."""
    filters, outputs = math.prod(depthwise), math.prod(pointwise)
    return int(2 * out_shape[0] * math.prod(out_shape[2:]) * (filters + outputs))


decoupled_conv = torch.library.custom_op(NAME, _run, mutates_args=(), schema=SCHEMA)
decoupled_conv.register_fake(_fake)
decoupled_conv.register_autograd(_backward, setup_context=_remember)
register_flop_formula(getattr(torch.ops, kernels.DOMAIN).decoupled_conv)(_flops)
