"""A PyTorch network whose decoupled layers can be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError
from netdecouple.frontends.torch.samples import Samples
from netdecouple.network import Array

if TYPE_CHECKING:
    from netdecouple.frontends.torch.network import TorchNetwork


class TorchTrainable:
    """A module with some layers as chains of stages, whose weights can be trained; the rest stays as it is.

    Raises:
        ModelError: its weights are not float32.
    """

    def __init__(self, network: TorchNetwork, factorizations: Mapping[str, Factorization]) -> None:
        self._network = network
        self._module = network.evaluated(network.build(factorizations))
        self._parts: dict[str, Any] = {name: self._module.get_submodule(name) for name in factorizations}
        for part in self._parts.values():
            part.requires_grad_(True)
        if any(parameter.dtype != torch.float32 for parameter in self.parameters):
            raise ModelError(f"{network.name}: only float32 networks can be refined; leave out refine=")

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The weights of all stages, and the biases."""
        return [parameter for part in self._parts.values() for parameter in part.parameters()]

    def factorizations(self) -> dict[str, Factorization]:
        """The changed layers with their weights as they are now."""
        return {name: part.factorization() for name, part in self._parts.items()}

    def augmented(self, images: Samples, change: Callable[[Array], Array]) -> Samples:
        """Return samples of the same kind, with pictures (n, c, h, w) changed; others stay as they are."""
        pictures = self._network.pictures(images)
        if not pictures or len({picture.shape for picture in pictures}) > 1:
            return images
        changed = torch.from_numpy(change(np.stack(pictures)))
        return Samples([((picture[None],), {}) for picture in changed])

    def __call__(self, images: Samples) -> list[torch.Tensor]:
        """Run one batch of samples, with gradients unless they are switched off."""
        return self._network.captured_outputs(self._module, images)
