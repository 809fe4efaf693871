"""Calibration samples for PyTorch modules: whatever a forward pass takes, one sample at a time."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as tree

from netdecouple.errors import CalibrationError, first_line
from netdecouple.frontends.torch.convolutions import CONVOLUTIONS
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
        """The arguments of one forward pass on all samples; only samples that are `alike` can be joined."""
        if len(self.units) == 1:
            return self.units[0]

        def join(*leaves: Any) -> Any:
            return torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]

        return tree.tree_map(join, *self.units)

    @property
    def nbytes(self) -> int:
        """Memory that all tensors take."""
        leaves = [leaf for unit in self.units for leaf in tree.tree_leaves(unit)]
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))

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
        samples = [tree.tree_leaves(unit) for unit in self.units]
        shapes: Any = [[_shape(leaf) for leaf in leaves] for leaves in samples]
        first = shapes[0][0]
        if all(of_sample == [first] for of_sample in shapes):
            shapes = (len(samples), *first[1:])
        digest = hashlib.sha256(str(shapes).encode())
        for leaf in chain.from_iterable(samples):
            digest.update(to_numpy(leaf).tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
        return digest.hexdigest()


def collect(
    calib: Iterable[Any] | torch.Tensor | Array,
    module: nn.Module,
    limit: int | None,
    arguments: Callable[[Any], Any] | None,
) -> Samples:
    """Take samples out of batches: tensors, arrays, tuples or lists of arguments, mappings of named ones.

    Of a DataLoader's batches, as many leading entries are taken as ``module.forward`` has parameters, so that
    labels are left out; a tuple that ``arguments`` returns is taken as it is. Batches are cut along
    their first dimension; a list of 3-D tensors is a detector's, one image each. A tensor with the channels
    of the first convolution, and no dimension in front of them, is one sample.

    Raises:
        CalibrationError: there are no samples, or some that no forward pass can take.
    """
    if isinstance(calib, str | bytes) or not isinstance(calib, Iterable):
        raise CalibrationError(f"calib is a {type(calib).__name__}; give tensors, batches or a DataLoader")
    if limit is not None and limit < 1:
        raise CalibrationError(f"{limit} samples asked for: ask for at least 1")
    alone = isinstance(calib, torch.Tensor | np.ndarray | Mapping)
    accepted = _positional(module)
    flat = any(isinstance(part, nn.Conv1d | nn.ConvTranspose1d) for part in module.modules())
    channels = None if alone else _channels(module)
    units: list[Arguments] = []
    count = 0
    try:  # iterating and ``arguments`` run the caller's code
        for batch in [calib] if alone else calib:
            taken = arguments(batch) if arguments else batch
            if isinstance(taken, torch.Tensor | np.ndarray) and (taken.ndim, taken.shape[:1]) == channels:
                taken = taken[None]
            is_whole = arguments is not None and isinstance(taken, tuple)
            units += _units(taken, None if is_whole else accepted, flat)
            if limit is not None and len(units) >= limit:
                del units[limit:]
                break
            count += 1
    except Exception as error:
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
        raise CalibrationError(f"batch {count} of calib: {kind}{first_line(error)}") from error
    if not units:
        raise CalibrationError("calib is empty; give a few hundred samples")
    return Samples(units)


def _channels(module: nn.Module) -> tuple[int, tuple[int]] | None:
    """The dimensions of one input of the first convolution, and how many channels it has.

    None if there is no convolution, or one channel, which the module itself may add.
    """
    first = next((part for part in module.modules() if isinstance(part, CONVOLUTIONS)), None)
    if first is None or first.in_channels == 1:
        return None
    return len(first.kernel_size) + 1, (first.in_channels,)


def _positional(module: nn.Module) -> int:
    """Count the arguments that a forward pass must have; at least one."""
    inner: Any = module.module if isinstance(module, nn.DataParallel) else module
    try:
        parameters = inspect.signature(inner.forward).parameters.values()
    except ValueError:  # traced modules have no signature
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(sum(p.kind in kinds and p.default is p.empty for p in parameters), 1)


def _units(batch: Any, accepted: int | None, flat: bool) -> Iterator[Arguments]:
    """Cut a batch into samples, of its first ``accepted`` entries or of all.

    For networks that are ``flat``, a tensor of three dimensions is a batch and not a picture.
    """
    batch = tree.tree_map_only(np.ndarray, lambda array: torch.from_numpy(np.ascontiguousarray(array)), batch)
    if isinstance(batch, Mapping):
        yield from _cut(((), dict(batch)))
    elif isinstance(batch, torch.Tensor):
        yield from _cut(((batch,), {}))
    elif isinstance(batch, tuple | list) and batch:
        pictures = batch[0] if isinstance(batch[0], tuple | list) else batch
        listed = isinstance(batch, list) or pictures is not batch  # a tuple is of arguments
        are_pictures = all(isinstance(picture, torch.Tensor) and picture.ndim == 3 for picture in pictures)
        if listed and pictures and not flat and are_pictures:
            yield from ((([picture],), {}) for picture in pictures)
            return
        if accepted is not None:  # labels need not be tensors
            batch = batch[:accepted] if all(isinstance(e, torch.Tensor) for e in batch[1:]) else batch[:1]
        yield from _cut((tuple(batch), {}))
    else:
        raise TypeError(f"a {type(batch).__name__} cannot be run; give tensors, tuples or mappings of them")


def _cut(batch: Arguments) -> Iterator[Arguments]:
    tensors = [leaf for leaf in tree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise TypeError("there is no tensor in it")
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensors}
    if len(sizes) > 1 or 0 in sizes:
        yield batch  # which tensors hold one entry per sample is not clear
        return
    for index in range(sizes.pop()):
        yield tree.tree_map_only(torch.Tensor, itemgetter(slice(index, index + 1)), batch)


def _kind(leaf: Any) -> Any:
    """What must be equal in all samples for several to be run at once."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else ()


def to_numpy(tensor: torch.Tensor) -> Any:
    """Convert a tensor of any type, on any device, to a contiguous array."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.ascontiguousarray(tensor.cpu().numpy())
