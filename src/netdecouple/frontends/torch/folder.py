"""A decoupled module in a folder: its weights, and how to rebuild it around them. Nothing is pickled.

The layout is Hugging Face's: ``model.safetensors`` next to a description in JSON. The plan and the report in
the description are plain JSON values; callers convert them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netdecouple import records
from netdecouple.convolution import ConvGeometry, Structure
from netdecouple.errors import ModelError, OutputError, PlanError, first_line
from netdecouple.execution import limits
from netdecouple.execution.scratch import Scratch, publishing
from netdecouple.frontends.torch.convolutions import (
    CONVOLUTIONS,
    LAYERS,
    MODES,
    Convolution,
    Factorized,
    Gather,
)
from netdecouple.frontends.torch.replacement import duplicate, install
from netdecouple.version import __version__

VERSION = 1
DESCRIPTION, WEIGHTS, SHARDS = "netdecouple.json", "model.safetensors", "model.safetensors.index.json"
FILES = (
    *(".pt", ".pth", ".pt2", ".safetensors", ".bin", ".ckpt", ".pkl", ".onnx", ".ort", ".tflite"),
    *(".pb", ".h5", ".keras", ".xml", ".mlmodel", ".mlpackage", ".engine", ".npz", ".zip"),
)  # endings of networks that are files
State = dict[str, torch.Tensor]
Json = dict[str, Any]
# From a plan: the layers that it changes, in order, and each one's structure by its geometry
Structures = Callable[[Json], Mapping[str, Callable[[ConvGeometry], Structure]]]


class Saved(NamedTuple):
    """What a folder holds, with the module rebuilt."""

    module: nn.Module
    plan: Json
    report: Json | None  # None: it was written by another version of netdecouple, or there was none
    norms: dict[str, str]  # layer → the BatchNorm folded into it


@dataclass(frozen=True, kw_only=True)
class Change:
    """What the plan does not contain about a layer that it changes."""

    name: str
    convolution: Convolution  # as it ran
    selects: tuple[int, ...]  # the stages that read a selection of channels
    norm: str  # the BatchNorm folded into the layer; empty if there was none


@dataclass(frozen=True, kw_only=True)
class Description:
    """What netdecouple.json holds, apart from the plan and the report."""

    version: int
    netdecouple: str
    changes: tuple[Change, ...]
    tied: tuple[tuple[str, str], ...]  # names in the state for a tensor that is written under another name


def write(module: nn.Module, decoupling: Any, folder: str | os.PathLike[str]) -> None:
    """Write a decoupled module, with its `Decoupling`, into a new folder, completely or not at all.

    The folder may hold what an earlier call wrote, which is replaced.

    Raises:
        OutputError: the folder cannot be written, or holds other files.
        ModelError: the module was changed after decoupling, or its state is more than tensors.
    """
    plan, report, norms = decoupling.plan, decoupling.report, decoupling.norms
    target = Path(folder).resolve()
    state, tied = _written(module.state_dict())
    changes = tuple(_change(module, row.name, norms.get(row.name, "")) for row in plan.layers if row.changed)
    description = Description(version=VERSION, netdecouple=__version__, changes=changes, tied=tied)
    data = asdict(description) | {
        "report": None if report is None else json.loads(report.to_json()),
        "plan": json.loads(plan.to_json()),
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    try:
        check_replaceable(target)
        with Scratch(parent=target.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            (new / DESCRIPTION).write_text(text, encoding="utf-8")
            save_file(state, new / WEIGHTS, metadata={"format": "pt"})
            if limits.read_text(new / DESCRIPTION) != text or not _equal(_weights(new), state):
                raise ModelError(f"{target}: reading back gave other data than written; choose another place")
            with publishing(folder):
                _put(new, target, Path(scratch) / "old")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"{target}: cannot write there ({reason}); choose another place") from error


def read(module: nn.Module, folder: str | os.PathLike[str], structures: Structures) -> Saved:
    """Decouple a copy of the original module as the one in a folder was, and load its weights.

    Modes, types, devices and ``requires_grad`` are those of ``module``.

    Args:
        module: built as the original was; its weights do not matter.
        folder: that `write` wrote.
        structures: makes the layers' structures out of the plan; may raise PlanError. The functions in its
            result raise ValueError for a geometry that they do not fit.

    Raises:
        PlanError: the description is missing, damaged, or of another version.
        ModelError: the weights are missing or damaged, or of another module than ``module``.
    """
    folder = Path(folder)
    plan, report, description = _described(folder / DESCRIPTION)
    by_layer = structures(plan)
    if list(by_layer) != [change.name for change in description.changes]:
        raise PlanError(f"{folder / DESCRIPTION}: its plan and its changes differ; save the module again")
    state = _weights(folder)
    state |= {name: state[other] for name, other in description.tied if other in state}
    new = duplicate(module)
    for change in description.changes:
        new = _rebuilt(new, change, _structure(change, by_layer[change.name], folder))
    _fill(new, state, folder)
    for change in description.changes:
        _check_channels(new.get_submodule(change.name), change.name)
    norms = {change.name: change.norm for change in description.changes if change.norm}
    return Saved(new, plan, report, norms)


def _change(module: nn.Module, name: str, norm: str) -> Change:
    layer = dict(module.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(layer, Factorized):
        raise ModelError(f"layer {name!r} is not what decoupling made of it; it cannot be saved")
    return Change(name=name, convolution=layer.convolution, selects=layer.selects, norm=norm)


def _written(state: Mapping[str, Any]) -> tuple[State, tuple[tuple[str, str], ...]]:
    """Copy every tensor once; return the other names of tensors that have several, too."""
    kept: State = {}
    tied = []
    names: dict[Any, str] = {}  # a tensor's first name
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
            kind = "not a tensor" if not isinstance(value, torch.Tensor) else "a tensor without plain numbers"
            raise ModelError(f"{name!r} in the module's state is {kind}; it cannot be saved")
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        same = names.setdefault(place, name) if value.numel() else name
        if same != name:
            tied.append((name, same))
        else:
            kept[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept, tuple(tied)


def check_replaceable(target: Path) -> None:
    """Check that a folder holds nothing but what `write` wrote there earlier; only that is ever replaced.

    Raises:
        OutputError: it is a file or named like one, the current folder, or holds other files.
    """
    if not os.path.exists(target):
        if target.suffix.lower() in FILES:
            raise OutputError(
                f"{target}: PyTorch models are written as .onnx or as a folder; leave out {target.suffix}"
            )
        return
    if not os.path.isdir(target):
        raise OutputError(f"{target}: is a file; give the name of a folder")
    if os.path.samefile(target, os.curdir):
        raise OutputError(f"{target}: is the current folder; give the name of a new folder")
    names = {path.name for path in target.iterdir()}
    others = names - {DESCRIPTION, WEIGHTS} if DESCRIPTION in names else names
    if others:
        raise OutputError(f"{target}: holds other files ({min(others)}); give the name of a new folder")


def _put(new: Path, target: Path, old: Path) -> None:
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise


def _equal(one: State, other: State) -> bool:
    """Whether two states are the same, bit by bit."""
    return one.keys() == other.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))
        for a, b in ((one[name], other[name]) for name in one)
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _described(path: Path) -> tuple[Json, Json | None, Description]:
    """The plan, the report and the rest of a description."""
    try:
        data = json.loads(limits.read_text(path))
    except PlanError:  # it is too large
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: cannot read it ({first_line(error)}); save the module again") from error
    if not isinstance(data, dict) or not {"version", "plan", "report", "netdecouple"} <= data.keys():
        raise PlanError(f"{path}: does not describe a decoupled module; save the module again")
    if data["version"] != VERSION:
        raise PlanError(f"{path}: version {data['version']!r:.20}, this netdecouple reads {VERSION}")
    plan, report = data.pop("plan"), data.pop("report")
    try:
        description = records.read(Description, data, signed=True)
    except ValueError as error:
        raise PlanError(f"{path}: {error}; save the module again") from error
    # the format of reports differs between versions
    return plan, report if description.netdecouple == __version__ else None, description


def _weights(folder: Path) -> State:
    path, names = folder / WEIGHTS, [WEIGHTS]
    state: State = {}
    try:
        if not os.path.exists(path) and os.path.exists(folder / SHARDS):
            path = folder / SHARDS
            names = sorted(set(json.loads(limits.read_text(path))["weight_map"].values()))
        for name in names:
            path = folder / Path(name).name  # never outside the folder
            state |= load_file(path)
    except PlanError:  # it is too large
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(f"{path}: cannot read the weights ({reason}); save the module again") from error
    return state


def _structure(change: Change, of: Callable[[ConvGeometry], Structure], folder: Path) -> Structure:
    c = change.convolution
    try:
        lengths = {len(values) for values in (c.kernel, c.strides, c.before, c.after, c.dilations)}
        if c.mode not in MODES or len(lengths) > 1:
            raise ValueError("its convolution is not a valid one")
        structure = of(c.geometry)
    except ValueError as error:
        raise PlanError(f"{folder}: layer {change.name!r}: {error}; save the module again") from error
    # the weights file holds which channels they are
    channels = (
        np.zeros(stage.n_i, np.int64) if index in change.selects else None
        for index, stage in enumerate(structure.stages)
    )
    return replace(structure, channels=tuple(channels))


def _rebuilt(root: nn.Module, change: Change, structure: Structure) -> nn.Module:
    """Put the stages in the layer's place, and remove the BatchNorm that is folded into them."""
    old = _part(root, change.name)
    if not isinstance(old, LAYERS) or not _fits(old, change.convolution):
        kind = _shown(Convolution.of(old)) if isinstance(old, LAYERS) else type(old).__name__
        raise ModelError(
            f"layer {change.name!r} is {kind}, not the {_shown(change.convolution)} that was decoupled; "
            "give the original module"
        )
    if change.norm and not isinstance(_part(root, change.norm), _BatchNorm):
        raise ModelError(f"{change.norm!r} is not the BatchNorm that it was; give the original module")
    return install(root, change.name, Factorized(change.convolution, structure), change.norm)


