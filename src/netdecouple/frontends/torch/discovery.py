"""Find a module's layers, what each computes, and outputs to compare, in traces of its forward passes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
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
from netdecouple.frontends.torch.trace import ADDITIONS, Call, Product, Trace, tensors
from netdecouple.network import Array, Layer, Observation

ROUNDING = 1e-3  # relative difference up to which two computations count as the same


@dataclass(frozen=True, kw_only=True)
class TorchLayer:
    """A layer that can be replaced, as it ran."""

    layer: Layer
    convolution: Convolution
    kernel: torch.Tensor  # (n_o, n_i / groups, kh, kw), BatchNorm folded in
    bias: torch.Tensor
    norm: str  # the BatchNorm that is folded in; empty if there is none
    input_shape: tuple[int, ...]  # of its first call for one sample
    single_map: bool  # it makes exactly one map, of the same size for every sample
    shortcut: tuple[str, str] | None  # the module whose input "x" or output "y" is added to its output

    def observation(
        self,
        batch: slice,
        x: torch.Tensor,
        y: torch.Tensor | None,
        positions: NDArray[np.int64],
        shortcut: torch.Tensor | None,
    ) -> Observation:
        """Gather inputs, and what exists of outputs and shortcut, at (n, p) positions of the single map."""
        outputs = np.zeros((0, 0), np.float32) if y is None else pick(self._maps(y), positions)
        added = None if shortcut is None else pick(self._maps(shortcut), positions)
        patches = partial(self.convolution.patches, self._maps(x), positions)
        return Observation(self.layer.name, batch, patches, outputs, added)

    def _maps(self, values: torch.Tensor) -> Array:
        return self.convolution.maps(to_numpy(values))

    def spread_observation(
        self, batch: slice, calls: Sequence[tuple[torch.Tensor, torch.Tensor]], positions: NDArray[np.int64]
    ) -> Observation:
        """The same of all maps in several calls: positions in a map of nominal size, spread over all maps."""
        pairs = ((self._maps(x), self._maps(y)) for x, y in calls)
        maps = [(x[i : i + 1], y[i : i + 1]) for x, y in pairs for i in range(len(x))]
        pixels = [math.prod(y.shape[2:]) for _, y in maps]
        ends = np.cumsum(pixels)
        spread = positions.reshape(-1) * ends[-1] // math.prod(self.layer.output_size)
        of_map = np.searchsorted(ends, spread, side="right")
        patches, outputs = [], []
        for index in np.unique(of_map):
            x, y = maps[index]
            chosen = (spread[of_map == index] - ends[index] + pixels[index])[None]
            patches.append(self.convolution.patches(x, chosen))
            outputs.append(pick(y, chosen))
        gathered: Array = np.concatenate(patches)
        return Observation(self.layer.name, batch, lambda: gathered, np.concatenate(outputs), None)


def find_layers(
    root: nn.Module,
    traces: Sequence[tuple[Trace, Any]],
    chosen: Callable[[str, nn.Module], bool] | None,
) -> tuple[dict[str, TorchLayer], list[Layer]]:
    """Return the layers that can be replaced, by name, and all layers that cost MACs, in the order they run.

    ``traces`` are of two samples, with the outputs; ``chosen`` is `TorchNetwork`'s.

    Raises:
        ModelError: there are no layers.
    """
    (first, output), (second, _) = traces
    returned = {id(tensor) for tensor in tensors(output)}
    modules = dict(root.named_modules())
    calls_of: dict[str, list[Call]] = {}
    for call in sorted(first.calls, key=lambda call: call.start):
        if isinstance(modules[call.name], LAYERS):
            calls_of.setdefault(call.name, []).append(call)
    # all held at once, so that ids differ: parametrized weights are computed at every access
    weights = {name: modules[name].weight for name in calls_of}
    uses_of_weight = Counter(map(id, weights.values()))
    replaceable: dict[str, TorchLayer] = {}
    started = _other_layers(root, first, calls_of)
    for name, calls in calls_of.items():
        module, others = modules[name], [call for call in second.calls if call.name == name]
        convolution, kernel, bias, reason = _read(module, [*calls, *others])
        if uses_of_weight[id(weights[name])] > 1:
            reason = reason or "its weights are another layer's as well"
        if chosen is not None and not chosen(name, module):
            reason = "excluded by the filter"
        rank, geometry = len(convolution.kernel), convolution.geometry
        sizes = [_size(call, rank) for call in calls]
        macs = sum(
            _maps_of(call, rank) * convolution.macs(size) for call, size in zip(calls, sizes, strict=True)
        )
        has_bias = getattr(module, "bias", None) is not None
        if reason:  # its forward may do more
            macs = max(macs, sum(product.macs for product in first.products if product.module == name))
        parameters = math.prod(geometry.weight_shape) + has_bias * convolution.n_o
        layer = Layer(name, convolution.operator, macs, parameters, reason=reason)
        if not reason:
            is_returned = any(id(call.y) in returned for call in calls)  # as it is, before any BatchNorm
            norm = "" if is_returned else _norm_behind(first, calls, modules)
            y = calls[0].y
            if norm:
                kernel, bias = _folded(modules[norm], kernel, bias)
                y = next(call.y for call in first.calls if call.name == norm)
            single_map = len(calls) == len(others) == 1 == maps_in(calls[0].x) == maps_in(others[0].x)
            single_map = single_map and _size(others[0], rank) == sizes[0]
            size = convolution.size(sizes[0])
            layer = replace(
                layer,
                parameters=parameters + (bool(norm) and not has_bias) * convolution.n_o,
                geometry=geometry,
                weight=to_numpy(kernel).astype(np.float32),
                bias=to_numpy(bias).astype(np.float32),
                size=size,
                maps=macs / geometry.macs(*size),
                is_linear=not rank,
                upsamples=convolution.upsamples,
            )
            replaceable[name] = TorchLayer(
                layer=layer,
                convolution=convolution,
                kernel=kernel,
                bias=bias,
                norm=norm,
                input_shape=tuple(calls[0].x.shape),
                single_map=single_map,
                shortcut=_shortcut(y, calls[0], first) if single_map else None,
            )
        started.append((calls[0].start, layer))
    layers = [layer for _, layer in sorted(started, key=itemgetter(0))]
    if not layers:
        raise ModelError("the module runs no convolutions; there is nothing to decouple")
    return replaceable, layers


def _other_layers(root: nn.Module, trace: Trace, known: Container[str]) -> list[tuple[int, Layer]]:
    """List what multiplies outside the modules that are known, and when it first ran.

    A module without parts is one layer, as recurrent ones are. Functions in others are named after the
    parameter that they read, or after the module and the function.
    """
    modules, parameters = dict(root.named_modules()), dict(root.named_parameters())
    found: dict[str, list[Product]] = {}
    for product in trace.products:
        matrices = [name for name in product.parameters if parameters[name].ndim > 1]
        name = f"{product.module or type(root).__name__}:{product.function}"
        if product.module and next(modules[product.module].children(), None) is None:
            name = product.module
        elif len(matrices) == 1:
            (name,) = matrices
        if product.module not in known:
            found.setdefault(name, []).append(product)
    layers = []
    for name, products in found.items():
        module, function = modules.get(name), products[0].function
        read = frozenset[str]().union(*(product.parameters for product in products))
        reason = "a product of two computed tensors"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            reason = "recurrent layer"
        elif read:
            reason = f"computed by the function {function}; use a module, like nn.Conv2d or nn.Linear"
        operator = function if module is None else type(module).__name__
        own = (parameter for parameter in read if parameter.rpartition(".")[0] not in known)
        size = sum(parameters[parameter].numel() for parameter in own)
        macs = sum(product.macs for product in products)
        layers.append((products[0].at, Layer(name, operator, macs, size, reason=reason)))
    return layers


def choose_outputs(trace: Trace, noisy: Trace, layers: Iterable[str]) -> Counter[str]:
    """Choose the modules whose outputs are compared, and count the calls of each.

    That is the whole module if its output's shape does not depend on the input's values (``noisy`` is a trace
    of others), else the largest parts of which this is true and in which there are ``layers``: detectors end
    in sorting and suppressing boxes, which would hide what decoupling changes.
    """
    kinds, kinds_of_noisy = _output_kinds(trace), _output_kinds(noisy)
    calls = Counter(call.name for call in trace.calls)
    chosen: Counter[str] = Counter()
    for name, outputs in kinds.items():
        is_inside = "" in chosen or any(name.startswith(f"{other}.") for other in chosen)
        prefix = f"{name}." if name else ""
        has_layers = any(f"{layer}.".startswith(prefix) for layer in layers)
        is_static = bool(outputs) and outputs == kinds_of_noisy.get(name)
        if has_layers and is_static and all(real for _, real in outputs) and not is_inside:
            chosen[name] = calls[name]
    return chosen


def _output_kinds(trace: Trace) -> dict[str, list[tuple[torch.Size, bool]]]:
    """By module, from the outside in: the shapes of its output's tensors, and whether they are floating."""
    calls = sorted(trace.calls, key=lambda call: call.start)
    return {call.name: [(t.shape, t.is_floating_point()) for t in tensors(call.y)] for call in calls}


