"""Find the layers of a module, and what each of them computes, in traces of its forward passes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netdecouple.convolution import Structure
from netdecouple.errors import ModelError
from netdecouple.frontends.batches import pick
from netdecouple.frontends.torch.convolutions import LAYERS, Convolution
from netdecouple.frontends.torch.samples import to_numpy
from netdecouple.frontends.torch.trace import ADDITIONS, Call, Trace, tensors
from netdecouple.network import Array, Layer, Observation

ROUNDING = 1e-3  # relative difference up to which two computations count as the same


@dataclass(frozen=True, kw_only=True)
class TorchLayer:
    """A layer that can be replaced, as it ran."""

    layer: Layer
    convolution: Convolution
    weight: torch.Tensor  # BatchNorm folded in
    bias: torch.Tensor
    norm: str  # the BatchNorm that is folded in; empty if there is none
    input_shape: tuple[int, ...]  # of its first call for one sample
    single_map: bool  # it makes exactly one map, of the same size for every sample
    shortcut: tuple[str, str] | None  # the module whose input "x" or output "y" is added to its output

    def observation(
        self,
        batch: slice,
        calls: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        positions: NDArray[np.int64],
        shortcut: torch.Tensor | None,
    ) -> Observation:
        """Gather inputs, and outputs where they exist, at some of the layer's output positions.

        Args:
            batch: the samples that were run.
            calls: the input and the output of every call.
            positions: (n, p), in a map of the layer's nominal size. A layer that is called several times, or
                makes several maps, has them spread evenly over all of its maps.
            shortcut: is added to the output.
        """
        name, convolution = self.layer.name, self.convolution
        xs = [to_numpy(x) for x, _ in calls]
        ys = [None if y is None else to_numpy(y) for _, y in calls]
        if self.single_map:
            outputs = np.zeros((0, 0), np.float32) if ys[0] is None else pick(ys[0], positions)
            added = None if shortcut is None else pick(to_numpy(shortcut), positions)
            return Observation(name, batch, lambda: convolution.patches(xs[0], positions), outputs, added)
        n_maps = [len(x) for x in xs]
        pixels = [math.prod(convolution.output_size(x.shape[2:])) for x in xs]
        bounds = np.cumsum([0, *(m * p for m, p in zip(n_maps, pixels, strict=True))])
        spread = positions.reshape(-1) * bounds[-1] // math.prod(self.layer.output_size)
        patches, picked = [], []
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            inside = spread[(bounds[i] <= spread) & (spread < bounds[i + 1])] - bounds[i]
            maps, at = np.divmod(inside, pixels[i])
            for index in np.unique(maps):
                chosen = at[maps == index][None]
                patches.append(convolution.patches(x[index : index + 1], chosen))
                picked.append(pick(y[index : index + 1], chosen) if y is not None else np.zeros((0, 0)))
        gathered: Array = np.concatenate(patches)
        return Observation(name, batch, lambda: gathered, np.concatenate(picked), None)


def find_layers(
    root: nn.Module,
    traces: Sequence[tuple[Trace, Any]],
    chosen: Callable[[str, nn.Module], bool] | None,
) -> tuple[dict[str, TorchLayer], list[Layer]]:
    """Return the layers that can be replaced, by name, and all layers that cost MACs, in the order they run.

    Args:
        root: the module that ran.
        traces: of two samples, with the outputs.
        chosen: decides by name and module whether a layer may be decoupled; None: all may.

    Raises:
        ModelError: there are no layers.
    """
    first, output = traces[0]
    returned = {id(tensor) for tensor in tensors(output)}
    modules = dict(root.named_modules())
    calls_of: dict[str, list[Call]] = {}
    for call in sorted(first.calls, key=lambda call: call.start):
        if isinstance(modules[call.name], LAYERS):
            calls_of.setdefault(call.name, []).append(call)
    others = {name: [c for c in traces[1][0].calls if c.name == name] for name in calls_of}
    # all held at once, so that ids differ: parametrized weights are computed at every access
    weights = {name: modules[name].weight for name in calls_of}
    uses_of_weight = Counter(map(id, weights.values()))
    replaceable: dict[str, TorchLayer] = {}
    layers = []
    for name, calls in calls_of.items():
        module, other = modules[name], others[name]
        convolution, weight, bias, reason = _read(module, [*calls, *other])
        rank = len(convolution.kernel)
        maps = [math.prod(call.x.shape[: -1 - rank]) for call in calls]
        if not rank and calls[0].x.ndim != 2:
            reason = reason or "it is applied to more than one row per sample"
        if uses_of_weight[id(weights[name])] > 1:
            reason = reason or "its weights are another layer's as well"
        if chosen is not None and not chosen(name, module):
            reason = "excluded by the filter"
        sizes = [_size(call, rank) for call in calls]
        macs = sum(
            m * (convolution.macs(size) if rank else convolution.n_o * convolution.n_i)
            for m, size in zip(maps, sizes, strict=True)
        )
        has_bias = getattr(module, "bias", None) is not None
        parameters = math.prod(convolution.geometry.weight_shape) + (convolution.n_o if has_bias else 0)
        if reason:
            layers.append(Layer(name, convolution.operator, macs, parameters, reason=reason))
            continue
        is_returned = any(id(call.y) in returned for call in calls)  # as it is, before any BatchNorm
        norm = "" if is_returned else _norm_behind(first, calls, modules)
        if norm:
            weight, bias = _folded(modules[norm], weight, bias, convolution)
        single_map = len(calls) == len(other) == 1 and maps_in(calls[0].x) == 1 == maps_in(other[0].x)
        single_map = single_map and _size(other[0], rank) == sizes[0]
        y = _output_of(norm, first) if norm else calls[0].y
        size = convolution.size(sizes[0])
        layers.append(
            Layer(
                name=name,
                operator=convolution.operator,
                macs=macs,
                parameters=parameters + (0 if has_bias or not norm else convolution.n_o),
                geometry=convolution.geometry,
                weight=convolution.kernel_of(to_numpy(weight).astype(np.float32)),
                bias=to_numpy(bias).astype(np.float32),
                size=size,
                maps=macs / convolution.geometry.macs(*size),
                is_linear=not convolution.kernel,
                upsamples=convolution.upsamples,
            )
        )
        replaceable[name] = TorchLayer(
            layer=layers[-1],
            convolution=convolution,
            weight=weight,
            bias=bias,
            norm=norm,
            input_shape=tuple(calls[0].x.shape),
            single_map=single_map,
            shortcut=_shortcut(y, calls[0], first) if single_map else None,
        )
    if not layers:
        raise ModelError("the module runs no convolutions; there is nothing to decouple")
    return replaceable, layers


def _read(module: Any, calls: Sequence[Call]) -> tuple[Convolution, torch.Tensor, torch.Tensor, str]:
    """Read what a layer computes, and check it by computing it: subclasses may do more."""
    convolution = Convolution.of(module)
    weight, bias = calls[0].weights or (module.weight, module.bias)
    if bias is None:
        bias = weight.new_zeros(convolution.n_o)
    reason = convolution.refusal or ("its weights are complex" if weight.is_complex() else "")
    rank = len(convolution.kernel)
    if not reason and any(call.convolved is None for call in calls):
        reason = "its forward is not one convolution"
    if not reason and not all(call.alone for call in calls):
        reason = "it is called with more than its input"
    if not reason and rank and any(call.x.ndim != rank + 2 for call in calls):
        reason = "its input has no batch dimension"
    if not reason:
        tries = [convolution, _same_padded(convolution, calls[0].x.shape[2:])]
        for candidate in filter(None, tries):
            module = plain(candidate, weight, bias)
            pairs = ((module(x.to(weight.dtype)), y) for x, y in (call.convolved for call in calls))
            if all(same(z.to(y.dtype), y, rounding(y)) for z, y in pairs):
                return candidate, weight, bias, ""
        reason = "its forward is more than one convolution, or not always the same"
    return convolution, weight, bias, reason


def _norm_behind(trace: Trace, calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> str:
    """The BatchNorm that is the only reader of a layer's output, in every call; empty if there is none."""
    names = set()
    for call in calls:
        uses = trace.uses(call.y)
        readers = [c for c in trace.calls if c.x is call.y and isinstance(modules[c.name], _BatchNorm)]
        if len(readers) != 1 or not uses:
            return ""
        if not all(readers[0].start < use.at < readers[0].end for use in uses):
            return ""
        names.add(readers[0].name)
    norm = names.pop() if len(names) == 1 else ""
    if not norm or modules[norm].running_mean is None:
        return ""
    return norm if sum(c.name == norm for c in trace.calls) == len(calls) else ""


