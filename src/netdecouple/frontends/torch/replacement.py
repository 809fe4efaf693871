"""Copy modules, and replace their parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from netdecouple.errors import ModelError, NetDecoupleError, first_line

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def failures() -> Iterator[None]:
    """Turn whatever a module raises while it runs into an error of one line.

    Raises:
        ModelError: the module raised an error.
    """
    try:
        yield
    except NetDecoupleError:
        raise
    except Exception as error:
        raise ModelError(
            f"the module fails on a calibration sample: {type(error).__name__}: {first_line(error)}; "
            "calib must yield what its forward takes"
        ) from error


def duplicate(module: nn.Module) -> nn.Module:
    """Copy a module; computed tensors among its attributes (weight normalisation) are copied as values.

    Raises:
        ModelError: it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        with torch.no_grad():  # else the weights of scripted parts would be computed tensors
            copied = copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(
            f"the module cannot be copied ({type(error).__name__}: {first_line(error)}); "
            "it must survive copy.deepcopy"
        ) from error
    for new, old in zip(copied.parameters(), module.parameters(), strict=False):
        if new.requires_grad != old.requires_grad:
            new.requires_grad_(old.requires_grad)
    return copied


def install(root: nn.Module, name: str, new: nn.Module, norm: str) -> nn.Module:
    """Replace a layer by ``new``, and remove the BatchNorm that is folded into it, if ``norm`` names one.

    Mode, type, device and ``requires_grad`` are those of the layer. Returns the root, which may be ``new``.
    """
    old = root.get_submodule(name)
    like = next(chain(old.parameters(), old.buffers()))
    new = new.to(like.device, like.dtype).requires_grad_(like.requires_grad).train(old.training)
    root = substitute(root, name, new)
    return _bypass(root, norm) if norm else root


def substitute(root: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace the module ``name`` by ``new`` under all its names; return the root, which may be ``new``."""
    old = root.get_submodule(name)
    if old is root:
        return new
    for parent in root.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return root


def _bypass(root: nn.Module, name: str) -> nn.Module:
    """Remove a BatchNorm; a subclass, which may do more, stays as a BatchNorm that changes nothing.

    It then follows its own normalised output, so its scale and shift become that output's standard deviation
    and mean, in training too.
    """
    norm: Any = root.get_submodule(name)
    if type(norm) in NORMS:
        return substitute(root, name, nn.Identity().train(norm.training))
    with torch.no_grad():
        if norm.weight is None:
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
        else:
            norm.running_mean.copy_(norm.bias)
            norm.running_var.copy_((norm.weight.square() - norm.eps).clamp_min(0))
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    return root