def _read(module: Any, calls: Sequence[Call]) -> tuple[Convolution, torch.Tensor, torch.Tensor, str]:
    """Read what a layer computes, and check it by computing it: subclasses may do more.

    Returns the convolution, its kernel and bias, and why it cannot be replaced; empty if it can.
    """
    convolution = Convolution.of(module)
    weight, bias = calls[0].weights or (module.weight, module.bias)
    if bias is None:
        bias = weight.new_zeros(convolution.n_o)
    rank = len(convolution.kernel)
    checks = {
        "its weights are complex": weight.is_complex(),
        "its forward is not one convolution": any(call.convolved is None for call in calls),
        "it is called with more than its input": not all(call.alone for call in calls),
        "its input has no batch dimension": any(
            call.x.ndim < 2 or (rank and call.x.ndim != rank + 2) for call in calls
        ),
    }
    reason = convolution.refusal or next((text for text, applies in checks.items() if applies), "")
    if reason:
        return convolution, weight, bias, reason
    kernel = torch.from_numpy(convolution.kernel_of(to_numpy(weight))).to(weight)
    for candidate in filter(None, (convolution, _same_padded(convolution, calls[0].x.shape[2:]))):
        chain = plain(candidate, kernel, bias)
        pairs = ((chain(x.to(weight.dtype)), y) for x, y in (call.convolved for call in calls))
        if all(same(z.to(y.dtype), y, rounding(y)) for z, y in pairs):
            return candidate, kernel, bias, ""
    return convolution, kernel, bias, "its forward is more than one convolution, or not always the same"


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
    norm = names.pop()
    if names or modules[norm].running_mean is None:
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


