"""PyTorch's convolutions as the engine's 2-D convolutions, and factorizations of them as modules.

One dimension is two with a height of one. Of three, the last two are folded into one: a kernel
(kt, kh, kw) is (kt, kh·kw) and reads every output pixel's own kh·kw inputs, side by side. A transposed
convolution is a plain one of the input with zeros between its pixels, with a flipped kernel
(Dumoulin and Visin 2016, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import nn
from torch.autograd import forward_ad

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization, Structure
from netdecouple.kernels.torch import decoupled_conv, forget
from netdecouple.network import ONE_CHANNEL, Array

Ints = tuple[int, ...]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
MODES = {  # NumPy's names, and those of PyTorch's modules
    "zeros": ("constant", "Zero"),
    "reflect": ("reflect", "Reflection"),
    "replicate": ("edge", "Replication"),
    "circular": ("wrap", "Circular"),
}
# of the smallest maps on which the fused operator is no slower, as benchmarks/torch_latency.py measures it in
# one thread and in two: it computes whole vectors of pixels
PIXELS = 14 * 14


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """One of PyTorch's convolutions, or a linear layer, without its weights."""

    n_o: int
    n_i: int
    kernel: Ints  # one entry per dimension; none for a linear layer
    strides: Ints = ()
    before: Ints = ()  # padding, first and last end of every dimension
    after: Ints = ()
    dilations: Ints = ()
    groups: int = 1
    mode: str = "zeros"
    transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Convolution:
        """Read a module's attributes; ``padding`` may be "same" or "valid"."""
        if isinstance(module, nn.Linear):
            return cls(n_o=module.out_features, n_i=module.in_features, kernel=())
        conv: Any = module
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if conv.padding == "same":
            before, after = [r // 2 for r in reach], [r - r // 2 for r in reach]
        elif conv.padding == "valid":
            before = after = [0] * len(reach)
        else:
            before = after = list(conv.padding)
        if conv.transposed:  # padding of the plain convolution that it equals
            before = [r - p for r, p in zip(reach, before, strict=True)]
            after = [b + extra for b, extra in zip(before, conv.output_padding, strict=True)]
        return cls(
            n_o=conv.out_channels,
            n_i=conv.in_channels,
            kernel=tuple(conv.kernel_size),
            strides=tuple(conv.stride),
            before=tuple(before),
            after=tuple(after),
            dilations=tuple(conv.dilation),
            groups=conv.groups,
            mode=conv.padding_mode,
            transposed=conv.transposed,
        )

    @property
    def operator(self) -> str:
        """The name of the module that computes it."""
        if not self.kernel:
            return "Linear"
        return f"Conv{'Transpose' if self.transposed else ''}{len(self.kernel)}d"

    @property
    def refusal(self) -> str:
        """Why it can never be decoupled; empty if it can."""
        if self.groups == self.n_i and self.kernel:
            return "depthwise convolution" if self.n_i > 1 else ONE_CHANNEL
        if self.transposed and len(self.kernel) > 2:
            return "transposed convolution in three dimensions"
        if min((*self.before, *self.after), default=0) < 0:
            return "negative padding"
        return ""

    @property
    def upsamples(self) -> bool:
        """Whether it computes several outputs per input: `geometry` does not tell the costs of its stages."""
        return self.transposed and max(self.strides) > 1

    @property
    def geometry(self) -> ConvGeometry:
        """The 2-D convolution that stands for it in the engine."""
        if not self.kernel:
            return ConvGeometry(self.n_o, self.n_i, 1, 1)
        axes = list(zip(self.kernel, self._steps, self.dilations, *self._pads, strict=True))
        if len(axes) == 1:
            axes.insert(0, (1, 1, 1, 0, 0))
        if len(axes) == 3:
            taps = math.prod(self.kernel[1:])
            axes[1:] = [(taps, taps, 1, 0, 0)]
        (kh, sh, dh, top, bottom), (kw, sw, dw, left, right) = axes
        pads = (top, left, bottom, right)
        return ConvGeometry(self.n_o, self.n_i, kh, kw, (sh, sw), pads, (dh, dw), self.groups)

    @property
    def _steps(self) -> Ints:
        """Strides of the plain convolution that it equals."""
        return (1,) * len(self.kernel) if self.transposed else self.strides

    @property
    def _pads(self) -> tuple[Ints, Ints]:
        """The padding with zeros, which needs no module of its own if both ends are equal."""
        zeros = (0,) * len(self.kernel)
        return (self.before, self.after) if self.mode == "zeros" else (zeros, zeros)

    def output_size(self, size: Sequence[int]) -> Ints:
        """Size of the output map for an input map."""
        axes = (self._dilated(size), self.before, self.after, self.dilations, self.kernel, self._steps)
        return tuple((n + b + a - d * (k - 1) - 1) // s + 1 for n, b, a, d, k, s in zip(*axes, strict=True))

    def _dilated(self, size: Sequence[int]) -> Ints:
        """Size of an input map with the zeros that a transposed convolution puts between its pixels."""
        if not self.transposed:
            return tuple(size)
        return tuple((n - 1) * s + 1 for n, s in zip(size, self.strides, strict=True))

    def size(self, size: Sequence[int]) -> tuple[int, int]:
        """Size of the input map of the engine's 2-D convolution; rows (n,) are such a map as well."""
        if not self.kernel:
            return (size[0], 1)
        padded = self._dilated(size)
        if self.mode != "zeros":
            padded = tuple(n + b + a for n, b, a in zip(padded, self.before, self.after, strict=True))
        match padded:
            case (width,):
                return (1, width)
            case (depth, _, _):
                return (depth, math.prod((*self.output_size(size)[1:], *self.kernel[1:])))
            case _:
                return (padded[0], padded[1])

    def macs(self, size: Sequence[int]) -> int:
        """MACs for one input map."""
        pixels = size if self.transposed or not self.kernel else self.output_size(size)
        return self.n_o * self.n_i // self.groups * math.prod(self.kernel) * math.prod(pixels)

    def kernel_of(self, weight: Array) -> Array:
        """Write PyTorch's weight as the engine's (n_o, n_i / groups, kh, kw)."""
        if self.transposed:
            weight = _turned(weight, self.groups)
        return np.ascontiguousarray(weight.reshape(self.geometry.weight_shape))

    def weight_of(self, kernel: Array) -> Array:
        """Write the engine's kernel as PyTorch's weight: the inverse of `kernel_of`."""
        if not self.kernel:
            return np.ascontiguousarray(kernel[:, :, 0, 0])
        weight = kernel.reshape(self.n_o, self.n_i // self.groups, *self.kernel)
        return np.ascontiguousarray(_turned(weight, self.groups) if self.transposed else weight)

    def maps(self, values: Array) -> Array:
        """View the rows (n, …, c) of a linear layer as maps (n, c, rows); those of others are maps."""
        return values if self.kernel else values.reshape(len(values), -1, values.shape[-1]).swapaxes(1, 2)

    def patches(self, x: Array, positions: NDArray[np.int64]) -> Array:
        """Gather receptive fields of maps (n, n_i, *size) at flat output positions (n, p).

        The result is (n·p, groups, n_i / groups · taps), in the order of the engine's kernel.
        """
        n, p = positions.shape
        rank = len(self.kernel)
        if not rank:
            return x[np.arange(n)[:, None], :, positions].reshape(n * p, 1, -1)
        if self.transposed:
            dilated = np.zeros((*x.shape[:2], *self._dilated(x.shape[2:])), x.dtype)
            dilated[(..., *_every(self.strides))] = x
            x = dilated
        if any((*self.before, *self.after)):
            ends = ((0, 0), (0, 0), *zip(self.before, self.after, strict=True))
            mode: Any = MODES[self.mode][0]
            x = np.pad(x, ends, mode)
        spans = tuple(d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True))
        windows = sliding_window_view(x, spans, axis=tuple(range(2, 2 + rank)))
        windows = windows[(slice(None), slice(None), *_every(self._steps), *_every(self.dilations))]
        places: Any = np.unravel_index(positions, windows.shape[2 : 2 + rank])
        picked = windows[(np.arange(n)[:, None], slice(None), *places)]  # (n, p, c, *kernel)
        return picked.reshape(n * p, self.groups, -1)

    def modules(self, structure: Structure) -> Iterator[nn.Module]:
        """Make the modules of a structure's stages, with weights that are not set yet."""
        if self.mode != "zeros" and any((*self.before, *self.after)):
            yield _padding(self.before, self.after, self.mode)
        pending = set(range(len(self.kernel)))  # dimensions whose stride no stage has taken yet
        last = len(structure.stages) - 1
        for index, (stage, channels) in enumerate(zip(structure.stages, structure.channels, strict=True)):
            if channels is not None:
                yield Gather(channels, len(self.kernel))
            yield from self._stage(stage, pending, index == last)

    def _stage(self, stage: ConvGeometry, pending: set[int], bias: bool) -> Iterator[nn.Module]:
        rank, whole = len(self.kernel), self.geometry
        if not rank:
            yield nn.Linear(stage.n_i, stage.n_o, bias=bias)
            return
        taken = set()
        for axis in pending:
            side = 0 if axis == 0 and rank > 1 else 1  # of the 2-D convolution; folded dimensions go together
            if _along(stage, side) == _along(whole, side):
                taken.add(axis)
        pending -= taken

        def chosen(values: Ints, other: int) -> Ints:
            return tuple(value if axis in taken else other for axis, value in enumerate(values))

        kernel, strides, dilations = (chosen(v, 1) for v in (self.kernel, self.strides, self.dilations))
        before, after = (chosen(v, 0) for v in self._pads)
        options = {"stride": strides, "dilation": dilations, "groups": stage.groups, "bias": bias}
        if self.transposed and max((*strides, *kernel)) > 1:
            name = f"ConvTranspose{rank}d"
            ends = zip(dilations, kernel, before, strict=True)
            options["padding"] = tuple(d * (k - 1) - b for d, k, b in ends)
            options["output_padding"] = tuple(a - b for a, b in zip(after, before, strict=True))
        else:
            name = f"Conv{rank}d"
            if before != after:
                yield _padding(before, after, "zeros")
            else:
                options["padding"] = before
        yield getattr(nn, name)(stage.n_i, stage.n_o, kernel, **options)


def _padding(before: Ints, after: Ints, mode: str) -> nn.Module:
    """Make a module that pads as a convolution would, but differently at the two ends, or not with zeros."""
    ends = zip(reversed(before), reversed(after), strict=True)
    return getattr(nn, f"{MODES[mode][1]}Pad{len(before)}d")(tuple(chain.from_iterable(ends)))


def _along(g: ConvGeometry, side: int) -> Ints:
    """Kernel size, stride, pads and dilation along one side; a kernel of size 1 may have a stride or pads."""
    kernel = (g.kh, g.kw)[side]
    return (kernel, g.strides[side], g.pads[side], g.pads[side + 2], g.dilations[side] if kernel > 1 else 1)


def _every(steps: Ints) -> tuple[Any, ...]:
    return tuple(slice(None, None, step) for step in steps)


def _turned(weight: Array, groups: int) -> Array:
    """Convert (a, b / groups, *k) → (b, a / groups, *k), and flip every kernel."""
    flipped = np.flip(weight, tuple(range(2, weight.ndim)))
    blocks = flipped.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(blocks).reshape(-1, *blocks.shape[2:])


class Gather(nn.Module):
    """Select channels, in order and possibly more than once, of maps of ``rank`` dimensions."""

    if TYPE_CHECKING:  # TorchScript does not read annotations that are text
        channels: torch.Tensor

    def __init__(self, channels: NDArray[np.int64], rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("channels", torch.tensor(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(x.ndim - 1 - self.rank, self.channels)  # there may be no batch

    def extra_repr(self) -> str:
        return f"{len(self.channels)}"


class Factorized(nn.Sequential):
    """A chain of plain convolutions in the place of one.

    On the CPU, in float32 and without gradients, a depthwise convolution and the pointwise one after it are
    computed by the fused operator; otherwise, and in exported or compiled programs, one after the other.
    """

    def __init__(self, convolution: Convolution, structure: Structure) -> None:
        super().__init__(*convolution.modules(structure))
        self.convolution, self.geometry, self.structure = convolution, structure.geometry, structure
        self.selects = tuple(i for i, channels in enumerate(structure.channels) if channels is not None)
        self._fused = self._pairs()

    @classmethod
    @torch.no_grad()
    def of(cls, convolution: Convolution, factorization: Factorization) -> Factorized:
        """Make the modules of a factorization, with its weights."""
        module = cls(convolution, factorization.structure)
        stages: list[Any] = [part for part in module if isinstance(part, LAYERS)]
        for layer, stage in zip(stages, factorization.stages, strict=True):
            layer.weight.copy_(torch.from_numpy(Convolution.of(layer).weight_of(stage.weight)))
        bias = factorization.bias
        stages[-1].bias.copy_(torch.zeros(()) if bias is None else torch.from_numpy(bias))
        return module

    def factorization(self) -> Factorization:
        """The same as arrays, copies of the weights as they are now."""
        layers: list[Any] = [part for part in self if isinstance(part, LAYERS)]
        stages = tuple(
            ConvStage(
                geometry, Convolution.of(layer).kernel_of(layer.weight.numpy(force=True).copy()), channels
            )
            for layer, geometry, channels in zip(
                layers, self.structure.stages, self.structure.channels, strict=True
            )
        )
        return Factorization(self.structure.geometry, stages, layers[-1].bias.numpy(force=True).copy())

    def _pairs(self) -> dict[int, ConvGeometry]:
        """The separable pairs that the fused operator computes: index of the first module → geometry."""
        pairs = {}
        modules: list[Any] = list(self)
        for at, (first, second) in enumerate(pairwise(modules)):
            if not (type(first) is type(second) is nn.Conv2d):
                continue
            # the operator adds a bias, and only the last stage has one
            is_pair = first.groups == first.in_channels and second.bias is not None
            if is_pair and second.kernel_size == (1, 1) == second.stride and not any(second.padding):
                gathered = at > 0 and isinstance(modules[at - 1], Gather)
                geometry = Convolution.of(first).geometry
                pairs[at - gathered] = replace(geometry, n_o=second.out_channels, groups=second.groups)
        return pairs

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # named as PyTorch's layers name it
        if not torch.jit.is_scripting():
            return self._run(input)
        for module in self:
            input = module(input)
        return input

    @torch.jit.unused
    def _run(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):  # torch.fx traces it
            return super().forward(x)
        n_i, size = self.convolution.n_i, list(x.shape)
        given = size[: x.ndim - len(self.convolution.kernel)][-1:]
        if given != [n_i] and given and not torch.jit.is_tracing():  # its stages might take them
            raise RuntimeError(
                f"expected input{size} to have {n_i} channels, but got {given[0]} channels instead"
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            forget(part.weight for part in self if isinstance(part, nn.Conv2d))
        if not (self._fused and _is_fusable(x) and all(map(_is_plain, self))):
            return super().forward(x)
        modules = enumerate(self)
        for at, module in modules:
            if (geometry := self._fused.get(at)) is None:
                x = module(x)
                continue
            depthwise: Any = next(modules)[1] if isinstance(module, Gather) else module
            channels = module.channels if isinstance(module, Gather) else _all_channels(depthwise)
            pointwise: Any = next(modules)[1]
            x = decoupled_conv(
                *(x, depthwise.weight, pointwise.weight, pointwise.bias, channels, None, None),
                *(x.shape[1], list(geometry.strides), list(geometry.pads), list(geometry.dilations)),
                *(geometry.groups, None, None),
            )
        return x


def _all_channels(depthwise: Any) -> torch.Tensor:
    channels = getattr(depthwise, "_reads", None)
    if channels is None:
        times = depthwise.out_channels // depthwise.in_channels
        with torch.inference_mode(False):  # else the operator would pack the weights at every call
            channels = depthwise._reads = torch.arange(depthwise.in_channels).repeat_interleave(times)
    return channels


def _is_plain(module: Any) -> bool:
    """Whether a module's weights say all: it has no hooks, no parametrization, and no adapter around it."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) is nn.Conv2d:
        return type(module.weight) is nn.Parameter
    return type(module) is Gather or type(module).__module__ == nn.ZeroPad2d.__module__  # a padding


def _is_fusable(x: torch.Tensor) -> bool:
    """Whether the fused operator computes the same on such an input, and is no slower."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 4
        and x.shape[2] * x.shape[3] >= PIXELS
        and not torch.is_grad_enabled()
        and getattr(forward_ad, "_current_level", -1) < 0  # forward-mode derivatives
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous()
        and kernels.usable()
    )