def _shortcut(y: torch.Tensor, call: Call, trace: Trace) -> tuple[str, str] | None:
    """The source of the tensor that is added to a layer's output, if it exists before the layer runs."""
    uses = trace.uses(y)
    if len(uses) != 1 or uses[0].name not in ADDITIONS or len(uses[0].arguments) != 2:
        return None
    one, two = uses[0].arguments
    other = two if one is y else one
    if not isinstance(other, torch.Tensor) or other.shape != y.shape or other is y:
        return None
    counts = Counter(call.name for call in trace.calls)
    for source in (c for c in trace.calls if counts[c.name] == 1):
        if source.y is other and source.end < call.start:
            return source.name, "y"
        if source.x is other and source.start <= call.start:
            return source.name, "x"
    return None


def rounding(tensor: torch.Tensor) -> float:
    """The relative difference that rounding in several layers may make to a tensor of this type."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return 8 * torch.finfo(tensor.dtype).eps if half else ROUNDING


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = ROUNDING) -> bool:
    """Whether two tensors are equal but for rounding."""
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return bool((one == other).all())
    a, b = one.double(), other.double()
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    a, b = a[finite], b[finite]
    return bool((a - b).square().sum().sqrt() <= tolerance * b.square().sum().sqrt())


def maps_in(x: Any) -> int:
    """Count the maps in a module's input; 0 if it is not a tensor of maps."""
    return len(x) if isinstance(x, torch.Tensor) and x.ndim > 1 else 0


