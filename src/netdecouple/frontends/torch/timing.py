"""Time layers in some structure, and whole modules, in a runtime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from netdecouple import runtimes
from netdecouple.convolution import Structure
from netdecouple.errors import ModelError
from netdecouple.frontends.torch.convolutions import Factorized
from netdecouple.frontends.torch.discovery import TorchLayer
from netdecouple.frontends.torch.export import export, image_tensor
from netdecouple.frontends.torch.network import TorchNetwork
from netdecouple.frontends.torch.replacement import duplicate
from netdecouple.frontends.torch.samples import Samples, to_numpy
from netdecouple.network import Layer
from netdecouple.runtimes import Feeds
from netdecouple.runtimes.timing import Stopwatch

COLD = 4 << 20  # bytes of weights next to a layer's own, so that they come from beyond the second-level cache
SECONDS = 0.2  # to time one layer in all its structures
MODULES = 1000  # that torch.compile may compile, by default eight of one class


class TorchTimer:
    """Measures milliseconds for one sample of a network, in one runtime with one number of threads.

    Modules are exported to other runtimes than "torch" and "torch.compile".

    Raises:
        UnavailableError: the runtime does not exist or is not installed.
        ModelError: the runtime cannot run modules that take such samples.
    """

    batch = 1

    def __init__(
        self, network: TorchNetwork, runtime: str, threads: int, forms: Sequence[str] = ("parallel",)
    ) -> None:
        self._runtime = runtimes.runtime(runtime)
        self.name = f"{runtime} {self._runtime.version}, {threads} thread{'s' * (threads > 1)}"
        self._network = network
        self._threads, self._stopwatch = threads, Stopwatch(threads)
        self._exports = not runtime.startswith("torch")
        self._forms, self._fused = tuple(forms), "fused" in forms and self._exports
        self._compiles = runtime == "torch.compile"
        self._images = image_tensor(network.example) if self._exports else None
        example = network.example if self._exports else Samples([network.placed(network.example[:1])])
        self._feeds = first_feeds(example)

    @property
    def lost(self) -> float:
        """The share of the time of timing that other work took."""
        return self._stopwatch.lost

    def forms(self, layer: Layer) -> tuple[str, ...]:
        """The ways to write a factorization of ``layer``; there is one in PyTorch."""
        return self._forms[:1]

    def layer_times(self, layer: Layer, kinds: Sequence[tuple[Structure, str]]) -> list[float]:
        """Return the milliseconds that ``layer`` takes for one sample in each structure, measured in turns.

        The layer's own geometry as the only stage stands for the layer as it is, with its BatchNorm. Several
        copies with random weights run on one random input, so that no copy finds its weights in the cache.
        Everything is float32. With torch.compile a structure takes seconds to compile.
        """
        found = self._network.torch_layers[layer.name]
        most = 2 if self._compiles or layer.macs >= 5e8 else 8
        copies = int(np.clip(COLD / (4 * layer.parameters), min(most, 3), most))
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            x = torch.randn(found.input_shape)
            modules = [self._copies(found, structure, copies) for structure, _ in kinds]
        few = torch.cat([x, x.flip(-1)]) if self._exports else None
        feeds = {"0": to_numpy(x)}
        calls = [self._call(module, few, feeds) for module in modules]
        share = (
            layer.maps / found.input_shape[0] / copies
        )  # of the time: of one copy, for all calls of the layer
        return [float(time) * share for time in self._stopwatch.times(calls, SECONDS)]

    def network_times(self, models: Sequence[nn.Module]) -> NDArray[np.float64]:
        """Measure whole modules: milliseconds (1 + models,), the original first."""
        return self._stopwatch.times([self._original, *self.runs(models)], 1.0)

    @cached_property
    def _original(self) -> Callable[[], object]:
        return self.runs([self._network.original])[0]

    def runs(self, modules: Sequence[nn.Module]) -> list[Callable[[], object]]:
        """Open modules with the network's inputs; return functions that run each on the first sample.

        Raises:
            ModelError: a module cannot be exported to the runtime, or fails.
        """
        evaluated = (duplicate(module).eval().cpu() for module in modules)
        return [self._call(module, self._images, self._feeds) for module in evaluated]

    def _copies(self, found: TorchLayer, structure: Structure, copies: int) -> nn.Module:
        """Make a module that runs several copies of a layer in some structure on one input.

        Its code is generated, because torch.compile limits how often it compiles one function. If it will be
        exported, each copy ends in an average over pixels, which runtimes compute in blocked layouts too, so
        that the time does not include a conversion of the output's layout.
        """
        graph = fx.Graph()
        parts: dict[str, nn.Module] = {}
        x = graph.placeholder("image")
        outputs = []
        for index in range(copies):
            parts[f"copy{index}"] = self._placeholder(found, structure)
            y = graph.call_module(f"copy{index}", (x,))
            if self._exports and found.convolution.kernel:
                dimensions = tuple(range(2, 2 + len(found.convolution.kernel)))
                y = graph.call_function(torch.mean, (y, dimensions))
            outputs.append(y)
        graph.output(tuple(outputs))
        return fx.GraphModule(parts, graph).eval()

    def _placeholder(self, found: TorchLayer, structure: Structure) -> nn.Module:
        """Make a layer in some structure, with random weights."""
        if structure.stages == (structure.geometry,):
            stages = list(found.convolution.modules(structure))
            if found.norm:
                stages.append(duplicate(self._network.original.get_submodule(found.norm)).float().cpu())
            return stages[0] if len(stages) == 1 else nn.Sequential(*stages)
        return Factorized(found.convolution, structure)

    def _call(self, module: nn.Module, images: torch.Tensor | None, feeds: Feeds) -> Callable[[], object]:
        """Open a module in the runtime, and run it once, so that torch.compile compiles it."""
        model = module if images is None else export(module, images, {}, self._fused)
        session = self._runtime.open(model, self._threads)
        names = [value.name for value in session.inputs] or feeds  # PyTorch takes inputs by position
        call = partial(session.run, dict(zip(names, feeds.values(), strict=True)))
        with _many_modules() if self._compiles else nullcontext():
            call()
        return call


def first_feeds(samples: Samples) -> dict[str, Any]:
    """The first sample as the inputs of a runtime.

    Raises:
        ModelError: the module takes other arguments than tensors by position.
    """
    args, kwargs = samples.units[0]
    if kwargs or not all(isinstance(a, torch.Tensor) for a in args):
        raise ModelError("only models that take tensors by position are timed")
    return {str(index): to_numpy(a) for index, a in enumerate(args)}


def _many_modules() -> Any:
    """Let torch.compile compile many modules of one class, each for the shapes it is called with."""
    from torch._dynamo import config  # takes seconds to import

    return config.patch(recompile_limit=MODULES, automatic_dynamic_shapes=False)
