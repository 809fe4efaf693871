"""A PyTorch module at work: run it, watch its layers, walk it while it is being decoupled.

All work is done on copies; the module given is only read.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import hashlib
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as tree

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError
from netdecouple.execution import threads
from netdecouple.execution.memory import Memory
from netdecouple.frontends.torch.convolutions import (
    Factorized,
)
from netdecouple.frontends.torch.discovery import EXACT, exactness, find, maps_in, plain, same
from netdecouple.frontends.torch.replacement import duplicate, failures, first_line, install
from netdecouple.frontends.torch.samples import Arguments, Samples, to_numpy
from netdecouple.frontends.torch.shortcuts import Enough, Shortcuts
from netdecouple.frontends.torch.trace import Trace, hooked, tensors
from netdecouple.network import Array, Layer, Observation, Positions

VALUES = 4096  # of a sample's outputs looked at, where they differ in size from sample to sample
BOUND = "the module does more with it than call it"  # why a layer is kept


class TorchNetwork:
    """A pretrained module, opened: copied, put in evaluation mode, and run on two samples.

    Args:
        module: is not changed.
        samples: at least two.
        device: where to run.
        chosen: tells by name and module whether a layer may be decoupled; None: all may.
        memory: how much of it batches and walks may take.

    Raises:
        ModelError: it cannot be copied or run, or there is nothing to decouple.
    """

    def __init__(
        self,
        module: nn.Module,
        samples: Samples,
        device: str = "cpu",
        chosen: Callable[[str, nn.Module], bool] | None = None,
        memory: Memory = Memory(),
    ) -> None:
        self.memory = memory
        check(module)
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ModelError(f"device={device!r}: {first_line(error)}") from error
        self.original = module
        self._chosen = chosen
        self._few = samples[:2]
        self.module = self.evaluated(module)
        self._walks: weakref.WeakSet[Any] = weakref.WeakSet()
        with torch.no_grad():
            self.dtype = self._input_type(samples[:1])
            traces = [self._traced(samples[i : i + 1]) for i in (0, 1)]
            made = (tensor for call in traces[0][0].calls for tensor in tensors(call.y))
            self.exact = max(map(exactness, made), default=EXACT)
            self.batchable = samples.alike and self._batched(samples[:2], traces)
            self.found, layers = find(self.module, traces, chosen)
            self.layers = tuple(layers)
            self.watched = self._watch(samples[:1])
            self.module, bound = self._fold(samples[:2])
        for name in bound:
            del self.found[name]
        self.layers = tuple(
            replace(la, geometry=None, reason=BOUND) if la.name in bound else la for la in layers
        )

    def _input_type(self, sample: Samples) -> torch.dtype:
        """The first of its parameters' types in which the module takes a sample."""
        floating = (p.dtype for p in self.original.parameters() if p.is_floating_point())
        types = list(dict.fromkeys(floating)) or [torch.float32]
        for kind in types if len(types) > 1 else ():
            self.dtype = kind
            with suppress(ModelError):
                self.forward(self.module, sample)
                return kind
        return types[0]

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
        calls: list[tuple[str, int]] = []  # no trace, which would hold all that is made

        def after(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            calls.append((name, maps_in(arguments[0] if arguments else None)))

        try:
            with hooked(self.module, after=after):
                args, kwargs = self.placed(samples)
                output = self.module(*args, **kwargs)
        except Exception:  # whatever it is, one by one they have run
            return False
        parts = zip(*(list(tensors(out)) for out in (output, single[0][1], single[1][1])), strict=False)
        for both, *each in parts:
            if each[0].ndim == 0 or each[0].shape[1:] != each[1].shape[1:]:
                return False
            if not same(both, torch.cat(each), self.exact):
                return False
        return calls == [(call.name, 2 * maps_in(call.x)) for call in single[0][0].calls]

    def _fold(self, few: Samples) -> tuple[nn.Module, set[str]]:
        """Put plain convolutions, BatchNorm folded in, in the place of the layers that may change.

        The module must compute what it did. Where it does not, each layer is tried by itself, and those that
        cannot be replaced are named: the module may read their attributes, or hooks may hang on them.

        Raises:
            ModelError: no layer can be replaced.
        """

        def heard(module: nn.Module) -> tuple[list[Array], set[str]]:
            """What a module makes, and the layers that are called for it."""
            called: set[str] = set()
            with hooked(module, lambda name, arguments: called.add(name), names=self.found.__contains__):
                return self.run_module(module, few), called

        expected, called = heard(self.module)

        def folded(names: Iterable[str]) -> nn.Module:
            module = self.evaluated(self.original)
            for name in names:
                found = self.found[name]
                chain = plain(found.convolution, found.weight, found.bias)
                module = install(module, name, chain, found.norm)
            made, called_now = heard(module)
            if called & set(names) - called_now:
                raise ModelError(
                    "the module calls its layers from a list or dict of its own, where they cannot be "
                    "replaced; hold them in an nn.ModuleList or nn.ModuleDict"
                )
            for one, other in zip(expected, made, strict=True):
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

    def _watch(self, sample: Samples) -> Counter[str]:
        """The modules whose outputs tell what decoupling does: the whole, else the largest that can.

        With every name comes how often the module is called.

        Detectors end in sorting and suppressing boxes; how these change says little about the layers.
        """
        noisy = Samples(tree.tree_map(_disturbed, list(sample.units)))
        calls: Counter[str] = Counter()
        made = [self._made(sample, calls), self._made(noisy, Counter())]

        def is_static(name: str) -> bool:
            shapes = made[0][name]
            return bool(shapes) and shapes == made[1].get(name) and all(real for _, real in shapes)

        watched: Counter[str] = Counter()
        for name in made[0]:  # from the outside in
            inside = any(name.startswith(f"{w}.") for w in watched) or "" in watched
            holds = any(f"{layer}.".startswith(f"{name}." if name else "") for layer in self.found)
            if not inside and holds and is_static(name):
                watched[name] = calls[name]
        return watched

    def _made(self, sample: Samples, calls: Counter[str]) -> dict[str, list[tuple[torch.Size, bool]]]:
        """What every module makes of a sample: its tensors' shapes, and whether they hold real numbers.

        How often it is called is counted in ``calls``.
        """
        made: dict[str, list[tuple[torch.Size, bool]]] = {}

        def before(name: str, arguments: tuple[Any, ...]) -> None:
            made.setdefault(name, [])

        def after(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            made[name] = [(t.shape, t.is_floating_point()) for t in tensors(output)]
            calls[name] += 1

        with hooked(self.module, before, after):
            self.forward(self.module, sample)
        return made

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
            int(np.clip(self.memory.batch_bytes // max(bytes_per_sample, 4 * largest), 1, 128))
            if self.batchable
            else 1
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
        awaited: Counter[str] = Counter()

        def keep(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            seen[name] = output
            awaited[name] -= 1
            if max(awaited.values()) < 1:
                raise Enough  # what a detector makes of it takes long and is not looked at

        with torch.no_grad(), hooked(module, after=keep, names=self.watched.__contains__):
            for batch in self.batches(len(images)):
                awaited.update(self.watched)
                with suppress(Enough):
                    self.forward(module, images[batch])
                parts.append([to_numpy(t).astype(np.float32) for n in self.watched for t in tensors(seen[n])])
                seen.clear()
                awaited.clear()
        return [_joined(list(own)) for own in zip(*parts, strict=True)]

    def evaluated(self, module: nn.Module) -> nn.Module:
        """Copy a module that was made of this one, ready to be run as it is."""
        copied = duplicate(module)
        try:
            return copied.eval().requires_grad_(False).to(self.device)
        except Exception as error:
            raise ModelError(f"the module cannot be put on {self.device}: {first_line(error)}") from error

    def observe(
        self, images: Samples, positions: Positions, with_patches: bool = True
    ) -> Iterator[Observation]:
        """Yield, batch by batch, what the layers named in ``positions`` see, if that is wanted, and produce.

        What was sampled is gathered when a layer is called: whole maps are held for no more than one. A
        forward pass ends where the last of them has been called.
        """
        if not positions:
            return
        shortcuts = Shortcuts(self.found, positions)
        gathered: dict[str, Observation] = {}
        calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # of layers called several times
        unseen: set[str | None] = set()

        def after(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            if name in positions and self.found[name].steady:
                where = positions[name][batch]
                seen = self.observation(name, batch, [(arguments[0], output)], where, shortcuts.of(name))
                gathered[name] = replace(seen, look=partial(_as_is, seen.patches if with_patches else None))
            elif name in positions:  # copied: what comes later may change it in place
                calls.setdefault(name, []).append((arguments[0].clone(), output.clone()))
            shortcuts.after(name, arguments, output)
            unseen.discard(name)
            if not unseen:
                raise Enough

        steady = all(self.found[name].steady for name in positions)
        names = set(positions) | shortcuts.names
        held = sum(self._sampled_bytes(name, where) for name, where in positions.items())
        for batch in self.batches(len(images), held if with_patches else 0):
            unseen |= positions.keys() if steady else {None}  # which never comes: run to the end
            listening = hooked(self.module, shortcuts.before, after, names.__contains__)
            with torch.no_grad(), listening, suppress(Enough):
                self.forward(self.module, images[batch])
            for name, where in positions.items():
                if name in gathered:
                    yield gathered.pop(name)
                elif name in calls:
                    yield self.observation(name, batch, calls.pop(name), where[batch], None)

    def _sampled_bytes(self, name: str, where: NDArray[np.int64]) -> int:
        """What is gathered of a layer for one sample, its maps too if these are kept until the end."""
        layer = self.layer[name]
        g = layer.geometry
        assert g is not None
        taken = where.shape[1] * (g.unknowns * g.groups + g.n_o)
        maps = g.n_i * math.prod(layer.size) + g.n_o * math.prod(layer.output_size)
        return 4 * (taken if self.found[name].steady else int(layer.maps * maps))

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

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the same network where it is unpickled."""
        left_alone = (
            frozenset()
            if self._chosen is None
            else frozenset(
                name for name, module in self.original.named_modules() if not self._chosen(name, module)
            )
        )
        device, memory = str(self.device), self.memory.in_worker
        return _reopened, (self.original, self._few, device, left_alone, self.batchable, memory)

    def walk(self, images: Samples) -> Any:
        """Start at the network's input, ready to be decoupled layer by layer; nothing goes to disk."""
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


def check(module: nn.Module) -> None:
    """Refuse modules that cannot be changed, before anything is made of them.

    Raises:
        ModelError: it is compiled or scripted, or has weights that are not there yet.
    """
    compiled = any("_orig_mod" in part._modules for part in module.modules())
    if compiled or isinstance(module, torch.jit.ScriptModule):
        kind = "compiled" if compiled else "scripted"
        raise ModelError(f"a {kind} module cannot be changed; give the module it was made from")
    state = (*module.parameters(), *module.buffers())
    if any(nn.parameter.is_lazy(value) for value in state):
        raise ModelError("the module has weights that are made when it first runs; run it once before")
    if any(value.is_meta for value in state):
        raise ModelError("the module has weights without numbers (on the meta device); make it on another")


def _reopened(
    module: nn.Module,
    few: Samples,
    device: str,
    left_alone: frozenset[str],
    batchable: bool,
    memory: Memory,
) -> TorchNetwork:
    """Open a network in another process; whether all its samples are alike has been seen before."""
    torch.set_num_threads(threads.available())
    network = TorchNetwork(module, few, device, lambda name, _: name not in left_alone, memory)
    network.batchable = batchable
    return network


def _as_is(patches: Array | None) -> Array:
    assert patches is not None, "patches were not asked for"
    return patches


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