def _size(call: Call, rank: int) -> tuple[int, ...]:
    """The size of the map that a convolution was given."""
    return tuple(call.x.shape[call.x.ndim - rank :])


def _output_of(name: str, trace: Trace) -> Any:
    return next(call.y for call in trace.calls if call.name == name)


def plain(convolution: Convolution, weight: torch.Tensor, bias: torch.Tensor) -> nn.Sequential:
    """The layer as one of PyTorch's plain modules, after a padding if it needs one.

    Always in a chain, as its factorization will be: modules that read a layer's attributes then fail.
    """
    g = convolution.geometry
    *padding, module = convolution.modules(Structure.of(g, g))
    last: Any = module
    kernel = convolution.kernel_of(to_numpy(weight))
    values = torch.from_numpy(Convolution.of(last).weight_of(kernel))
    last.weight = nn.Parameter(values.to(weight).clone())
    last.bias = nn.Parameter(bias.detach().clone())
    return nn.Sequential(*padding, last).requires_grad_(False).eval()


def _same_padded(convolution: Convolution, size: Sequence[int]) -> Convolution | None:
    """The same with TensorFlow's padding for one input size: output = ceil(input / stride)."""
    if convolution.transposed or not convolution.kernel:
        return None
    before, after = [], []
    for n, k, s, d in zip(size, convolution.kernel, convolution.strides, convolution.dilations, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    return replace(convolution, before=tuple(before), after=tuple(after), mode="zeros")


def _folded(
    norm: Any, weight: torch.Tensor, bias: torch.Tensor, convolution: Convolution
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold a BatchNorm into the convolution before it."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = bias.double() * scale - norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if convolution.transposed:  # (n_i, n_o / groups, …): outputs are counted within groups
        by_group = scale.reshape(convolution.groups, 1, -1).expand(
            -1, convolution.n_i // convolution.groups, -1
        )
        factor = by_group.reshape(convolution.n_i, -1, *(1,) * (weight.ndim - 2))
    else:
        factor = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return (weight.double() * factor).to(weight.dtype), shift.to(weight.dtype)
