"""The partly decoupled module, run up to one layer after the other.

A module's forward pass cannot be cut, but it can wait: every batch has a pass in a thread of its own, which
stops where a layer is called until that layer has been replaced. The frames of the waiting threads are the
cut through the network, so a network of any depth costs about one forward pass (DESIGN §4). Passes whose
tensors exceed the memory limit are ended, and started again when they are needed.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from netdecouple.convolution import Factorization
from netdecouple.frontends.torch.convolutions import Factorized
from netdecouple.frontends.torch.discovery import TorchLayer
from netdecouple.frontends.torch.samples import Samples
from netdecouple.frontends.torch.trace import StopForward, hooked
from netdecouple.network import Observation, Positions


class Shortcuts:
    """The tensors added to the last layers of residual branches, from when they exist until they are used."""

    def __init__(self, layers: Iterable[TorchLayer]) -> None:
        self._sources = {found.layer.name: found.shortcut for found in layers if found.shortcut}
        self._users = defaultdict(set)
        for layer, source in self._sources.items():
            self._users[source].add(layer)
        self.modules = {name for name, _ in self._users}
        self._values: dict[tuple[str, str], torch.Tensor] = {}
        self._waiting: dict[tuple[str, str], set[str]] = {}  # the layers that have yet to use each of them

    def of(self, layer: str) -> torch.Tensor | None:
        """The tensor that will be added to a layer's output; None if there is none."""
        source = self._sources.get(layer)
        return None if source is None else self._values[source]

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Keep a module's input; a hook."""
        if (name, "x") in self._users:
            self._keep((name, "x"), arguments[0])

    def after(self, name: str, arguments: tuple[Any, ...], output: Any) -> None:
        """Keep a module's output, and release what only this module was waiting for; a hook."""
        source = self._sources.get(name)
        if source in self._waiting:
            self._waiting[source].discard(name)
            if not self._waiting[source]:
                self._values.pop(source, None)
        if (name, "y") in self._users:
            self._keep((name, "y"), output)

    def _keep(self, source: tuple[str, str], value: torch.Tensor) -> None:
        self._values[source] = value
        self._waiting[source] = set(self._users[source])


class _Pass:
    """One batch's forward pass. It runs only while its owner waits in `run_to`."""

    def __init__(self, run: Callable[[], object], shortcuts: Shortcuts) -> None:
        self._run = run
        self.shortcuts = shortcuts
        self._resume, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._target = ""
        self._is_cancelled = False
        self.x: torch.Tensor | None = None  # the input of the layer at which the pass waits

    def run_to(self, layer: str) -> None:
        """Run until ``layer`` is called, or to the end."""
        self._target, self.x = layer, None
        if self._thread.ident is None:
            self._thread.start()
        self._resume.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def visit(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Keep shortcuts, and wait if this is the layer to stop at; a hook, in the pass's own thread."""
        self.shortcuts.before(name, arguments)
        if name == self._target:
            self.x = arguments[0]
            self._stopped.release()
            self._wait()

    def cancel(self) -> None:
        """End the pass, so that its tensors are freed."""
        self._is_cancelled, self.x = True, None
        self._resume.release()
        # the pass's own thread may have held the walk's last reference
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _wait(self) -> None:
        self._resume.acquire()
        if self._is_cancelled:
            raise StopForward

    def _main(self) -> None:
        try:
            self._wait()
            with torch.no_grad():
                self._run()
        except StopForward:
            pass
        except BaseException as error:
            self._error = error
        self._stopped.release()


@dataclass(eq=False, kw_only=True)
class TorchWalk:
    """The module as decoupled so far, with every batch's pass waiting at the same layer."""

    module: nn.Module  # is changed, and must be run by nothing else
    torch_layers: Mapping[str, TorchLayer]  # those that can be replaced
    samples: Samples
    batches: Sequence[slice]  # of the samples
    forward: Callable[[nn.Module, Samples], object]  # runs the module
    observe_original: Callable[[Samples, Positions], Iterator[Observation]]  # `TorchNetwork.observe`
    store_bytes: int  # memory that the tensors of waiting passes may take

    def __post_init__(self) -> None:
        self._passes: dict[int, _Pass] = {}
        self._running: list[_Pass] = []  # the one that does not wait
        self._hooks = ExitStack()
        self._hooks.enter_context(self._hooked())
        # also ends the threads of a walk that is dropped half-way, by Ctrl-C for instance
        self.close = weakref.finalize(self, _cancel_all, self._passes)

    def _hooked(self) -> AbstractContextManager[None]:
        """Hooks by which the running pass waits at layers and keeps shortcuts."""
        running = self._running  # waiting passes hold the module with its hooks, and must not hold the walk

        def before(name: str, arguments: tuple[Any, ...]) -> None:
            if running:
                running[0].visit(name, arguments)

        def after(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            if running:
                running[0].shortcuts.after(name, arguments, output)

        names = self.torch_layers.keys() | Shortcuts(self.torch_layers.values()).modules
        return hooked(self.module, before, after, names)

    def observe(self, layer: str, positions: NDArray[np.int64]) -> Iterator[Observation]:
        """Advance to ``layer`` and yield its inputs in the module as decoupled so far.

        A pass cannot wait at a layer that is called several times: later calls depend on the factorization
        that its first call is fitted to. Its inputs in the original module are yielded instead.
        """
        found = self.torch_layers[layer]
        if not found.single_map:
            for observation in self.observe_original(self.samples, {layer: positions}):
                yield replace(observation, shortcut=None)
            return
        for index, batch in enumerate(self.batches):
            current = self._passes.get(index)
            if current is None:
                run = partial(self.forward, self.module, self.samples[batch])
                current = self._passes[index] = _Pass(run, Shortcuts(self.torch_layers.values()))
            self._running[:] = [current]
            current.run_to(layer)
            self._running.clear()
            if current.x is None:  # this batch does not call the layer; start again for the next one
                del self._passes[index]
                continue
            shortcut = current.shortcuts.of(layer)
            yield found.observation(batch, current.x, None, positions[batch], shortcut)
            # counts the inputs of the layer only; a pass may hold other tensors too
            if len(self._passes) * current.x.nbytes > self.store_bytes:
                self._passes.pop(index).cancel()

    def advance(self, layer: str) -> None:
        """Do nothing: a batch's pass advances when the layer is observed."""

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Put a factorization in the place of ``layer``, before which the passes wait."""
        found = self.torch_layers[layer]
        module = Factorized.of(found.convolution, factorization)
        chain = self.module.get_submodule(layer)
        chain._modules.clear()
        chain.add_module("0", module.to(found.kernel).eval())


def _cancel_all(passes: dict[int, _Pass]) -> None:
    for waiting in passes.values():
        waiting.cancel()
