"""Copying modules, and putting others in the place of their parts."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from netdecouple.errors import ModelError, NetDecoupleError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def failures() -> Iterator[None]:
    """Say in one line what others' code raises while it runs.

    Raises:
        ModelError: it raised something.
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
    """Copy a module; computed tensors that hang on it (weight normalisation) are copied as they are.

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
    for own, other in zip(copied.parameters(), module.parameters(), strict=False):
        if own.requires_grad != other.requires_grad:
            own.requires_grad_(other.requires_grad)
    return copied


def install(root: nn.Module, name: str, new: nn.Module, norm: str) -> nn.Module:
    """Put ``new`` where a layer stands, and take out the BatchNorm that is in its numbers, if one is.

    Modes, type, device and whether gradients are wanted are those of the layer. The root comes back.
    """
    old = root.get_submodule(name)
    like = next(chain(old.parameters(), old.buffers()))
    new = new.to(like.device, like.dtype).requires_grad_(like.requires_grad).train(old.training)
    root = substitute(root, name, new)
    return _bypass(root, norm) if norm else root


def substitute(root: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in every place where the module ``name`` stands; return the root, which may be it."""
    old = root.get_submodule(name)
    if old is root:
        return new
    for parent in root.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return root


def _bypass(root: nn.Module, name: str) -> nn.Module:
    """Take a BatchNorm out; one that does more than that stays, and changes nothing more.

    It stands behind what it has made already, so that its scale and shift are that one's own variance and
    mean, in training too.
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
