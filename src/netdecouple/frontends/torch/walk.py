"""The partly decoupled module, run up to one layer after the other.

A module's forward pass cannot be cut, but it can wait: every batch has a pass in a thread of its own, which
stops where a layer is called until that layer has been replaced. The frames of the waiting threads are the
cut through the network, so a network of any depth costs about one forward pass (DESIGN §4). Passes whose
tensors exceed the memory limit are ended, and started again when they are needed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from netdecouple.frontends.torch.shortcuts import Shortcuts, StopForward
from netdecouple.frontends.torch.trace import hooked
from netdecouple.network import Observation, Positions


class _Pass:
    """One batch's forward pass. It runs only while its owner waits in `run_to`."""

    def __init__(self, run: Callable[[], object], shortcuts: Shortcuts) -> None:
        self._run = run
        self.shortcuts = shortcuts
        self._resume, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._target = ""
        self._is_over = False
        self._is_cancelled = False
        self.x: torch.Tensor | None = None  # the input of the layer at which the pass waits

    def run_to(self, layer: str) -> None:
        """Run until ``layer`` is called, or to the end."""
        self._target, self.x = layer, None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._resume.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def visit(self, layer: str, x: torch.Tensor) -> None:
        """Wait, in the pass's own thread, if ``layer`` is the one to stop at."""
        if layer != self._target:
            return
        self.x = x
        self._stopped.release()
        self._resume.acquire()
        if self._is_cancelled:
            raise StopForward

    def cancel(self) -> None:
        """End the pass, so that its tensors are freed."""
        if self._thread.ident is None or self._is_over:
            return
        self._is_cancelled, self.x = True, None
        self._resume.release()
        if self._thread is not threading.current_thread():  # which may have held the walk's last reference
            self._thread.join()

    def _main(self) -> None:
        try:
            with torch.no_grad():
                self._run()
        except StopForward:
            pass
        except BaseException as error:
            self._error = error
        self._is_over = True
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
        self._single_map = {name for name, found in self.torch_layers.items() if found.single_map}
        self._passes: dict[int, _Pass] = {}
        self._running: _Pass | None = None
        self._hooks = ExitStack()
        self._hooks.enter_context(self._hooked())
        # also ends the threads of a walk that is dropped half-way, by Ctrl-C for instance
        self.close = weakref.finalize(self, _cancel_all, self._passes)

    def _hooked(self) -> AbstractContextManager[None]:
        """Hooks by which the running pass waits at layers and keeps shortcuts."""
        weak = weakref.ref(self)  # waiting passes hold the module with its hooks, and must not hold the walk
        layers = set(self.torch_layers)
        sources = Shortcuts(self.torch_layers, self._single_map).modules

        def before(name: str, arguments: tuple[Any, ...]) -> None:
            walk = weak()
            current = walk._running if walk is not None else None
            del walk
            if current is None:
                return
            current.shortcuts.before(name, arguments)
            if name in layers:
                current.visit(name, arguments[0])

        def after(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            walk = weak()
            if walk is not None and walk._running is not None:
                walk._running.shortcuts.after(name, arguments, output)

        return hooked(self.module, before, after, (layers | sources).__contains__)

    def observe(self, layer: str, positions: NDArray[np.int64]) -> Iterator[Observation]:
        """Advance to ``layer`` and yield its inputs in the module as decoupled so far.

        A pass cannot wait at a layer that is called several times: later calls depend on the factorization
        that its first call is fitted to. Its inputs in the original module are yielded instead.
        """
        if layer not in self._single_map:
            for observation in self.observe_original(self.samples, {layer: positions}):
                yield replace(observation, shortcut=None)
            return
        for index, batch in enumerate(self.batches):
            current = self._passes.get(index)
            if current is None:
                run = partial(self.forward, self.module, self.samples[batch])
                current = _Pass(run, Shortcuts(self.torch_layers, self._single_map))
                self._passes[index] = current
            self._running = current
            current.run_to(layer)
            self._running = None
            if current.x is None:  # this batch does not call the layer; start again for the next one
                del self._passes[index]
                continue
            yield self.torch_layers[layer].observation(
                batch, [(current.x, None)], positions[batch], current.shortcuts.of(layer)
            )
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
        chain.add_module("0", module.to(found.weight.device, found.weight.dtype).eval())


def _cancel_all(passes: dict[int, _Pass]) -> None:
    for waiting in passes.values():
        waiting.cancel()
