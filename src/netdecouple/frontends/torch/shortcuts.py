"""What a forward pass that is observed needs: an early end, and the shortcuts of residual branches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from netdecouple.frontends.torch.discovery import TorchLayer


class StopForward(BaseException):
    """Unwinds a forward pass that is no longer needed; not an Exception, which modules may catch."""


class Shortcuts:
    """The tensors added to the last layers of residual branches, from when they exist until they are used."""

    def __init__(self, torch_layers: Mapping[str, TorchLayer], names: Iterable[str]) -> None:
        self._sources = {
            name: source for name in names if (source := torch_layers[name].shortcut) is not None
        }
        self._kept = set(self._sources.values())
        self.modules = {name for name, _ in self._kept}
        self._values: dict[tuple[str, str], torch.Tensor] = {}
        self._waiting: dict[tuple[str, str], set[str]] = {}  # the layers that have yet to use each of them

    def of(self, layer: str) -> torch.Tensor | None:
        """The tensor that will be added to a layer's output; None if there is none."""
        source = self._sources.get(layer)
        return None if source is None else self._values[source]

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Keep a module's input; a hook."""
        if (name, "x") in self._kept:
            self._keep((name, "x"), arguments[0])

    def after(self, name: str, arguments: tuple[Any, ...], output: Any) -> None:
        """Keep a module's output, and release what only this module was waiting for; a hook."""
        source = self._sources.get(name)
        if source in self._waiting:
            self._waiting[source].discard(name)
            if not self._waiting[source]:
                self._values.pop(source, None)
        if (name, "y") in self._kept:
            self._keep((name, "y"), output)

    def _keep(self, source: tuple[str, str], value: torch.Tensor) -> None:
        self._values[source] = value
        self._waiting[source] = {layer for layer, other in self._sources.items() if other == source}