def _part(root: nn.Module, name: str) -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the module has no {name!r}; give the original module") from error


def _fits(module: nn.Module, convolution: Convolution) -> bool:
    """Whether a layer is what it was; a subclass may pad otherwise than its attributes say."""
    actual = Convolution.of(module)
    if type(module) not in CONVOLUTIONS:
        actual = replace(actual, before=convolution.before, after=convolution.after, mode=convolution.mode)
    return actual == convolution


def _shown(c: Convolution) -> str:
    kernel = "×".join(map(str, c.kernel))
    return " ".join(filter(None, (c.operator, f"{c.n_i}→{c.n_o}", kernel)))


def _fill(module: nn.Module, state: State, folder: Path) -> None:
    expected = module.state_dict()
    differences = [f"it has no {name!r}" for name in expected if name not in state]
    differences += [f"it has {name!r} as well" for name in state if name not in expected]
    differences += [
        f"its {name!r} is {_kind(state[name])}, not {_kind(value)}"
        for name, value in expected.items()
        if name in state and _kind(value) != _kind(state[name])
    ]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise ModelError(f"{folder} is of another module: {differences[0]}{more}; give the original module")
    expected.update(state)  # the same names; it carries the versions that some modules check
    module.load_state_dict(expected)


def _kind(tensor: torch.Tensor) -> str:
    """What must be equal: the shape, and whether the numbers are whole."""
    return f"{list(tensor.shape)} {'floating' if tensor.is_floating_point() else 'whole'}"


def _check_channels(module: Any, name: str) -> None:
    """Refuse channels that do not exist: on some devices that would go unnoticed."""
    count = module.geometry.n_i
    for part in module:
        if isinstance(part, Gather) and not bool(((part.channels >= 0) & (part.channels < count)).all()):
            raise ModelError(f"layer {name!r} reads channels that are not there; save the module again")
        if isinstance(part, LAYERS):
            count = Convolution.of(part).n_o
