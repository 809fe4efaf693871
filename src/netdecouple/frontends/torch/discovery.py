"""Finding layers in what a module did when it ran, and what each of them computes."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netdecouple.errors import ModelError
from netdecouple.frontends.torch.convolutions import LAYERS, PLAIN, TRANSPOSED, Convolution, Padding
from netdecouple.frontends.torch.samples import to_numpy
from netdecouple.frontends.torch.trace import ADDITIONS, Call, Trace, tensors
from netdecouple.network import Layer

EXACT = 1e-3  # relative difference up to which two ways to compute the same are taken for equal


@dataclass(frozen=True)
class Found:
    """A layer as running it showed it to be."""

    convolution: Convolution
    weight: torch.Tensor  # that it computes with, BatchNorm folded in
    bias: torch.Tensor
    norm: str  # the BatchNorm behind it, which is folded; empty if there is none
    steady: bool  # it makes exactly one map of the same size for every sample
    shortcut: tuple[str, str] | None  # the module whose "x" or "y" is added to its output


def find(
    root: nn.Module,
    traces: Sequence[tuple[Trace, Any]],
    chosen: Callable[[str, nn.Module], bool] | None,
) -> tuple[dict[str, Found], list[Layer]]:
    """List every layer that costs MACs, in the order they run, and what is known of those that may change.

    Args:
        root: what was run.
        traces: of two samples, and the outputs.
        chosen: tells by name and module whether a layer may be decoupled; None: all may.

    Raises:
        ModelError: there is none.
    """
    first, output = traces[0]
    outside = {id(tensor) for tensor in tensors(output)}
    modules = dict(root.named_modules())
    calls: dict[str, list[Call]] = {}
    for call in sorted(first.calls, key=lambda call: call.start):
        if isinstance(modules[call.name], LAYERS):
            calls.setdefault(call.name, []).append(call)
    other = {name: [c for c in traces[1][0].calls if c.name == name] for name in calls}
    # held, so that none takes the place of another: parametrized ones are made whenever they are asked for
    weights = {name: modules[name].weight for name in calls}
    tied = Counter(map(id, weights.values()))
    found: dict[str, Found] = {}
    layers = []
    for name, own in calls.items():
        module = modules[name]
        rank = len(Convolution.of(module).kernel)
        sizes = [_size(call, rank) for call in own]
        steady = len(own) == len(other[name]) == 1 and maps_in(own[0].x) == 1 == maps_in(other[name][0].x)
        steady &= [_size(call, rank) for call in other[name]] == sizes
        convolution, weight, bias, reason = _read(module, [*own, *other[name]])
        maps = [math.prod(call.x.shape[: -1 - len(convolution.kernel)]) for call in own]
        if not convolution.kernel and own[0].x.ndim != 2:
            reason = reason or "it is applied to more than one row per sample"
            maps = [math.prod(call.x.shape[:-1]) for call in own]
        if tied[id(weights[name])] > 1:
            reason = reason or "its weights are another layer's as well"
        if chosen is not None and not chosen(name, module):
            reason = "excluded by the filter"
        macs = sum(
            m * (convolution.macs(size) if convolution.kernel else convolution.n_o * convolution.n_i)
            for m, size in zip(maps, sizes, strict=True)
        )
        has_bias = getattr(module, "bias", None) is not None
        parameters = math.prod(convolution.geometry.weight_shape) + (convolution.n_o if has_bias else 0)
        if reason:
            layers.append(Layer(name, convolution.operator, macs, parameters, reason=reason))
            continue
        is_seen = any(id(call.y) in outside for call in own)  # as it is, before any BatchNorm
        norm = "" if is_seen else _norm_behind(first, own, modules)
        if norm:
            weight, bias = _folded(modules[norm], weight, bias, convolution)
        ends = [_output_of(norm, first) if norm else own[0].y]
        shortcut = _shortcut(ends[0], own[0], first) if steady else None
        size = convolution.size(sizes[0])
        priced = convolution.geometry.macs(*size)
        layers.append(
            Layer(
                name,
                convolution.operator,
                macs,
                parameters + (0 if has_bias or not norm else convolution.n_o),
                convolution.geometry,
                convolution.kernel_of(to_numpy(weight).astype(np.float32)),
                to_numpy(bias).astype(np.float32),
                size,
                maps=macs / priced,
                is_linear=not convolution.kernel,
                upsamples=convolution.upsamples,
            )
        )
        found[name] = Found(convolution, weight, bias, norm, steady, shortcut)
    if not layers:
        raise ModelError("the module runs no convolutions; there is nothing to decouple")
    return found, layers


def _read(module: Any, calls: Sequence[Call]) -> tuple[Convolution, torch.Tensor, torch.Tensor, str]:
    """Find out what a layer computes, and check it by computing it: subclasses may do more."""
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
        for tried in filter(None, tries):
            own = plain(tried, weight, bias)
            made = ((own(x.to(weight.dtype)), y) for x, y in (call.convolved for call in calls))
            if all(same(z.to(y.dtype), y, exactness(y)) for z, y in made):
                return tried, weight, bias, ""
        reason = "its forward is more than one convolution, or not always the same"
    return convolution, weight, bias, reason


def _norm_behind(trace: Trace, calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> str:
    """The BatchNorm that alone reads what a layer makes, every time it makes something."""
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
    """Where what is added to a layer's output comes from, if that is there before the layer runs."""
    uses = trace.uses(y)
    if len(uses) != 1 or uses[0].name not in ADDITIONS or len(uses[0].arguments) != 2:
        return None
    one, two = uses[0].arguments
    other = two if one is y else one
    if not isinstance(other, torch.Tensor) or other.shape != y.shape or other is y:
        return None
    counts: dict[str, int] = {}
    for made in trace.calls:
        counts[made.name] = counts.get(made.name, 0) + 1
    for made in trace.calls:
        if counts[made.name] == 1 and made.y is other and made.end < call.start:
            return made.name, "y"
        if counts[made.name] == 1 and made.x is other and made.start <= call.start:
            return made.name, "x"
    return None


