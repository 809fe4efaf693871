"""A PyTorch module at work: run it, watch its layers, walk it while it is being decoupled.

All work is done on copies; the module given is only read.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import hashlib
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as tree

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError
from netdecouple.frontends import Array, Layer, Observation, Positions
from netdecouple.frontends.torch.convolutions import (
    LAYERS,
    PLAIN,
    TRANSPOSED,
    Convolution,
    Factorized,
    Padding,
)
from netdecouple.frontends.torch.samples import Arguments, Samples, to_numpy
from netdecouple.frontends.torch.surgery import duplicate, failures, first_line, install
from netdecouple.frontends.torch.trace import ADDITIONS, Call, Trace, hooked, tensors

BATCH_BYTES = 256 << 20  # of activations held at once
VALUES = 4096  # of a sample's outputs looked at, where they differ in size from sample to sample
EXACT = 1e-3  # relative difference up to which two ways to compute the same are taken for equal
BOUND = "the module does more with it than call it"  # why a layer is kept


@dataclass(frozen=True)
class Found:
    """A layer as running it showed it to be."""

    convolution: Convolution
    weight: torch.Tensor  # that it computes with, BatchNorm folded in
    bias: torch.Tensor
    norm: str  # the BatchNorm behind it, which is folded; empty if there is none
    steady: bool  # it makes exactly one map of the same size for every sample
    shortcut: tuple[str, str] | None  # the module whose "x" or "y" is added to its output


class TorchNetwork:
    """A pretrained module, opened: copied, put in evaluation mode, and run on two samples.

    Args:
        module: is not changed.
        samples: at least two.
        device: where to run.
        chosen: tells by name and module whether a layer may be decoupled; None: all may.

    Raises:
        ModelError: it cannot be copied or run, or there is nothing to decouple.
    """

    def __init__(
        self,
        module: nn.Module,
        samples: Samples,
        device: str = "cpu",
        chosen: Callable[[str, nn.Module], bool] | None = None,
    ) -> None:
        compiled = any("_orig_mod" in part._modules for part in module.modules())
        if compiled or isinstance(module, torch.jit.ScriptModule):
            kind = "compiled" if compiled else "scripted"
            raise ModelError(f"a {kind} module cannot be changed; give the module it was made from")
        if any(nn.parameter.is_lazy(value) for value in (*module.parameters(), *module.buffers())):
            raise ModelError("the module has weights that are made when it first runs; run it once before")
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise ModelError(f"device={device!r}: {first_line(error)}") from error
        self.original = module
        self.dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self.module = self.evaluated(module)
        self._walks: weakref.WeakSet[Any] = weakref.WeakSet()
        with torch.no_grad():
            traces = [self._traced(samples[i : i + 1]) for i in (0, 1)]
            made = (tensor for call in traces[0][0].calls for tensor in tensors(call.y))
            self.exact = max(map(exactness, made), default=EXACT)
            self.batchable = samples.alike and self._batched(samples[:2], traces)
            self.found, layers = self._find(traces, chosen)
            self.layers = tuple(layers)
            self.watched = self._watch(samples[:1])
            self.module, bound = self._fold(samples[:2])
        for name in bound:
            del self.found[name]
        self.layers = tuple(
            replace(la, geometry=None, reason=BOUND) if la.name in bound else la for la in layers
        )

    def _traced(self, sample: Samples) -> tuple[Trace, Any]:
        args, kwargs = self.placed(sample)
        with failures():
            return Trace.of(self.module, args, kwargs)

    def forward(self, module: nn.Module, samples: Samples) -> Any:
        """Run this module, or one made of it, on some samples at once.

        Raises:
            ModelError: it fails.
        """
        args, kwargs = self.placed(samples)
        with failures():
            return module(*args, **kwargs)

    def placed(self, samples: Samples) -> Arguments:
        """The arguments of a forward pass, where and of the type the module wants them."""

        def place(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.to(self.device, self.dtype if value.is_floating_point() else None)

        return tree.tree_map(place, samples.arguments)

    def _batched(self, samples: Samples, single: Sequence[tuple[Trace, Any]]) -> bool:
        """Whether running two samples at once is what running them one by one is."""
        try:
            trace, output = Trace.of(self.module, *self.placed(samples))
        except Exception:  # whatever it is, one by one they have run
            return False
        parts = zip(*(list(tensors(out)) for out in (output, single[0][1], single[1][1])), strict=False)
        for both, *each in parts:
            if each[0].ndim == 0 or each[0].shape[1:] != each[1].shape[1:]:
                return False
            if not same(both, torch.cat(each), self.exact):
                return False
        calls = [[(c.name, _maps(c)) for c in t.calls] for t in (trace, single[0][0])]
        return calls[0] == [(name, maps and 2 * maps) for name, maps in calls[1]]

    def _find(
        self,
        traces: Sequence[tuple[Trace, Any]],
        chosen: Callable[[str, nn.Module], bool] | None,
    ) -> tuple[dict[str, Found], list[Layer]]:
        """List every layer that costs MACs, in the order they run."""
        first, output = traces[0]
        outside = {id(tensor) for tensor in tensors(output)}
        modules = dict(self.module.named_modules())
        calls: dict[str, list[Call]] = {}
        for call in sorted(first.calls, key=lambda call: call.start):
            if isinstance(modules[call.name], LAYERS):
                calls.setdefault(call.name, []).append(call)
        other = {name: [c for c in traces[1][0].calls if c.name == name] for name in calls}
        found: dict[str, Found] = {}
        layers = []
        for name, own in calls.items():
            module = modules[name]
            rank = len(Convolution.of(module).kernel)
            sizes = [_size(call, rank) for call in own]
            steady = len(own) == len(other[name]) == 1 and _maps(own[0]) == 1 == _maps(other[name][0])
            steady &= [_size(call, rank) for call in other[name]] == sizes
            convolution, weight, bias, reason = self._read(module, [*own, *other[name]])
            maps = [math.prod(call.x.shape[: -1 - len(convolution.kernel)]) for call in own]
            if not convolution.kernel and own[0].x.ndim != 2:
                reason = reason or "it is applied to more than one row per sample"
                maps = [math.prod(call.x.shape[:-1]) for call in own]
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
            norm = "" if is_seen else self._norm_behind(first, own, modules)
            if norm:
                weight, bias = _folded(modules[norm], weight, bias, convolution)
            ends = [_output_of(norm, first) if norm else own[0].y]
            shortcut = self._shortcut(ends[0], own[0], first) if steady else None
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
                    methods=convolution.methods,
                )
            )
            found[name] = Found(convolution, weight, bias, norm, steady, shortcut)
        if not layers:
            raise ModelError("the module runs no convolutions; there is nothing to decouple")
        return found, layers

    def _read(
        self, module: Any, calls: Sequence[Call]
    ) -> tuple[Convolution, torch.Tensor, torch.Tensor, str]:
        """Find out what a layer computes, and check it by computing it: subclasses may do more."""
        convolution = Convolution.of(module)
        weight, bias = calls[0].weights or (module.weight, module.bias)
        if bias is None:
            bias = weight.new_zeros(convolution.n_o)
        reason = convolution.refusal
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
                plain = _plain(tried, weight, bias)
                made = ((plain(x.to(weight.dtype)), y) for x, y in (call.convolved for call in calls))
                if all(same(own.to(y.dtype), y, exactness(y)) for own, y in made):
                    return tried, weight, bias, ""
            reason = "its forward is more than one convolution, or not always the same"
        return convolution, weight, bias, reason

    def _norm_behind(self, trace: Trace, calls: Sequence[Call], modules: Mapping[str, nn.Module]) -> str:
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

    def _shortcut(self, y: torch.Tensor, call: Call, trace: Trace) -> tuple[str, str] | None:
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

    def _fold(self, few: Samples) -> tuple[nn.Module, set[str]]:
        """Put plain convolutions, BatchNorm folded in, in the place of the layers that may change.

        The module must compute what it did. Where it does not, each layer is tried by itself, and those that
        cannot be replaced are named: the module may read their attributes, or hooks may hang on them.

        Raises:
            ModelError: no layer can be replaced.
        """
        expected = self.run_module(self.module, few)

        def folded(names: Iterable[str]) -> nn.Module:
            module = self.evaluated(self.original)
            for name in names:
                found = self.found[name]
                plain = _plain(found.convolution, found.weight, found.bias)
                module = install(module, name, plain, found.norm)
            for one, other in zip(expected, self.run_module(module, few), strict=True):
                if not same(torch.from_numpy(other), torch.from_numpy(one), self.exact):
                    raise ModelError(
                        "the module computes something else with plain convolutions in the place of its "
                        "layers; its outputs must not depend on anything but its inputs and weights"
                    )
            return module

        def fails(name: str) -> bool:
            try:
                folded([name])
            except ModelError:
                return True
            return False

        try:
            return folded(self.found), set()
        except ModelError:
            failing = set(filter(fails, self.found))
            if len(failing) == len(self.found):
                raise
        return folded([name for name in self.found if name not in failing]), failing

    def _watch(self, sample: Samples) -> tuple[str, ...]:
        """The modules whose outputs tell what decoupling does: the whole, else the largest that can.

        Detectors end in sorting and suppressing boxes; how these change says little about the layers.
        """
        noisy = Samples(tree.tree_map(_disturbed, list(sample.units)))
        outputs = [Trace.of(self.module, *self.placed(s))[0].calls for s in (sample, noisy)]
        by_name = [{c.name: c for c in sorted(calls, key=lambda c: c.start)} for calls in outputs]

        def is_static(name: str) -> bool:
            found = [list(tensors(calls[name].y)) if name in calls else [] for calls in by_name]
            shapes = [[t.shape for t in own] for own in found]
            return bool(found[0]) and shapes[0] == shapes[1] and all(t.is_floating_point() for t in found[0])

        watched: list[str] = []
        for name in by_name[0]:  # from the outside in
            inside = any(name.startswith(f"{w}.") for w in watched) or "" in watched
            holds = any(f"{layer}.".startswith(f"{name}." if name else "") for layer in self.found)
            if not inside and holds and is_static(name):
                watched.append(name)
        return tuple(watched)

    @property
    def fingerprint(self) -> str:
        """Hash of the module's structure and numbers."""
        shown = re.sub(r" at 0x[0-9a-f]+", "", repr(self.original))  # places in memory
        digest = hashlib.sha256(shown.encode())
        for name, tensor in sorted(self.original.state_dict().items()):
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(to_numpy(tensor).tobytes())
        return digest.hexdigest()

    @cached_property
    def layer(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def batches(self, count: int, bytes_per_sample: int = 0) -> list[slice]:
        """Cut ``count`` samples into batches whose activations fit in memory."""
        largest = max(
            (4 * la.geometry.n_i * math.prod(la.size) for la in self.layers if la.geometry), default=1
        )
        step = (
            int(np.clip(BATCH_BYTES // max(bytes_per_sample, 4 * largest), 1, 128)) if self.batchable else 1
        )
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]

    def run(self, images: Samples, kernels: Mapping[str, tuple[Array, Array]] | None = None) -> list[Array]:
        """Return the watched outputs on some samples, with some layers' weight and bias replaced."""
        held = {}
        for name, (kernel, bias) in (kernels or {}).items():
            module: Any = self._convolution(name)
            held[name] = (module.weight.data, module.bias.data)
            weight = torch.from_numpy(self.found[name].convolution.weight_of(np.asarray(kernel, np.float32)))
            module.weight.data = weight.to(module.weight)
            module.bias.data = torch.from_numpy(np.asarray(bias, np.float32)).to(module.bias)
        try:
            return self.run_module(self.module, images)
        finally:
            for name, (own_weight, own_bias) in held.items():
                module = self._convolution(name)
                module.weight.data, module.bias.data = own_weight, own_bias

    def _convolution(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)[-1]

    def run_module(self, module: nn.Module, images: Samples) -> list[Array]:
        """Return the watched outputs of another module with this one's names."""
        parts: list[list[Array]] = []
        seen: dict[str, Any] = {}

        def keep(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            seen[name] = output

        with torch.no_grad(), hooked(module, after=keep, names=set(self.watched).__contains__):
            for batch in self.batches(len(images)):
                self.forward(module, images[batch])
                parts.append([to_numpy(t).astype(np.float32) for n in self.watched for t in tensors(seen[n])])
                seen.clear()
        return [_joined(list(own)) for own in zip(*parts, strict=True)]

    def evaluated(self, module: nn.Module) -> nn.Module:
        """Copy a module that was made of this one, ready to be run as it is."""
        copied = duplicate(module)
        try:
            return copied.eval().requires_grad_(False).to(self.device)
        except Exception as error:
            raise ModelError(f"the module cannot be put on {self.device}: {first_line(error)}") from error

    def observe(self, images: Samples, positions: Positions) -> Iterator[Observation]:
        """Yield, batch by batch, what the layers named in ``positions`` see and produce."""
        if not positions:
            return
        held = sum(
            4 * (la.geometry.n_i * math.prod(la.size) + 2 * la.geometry.n_o * math.prod(la.output_size))
            for la in self.layers
            if la.geometry and la.name in positions
        )
        shortcuts = Shortcuts(self, positions)
        calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        added: dict[str, torch.Tensor] = {}

        def after(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            if name in positions:  # copied: what comes later may change it in place
                calls.setdefault(name, []).append((arguments[0].clone(), output.clone()))
                if (shortcut := shortcuts.of(name)) is not None:
                    added[name] = shortcut.clone()
            shortcuts.after(name, arguments, output)

        names = set(positions) | shortcuts.names
        for batch in self.batches(len(images), held):
            with torch.no_grad(), hooked(self.module, shortcuts.before, after, names.__contains__):
                self.forward(self.module, images[batch])
            for name, where in positions.items():
                if name in calls:
                    yield self.observation(name, batch, calls.pop(name), where[batch], added.pop(name, None))

    def observation(
        self,
        name: str,
        batch: slice,
        calls: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        where: NDArray[np.int64],
        shortcut: torch.Tensor | None,
    ) -> Observation:
        """Gather what a layer saw, and made if that is known, at some of its output positions.

        ``where`` (n, p) are positions in a map of the layer's nominal size. A layer that is called several
        times, or makes several maps, has them spread over all its maps alike.
        """
        found = self.found[name]
        convolution = found.convolution
        nominal = math.prod(self.layer[name].output_size)
        xs = [to_numpy(x) for x, _ in calls]
        ys = [None if y is None else to_numpy(y) for _, y in calls]
        if not found.steady:
            n_maps = [len(x) for x in xs]
            pixels = [math.prod(convolution.output_size(x.shape[2:])) for x in xs]
            bounds = np.cumsum([0, *(m * p for m, p in zip(n_maps, pixels, strict=True))])
            spread = where.reshape(-1) * bounds[-1] // nominal
            patches, outputs = [], []
            for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
                own = spread[(bounds[i] <= spread) & (spread < bounds[i + 1])] - bounds[i]
                maps, at = np.divmod(own, pixels[i])
                for index in np.unique(maps):
                    here = at[maps == index][None]
                    patches.append(convolution.patches(x[index : index + 1], here))
                    outputs.append(pick(y[index : index + 1], here) if y is not None else np.zeros((0, 0)))
            seen, made = np.concatenate(patches), np.concatenate(outputs)
        else:
            seen = None
            made = np.zeros((0, 0), np.float32) if ys[0] is None else pick(ys[0], where)

        def look() -> Array:
            return convolution.patches(xs[0], where) if seen is None else seen

        other = None if shortcut is None else pick(to_numpy(shortcut), where)
        return Observation(name, batch, look, made, other)

    def walk(self, images: Samples) -> Any:
        """Start at the network's input, ready to be decoupled layer by layer."""
        from netdecouple.frontends.torch.walk import TorchWalk

        walk = TorchWalk(self, images)
        self._walks.add(walk)
        return walk

    def close(self) -> None:
        """End the walks that are under way; their passes hold threads and memory."""
        for walk in list(self._walks):
            walk.close()

    def decoupled(self, factorizations: Mapping[str, Factorization]) -> nn.Module:
        """Copy the module as it was given, with some layers as chains of stages.

        BatchNorm behind a changed layer is part of its numbers, and an Identity now. Modes, types, devices
        and whether gradients are wanted stay as they were.
        """
        module = duplicate(self.original)
        for name, factorization in factorizations.items():
            found = self.found[name]
            new = Factorized.of(found.convolution, factorization)
            module = install(module, name, new, found.norm)
        return module


class Shortcuts:
    """The tensors added to residual branches, remembered as the modules run that they belong to."""

    def __init__(self, network: TorchNetwork, layers: Any) -> None:
        self._sources = {
            name: source for name in layers if (source := network.found[name].shortcut) is not None
        }
        self._wanted = set(self._sources.values())
        self.names = {name for name, _ in self._wanted}
        self._values: dict[tuple[str, str], torch.Tensor] = {}

    def of(self, layer: str) -> torch.Tensor | None:
        """What is going to be added to a layer's output, if anything is."""
        source = self._sources.get(layer)
        return None if source is None else self._values[source]

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Remember what a module is given; a hook."""
        if (name, "x") in self._wanted:
            self._values[name, "x"] = arguments[0]

    def after(self, name: str, arguments: tuple[Any, ...], output: Any) -> None:
        """Remember what a module makes; a hook."""
        if (name, "y") in self._wanted:
            self._values[name, "y"] = output


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


def _maps(call: Call) -> int:
    """How many maps a call was about; 0 if that cannot be said."""
    return len(call.x) if isinstance(call.x, torch.Tensor) and call.x.ndim > 1 else 0


def _size(call: Call, rank: int) -> tuple[int, ...]:
    """The size of the map that a convolution was given."""
    return tuple(call.x.shape[call.x.ndim - rank :])


def _output_of(name: str, trace: Trace) -> Any:
    return next(call.y for call in trace.calls if call.name == name)


def _plain(convolution: Convolution, weight: torch.Tensor, bias: torch.Tensor) -> nn.Sequential:
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


def _disturbed(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value + 0.5 * noise * value.float().std(unbiased=False).to(value.dtype)
    return value


def _joined(parts: list[Array]) -> Array:
    """Join one output of all batches; of samples whose outputs differ in size, take as much of each."""
    parts = [np.atleast_1d(part) for part in parts]
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    flat = [part.reshape(-1) for part in parts]
    return np.stack([part[np.arange(VALUES) * part.size // VALUES] for part in flat])


def pick(values: Array, positions: NDArray[np.int64]) -> Array:
    """Take (n, p) flat positions out of maps (n, c, *size): (n·p, c)."""
    flat = values.reshape(*values.shape[:2], -1)
    return flat[np.arange(len(positions))[:, None], :, positions].reshape(-1, values.shape[1])
