"""Calibration samples for PyTorch modules: whatever a forward pass takes, one sample at a time."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as tree

from netdecouple.errors import CalibrationError
from netdecouple.network import Array

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of one forward pass


@dataclass(frozen=True)
class Samples:
    """Samples in order, each the arguments of a forward pass for it alone."""

    units: Sequence[Arguments]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, chosen: slice | np.ndarray) -> Samples:
        units = self.units[chosen] if isinstance(chosen, slice) else [self.units[i] for i in chosen]
        return Samples(units)

    def __iter__(self) -> Iterator[Arguments]:
        return iter(self.units)

    @property
    def arguments(self) -> Arguments:
        """The arguments of one forward pass for all samples together; there may be but one of some kinds."""
        if len(self.units) == 1:
            return self.units[0]
        flat = [tree.tree_flatten(unit) for unit in self.units]
        joined = [
            torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]
            for leaves in zip(*(leaves for leaves, _ in flat), strict=True)
        ]
        arguments: Arguments = tree.tree_unflatten(joined, flat[0][1])
        return arguments

    @property
    def nbytes(self) -> int:
        """Memory that all tensors take."""
        leaves = [leaf for unit in self.units for leaf in tree.tree_leaves(unit)]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))

    @property
    def alike(self) -> bool:
        """Whether all samples differ in their numbers only, so that several may be run at once."""
        first, *others = (
            (structure, [_kind(leaf) for leaf in leaves])
            for leaves, structure in map(tree.tree_flatten, self.units)
        )
        return all(other == first for other in others)

    @property
    def fingerprint(self) -> str:
        """Hash of the numbers; that of plain image tensors is the one their array has."""
        leaves = [tree.tree_leaves(unit) for unit in self.units]
        first = leaves[0][0]
        alike = all(len(own) == 1 and _shape(own[0]) == _shape(first) for own in leaves)
        shape = (len(leaves), *_shape(first)[1:])
        digest = hashlib.sha256(
            str(shape if alike else [[_shape(v) for v in own] for own in leaves]).encode()
        )
        for own in leaves:
            for leaf in own:
                digest.update(
                    to_numpy(leaf).tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode()
                )
        return digest.hexdigest()


def collect(
    calib: Iterable[Any] | torch.Tensor | Array,
    module: nn.Module,
    limit: int | None,
    arguments: Callable[[Any], Any] | None,
) -> Samples:
    """Take samples out of batches: tensors, arrays, tuples or lists of arguments, mappings of named ones.

    Of what a DataLoader yields, as many leading entries are taken as ``module.forward`` asks for, so that
    labels are left out; a tuple that ``arguments`` makes of it is taken as it is. Batches are cut along
    their first dimension; a list of 3-D tensors is a detector's, one image each.

    Raises:
        CalibrationError: there is nothing, or something no forward pass can take.
    """
    if isinstance(calib, str | bytes) or not isinstance(calib, Iterable):
        raise CalibrationError(f"calib is a {type(calib).__name__}; give tensors, batches or a DataLoader")
    if limit is not None and limit < 1:
        raise CalibrationError(f"{limit} samples asked for: ask for at least 1")
    alone = isinstance(calib, torch.Tensor | np.ndarray | Mapping)
    accepted = _positional(module)
    flat = any(isinstance(part, nn.Conv1d | nn.ConvTranspose1d) for part in module.modules())
    units: list[Arguments] = []
    count = 0
    try:  # these are others' functions, and may do anything
        for batch in [calib] if alone else calib:
            taken = arguments(batch) if arguments else batch
            is_whole = arguments is not None and isinstance(taken, tuple)
            units += _units(taken, None if is_whole else accepted, flat)
            if limit is not None and len(units) >= limit:
                del units[limit:]
                break
            count += 1
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
        raise CalibrationError(f"batch {count} of calib: {kind}{reason}") from error
    if not units:
        raise CalibrationError("calib is empty; give a few hundred samples")
    return Samples(units)


def _positional(module: nn.Module) -> int:
    """How many arguments a forward pass asks for; one at least."""
    inner: Any = module.module if isinstance(module, nn.DataParallel) else module
    try:
        parameters = inspect.signature(inner.forward).parameters.values()
    except ValueError:  # traced ones do not say
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(sum(p.kind in kinds and p.default is p.empty for p in parameters), 1)


def _units(batch: Any, accepted: int | None, flat: bool) -> Iterator[Arguments]:
    """Cut a batch, of whose entries so many are ``accepted``, or all.

    To networks that are ``flat``, three dimensions are a batch and not a picture.
    """
    batch = tree.tree_map(_tensor, batch)
    if isinstance(batch, Mapping):
        yield from _cut(((), dict(batch)))
    elif isinstance(batch, torch.Tensor):
        yield from _cut(((batch,), {}))
    elif isinstance(batch, tuple | list) and batch:
        pictures = batch[0] if isinstance(batch[0], tuple | list) else batch
        listed = isinstance(batch, list) or pictures is not batch  # a tuple is of arguments
        if listed and pictures and not flat and all(map(_is_picture, pictures)):
            yield from ((([picture],), {}) for picture in pictures)
            return
        if accepted is not None:  # labels need not be tensors
            batch = batch[:accepted] if all(isinstance(e, torch.Tensor) for e in batch[1:]) else batch[:1]
        yield from _cut((tuple(batch), {}))
    else:
        raise TypeError(
            f"a {type(batch).__name__} is nothing to run; give tensors, tuples or mappings of them"
        )


def _tensor(leaf: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(leaf)) if isinstance(leaf, np.ndarray) else leaf


def _is_picture(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 3


def _cut(batch: Arguments) -> Iterator[Arguments]:
    leaves, structure = tree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise TypeError("there is no tensor in it")
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensors}
    if len(sizes) > 1 or 0 in sizes:
        yield batch  # what is the same for all samples and what is not cannot be told apart
        return
    for index in range(sizes.pop()):
        own = [v[index : index + 1] if isinstance(v, torch.Tensor) else v for v in leaves]
        arguments: Arguments = tree.tree_unflatten(own, structure)
        yield arguments


def _kind(leaf: Any) -> Any:
    """What must not differ from sample to sample for several to be run at once."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else ()


def to_numpy(tensor: torch.Tensor) -> Any:
    """Copy a tensor of any type and place to an array that NumPy knows."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.ascontiguousarray(tensor.cpu().numpy())