def exactness(tensor: torch.Tensor) -> float:
    """The relative difference that rounding may make to such a tensor, layer after layer."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return 8 * torch.finfo(tensor.dtype).eps if half else EXACT


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float = EXACT) -> bool:
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
    """How many maps a module was given; 0 if that cannot be said."""
    return len(x) if isinstance(x, torch.Tensor) and x.ndim > 1 else 0


def _size(call: Call, rank: int) -> tuple[int, ...]:
    """The size of the map that a convolution was given."""
    return tuple(call.x.shape[call.x.ndim - rank :])


def _output_of(name: str, trace: Trace) -> Any:
    return next(call.y for call in trace.calls if call.name == name)


def plain(convolution: Convolution, weight: torch.Tensor, bias: torch.Tensor) -> nn.Sequential:
    """The layer as a plain module of PyTorch's own, behind a padding if it needs one.

    Always a chain, as what it may become: whoever reads a layer's attributes is found out by that.
    """
    c, rank = convolution, len(convolution.kernel)
    if not rank:
        module: Any = nn.Linear(c.n_i, c.n_o)
        padding = None
    else:
        options: dict[str, Any] = {"stride": c.strides, "dilation": c.dilations, "groups": c.groups}
        reach = [d * (k - 1) for d, k in zip(c.dilations, c.kernel, strict=True)]
        padding = None
        if c.transposed:
            options["padding"] = tuple(r - b for r, b in zip(reach, c.before, strict=True))
            options["output_padding"] = tuple(a - b for a, b in zip(c.after, c.before, strict=True))
        elif c.mode == "zeros" and c.before == c.after:
            options["padding"] = c.before
        else:
            padding = Padding(c.before, c.after, c.mode)
        module = (TRANSPOSED if c.transposed else PLAIN)[rank](c.n_i, c.n_o, c.kernel, **options)
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return nn.Sequential(*filter(None, [padding, module])).eval()


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