def same(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
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
    return bool((a - b).norm() <= tolerance * b.norm())


def maps_in(x: Any) -> int:
    """Count the maps in a module's input; 0 if it is not a tensor of maps."""
    return len(x) if isinstance(x, torch.Tensor) and x.ndim > 1 else 0


def _size(call: Call, rank: int) -> tuple[int, ...]:
    """The size of the map that a convolution was given; of the rows that a linear layer was."""
    shape = call.x.shape
    return tuple(shape[-rank:]) if rank else (math.prod(shape[1:-1]),)


def _maps_of(call: Call, rank: int) -> int:
    """Count the maps that a layer was given; without a batch it is one."""
    return len(call.x) if call.x.ndim > rank + 1 else 1


@torch.no_grad()
def plain(convolution: Convolution, kernel: torch.Tensor, bias: torch.Tensor) -> nn.Sequential:
    """The layer as one of PyTorch's plain modules, after a padding if it needs one.

    Always in a chain, as its factorization will be: modules that read a layer's attributes then fail.
    """
    g = convolution.geometry
    chain = nn.Sequential(*convolution.modules(Structure.of(g, g))).to(kernel)
    layer: Any = chain[-1]
    layer.weight.copy_(torch.from_numpy(Convolution.of(layer).weight_of(to_numpy(kernel))))
    layer.bias.copy_(bias)
    return chain.requires_grad_(False).eval()


def _same_padded(convolution: Convolution, size: Sequence[int]) -> Convolution | None:
    """The same with TensorFlow's padding for one input size: output = ceil(input / stride)."""
    if convolution.transposed or not convolution.kernel:
        return None
    axes = zip(size, convolution.kernel, convolution.strides, convolution.dilations, strict=True)
    totals = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in axes]
    before, after = tuple(total // 2 for total in totals), tuple(-(-total // 2) for total in totals)
    return replace(convolution, before=before, after=after, mode="zeros")


def _folded(norm: Any, kernel: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold a BatchNorm into the convolution before it."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = bias.double() * scale - norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return (kernel.double() * scale[:, None, None, None]).to(kernel.dtype), shift.to(kernel.dtype)
