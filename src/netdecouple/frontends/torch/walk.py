"""The decoupled module in the making, run up to one layer after the other.

A module's forward pass cannot be cut, but it can be made to wait: every batch has a pass of its own, in a
thread that stops where a layer is called until that layer has been replaced. What Python's frames hold is
the cut through the network, so a network of any depth costs about one forward pass (DESIGN §4). Passes
whose tensors memory should not hold are given up, and begun again when they are needed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from netdecouple.convolution import Factorization
from netdecouple.frontends.torch.convolutions import Factorized
from netdecouple.frontends.torch.network import TorchNetwork
from netdecouple.frontends.torch.replacement import duplicate
from netdecouple.frontends.torch.samples import Samples
from netdecouple.frontends.torch.shortcuts import Enough, Shortcuts
from netdecouple.frontends.torch.trace import hooked
from netdecouple.network import Array, Observation


class _Pass:
    """One batch's forward pass. It runs only while its owner waits for it."""

    def __init__(self, run: Callable[[], None], shortcuts: Shortcuts) -> None:
        self._run = run
        self.shortcuts = shortcuts
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._target = ""
        self._is_over = False
        self.seen: torch.Tensor | None = None  # what the layer was called with where the pass waits

    def to(self, layer: str) -> None:
        """Run until ``layer`` is called, or to the end."""
        self._target, self.seen = layer, None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def visit(self, layer: str, x: torch.Tensor) -> None:
        """Stop, in the pass's own thread, if this is the layer to stop at."""
        if layer != self._target:
            return
        self.seen = x
        self._stopped.release()
        self._go.acquire()
        if self._run is _nothing:
            raise Enough

    def give_up(self) -> None:
        """Unwind the pass, so that its tensors are freed."""
        if self._thread.ident is None or self._is_over:
            return
        self._run, self.seen = _nothing, None
        self._go.release()
        if self._thread is not threading.current_thread():  # the walk may have been last held by a pass
            self._thread.join()

    def _main(self) -> None:
        try:
            with torch.no_grad():
                self._run()
        except Enough:
            pass
        except BaseException as error:
            self._error = error
        self._is_over = True
        self._stopped.release()


def _nothing() -> None:
    """What a pass that was given up has left to do."""


class TorchWalk:
    """The module as decoupled so far, with every batch's pass waiting at the same layer."""

    def __init__(self, network: TorchNetwork, images: Samples) -> None:
        self._network = network
        self._images = images
        self._module = duplicate(network.module)
        self._batches = network.batches(len(images))
        self._steady = {name for name, found in network.found.items() if found.steady}
        self._passes: dict[int, _Pass] = {}
        self._running: _Pass | None = None
        self._hooks = ExitStack()
        self._hooks.enter_context(self._hooked())
        # a walk that is left half-way, by Ctrl-C as well, leaves no thread behind
        self.close = weakref.finalize(self, _give_up_all, self._passes)

    def _hooked(self) -> AbstractContextManager[None]:
        """Have the pass that is running stop at layers, and see what takes their place."""
        me = weakref.ref(self)  # waiting passes hold the module and its hooks, and must not hold the walk
        layers, sources = set(self._network.found), Shortcuts(self._network.found, self._steady).names

        def before(name: str, arguments: tuple[Any, ...]) -> None:
            walk = me()
            current = walk._running if walk is not None else None
            del walk
            if current is None:
                return
            current.shortcuts.before(name, arguments)
            if name in layers:
                current.visit(name, arguments[0])

        def after(name: str, arguments: tuple[Any, ...], output: Any) -> None:
            walk = me()
            if walk is not None and walk._running is not None:
                walk._running.shortcuts.after(name, arguments, output)

        return hooked(self._module, before, after, (layers | sources).__contains__)

    def observe(self, layer: str, positions: NDArray[np.int64]) -> Iterator[Observation]:
        """Advance to ``layer`` and yield what it sees in the module as decoupled so far.

        A layer that is called several times cannot be waited for: later calls depend on what is yet to be
        found for the first. What it sees in the original network stands for that.
        """
        network = self._network
        if layer not in self._steady:
            for seen in network.observe(self._images, {layer: positions}):
                yield replace(seen, shortcut=None)
            return
        for index, batch in enumerate(self._batches):
            current = self._passes.get(index)
            if current is None:
                current = self._passes[index] = _Pass(
                    self._forward(batch), Shortcuts(network.found, self._steady)
                )
            self._running = current
            current.to(layer)
            self._running = None
            if current.seen is None:  # this batch does not call it; the next layer is looked for anew
                del self._passes[index]
            else:
                yield network.observation(
                    layer, batch, [(current.seen, None)], positions[batch], current.shortcuts.of(layer)
                )
                # of layer inputs that waiting passes hold; other tensors of theirs come on top
                if len(self._passes) * current.seen.nbytes > network.memory.store_bytes:
                    self._passes.pop(index).give_up()

    def _forward(self, batch: slice) -> Callable[[], None]:
        network, module, images = self._network, self._module, self._images[batch]

        def run() -> None:
            network.forward(module, images)

        return run

    def advance(self, layer: str) -> None:
        """Nothing to do: a batch's pass starts when it is first wanted, and goes as far as that."""

    def replace(self, layer: str, factorization: Factorization) -> None:
        """Put a factorization in the place of ``layer``: into its chain, before which passes wait."""
        weight = self._network.found[layer].weight
        module = Factorized.of(self._network.found[layer].convolution, factorization)
        chain = self._module.get_submodule(layer)
        chain._modules.clear()
        chain.add_module("0", module.to(weight.device, weight.dtype).eval())

    def outputs(self) -> list[Array]:
        """Return the decoupled network's outputs on every sample."""
        return self._network.run_module(self._module, self._images)


def _give_up_all(passes: dict[int, _Pass]) -> None:
    for waiting in passes.values():
        waiting.give_up()
