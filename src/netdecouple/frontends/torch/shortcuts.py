"""What is needed of a forward pass that is listened to: an end, and what later layers will want to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from netdecouple.frontends.torch.discovery import Found


class Enough(BaseException):
    """Unwinds a forward pass that is no longer needed; no module's ``except Exception`` is to catch it."""


class Shortcuts:
    """The tensors added to residual branches, remembered from when they are there until they were needed."""

    def __init__(self, found: Mapping[str, Found], layers: Iterable[str]) -> None:
        self._sources = {name: source for name in layers if (source := found[name].shortcut) is not None}
        self._wanted = set(self._sources.values())
        self.names = {name for name, _ in self._wanted}
        self._values: dict[tuple[str, str], torch.Tensor] = {}
        self._waiting: dict[tuple[str, str], set[str]] = {}  # the layers that each is for, until they ran

    def of(self, layer: str) -> torch.Tensor | None:
        """What is going to be added to a layer's output, if anything is."""
        source = self._sources.get(layer)
        return None if source is None else self._values[source]

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Remember what a module is given; a hook."""
        if (name, "x") in self._wanted:
            self._remember((name, "x"), arguments[0])

    def after(self, name: str, arguments: tuple[Any, ...], output: Any) -> None:
        """Remember what a module makes, and forget what only it was waiting for; a hook."""
        source = self._sources.get(name)
        if source in self._waiting:
            self._waiting[source].discard(name)
            if not self._waiting[source]:
                self._values.pop(source, None)
        if (name, "y") in self._wanted:
            self._remember((name, "y"), output)

    def _remember(self, source: tuple[str, str], value: torch.Tensor) -> None:
        self._values[source] = value
        self._waiting[source] = {layer for layer, own in self._sources.items() if own == source}
