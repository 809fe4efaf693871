"""A decoupled module in a folder: its weights, and how to rebuild it around them. Nothing is pickled.

The layout is Hugging Face's: ``model.safetensors`` beside a description in JSON.
"""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netdecouple import records
from netdecouple.convolution import Structure
from netdecouple.errors import ModelError, OutputError, PlanError
from netdecouple.execution import limits
from netdecouple.execution.scratch import Scratch, publishing
from netdecouple.families.chain import method
from netdecouple.frontends.torch.convolutions import KINDS, LAYERS, MODES, Convolution, Factorized, Gather
from netdecouple.frontends.torch.replacement import duplicate, first_line, install
from netdecouple.planning.plan import LayerPlan, Plan
from netdecouple.report.report import Report
from netdecouple.version import __version__

VERSION = 1
DESCRIPTION, WEIGHTS, SHARDS = "netdecouple.json", "model.safetensors", "model.safetensors.index.json"
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Decoupling:
    """What was done to a module, and what it gained and lost; its ``decoupling`` attribute."""

    plan: Plan
    report: Report | None  # None: it was saved by another version of netdecouple
    norms: dict[str, str]  # BatchNorms that changed layers have taken in


@dataclass(frozen=True)
class Change:
    """What the plan does not say about a layer that it changes."""

    name: str
    convolution: Convolution  # as running it showed it to be
    selects: tuple[int, ...]  # the stages that read a selection of channels
    norm: str  # the BatchNorm that the layer has taken in; empty if there was none


@dataclass(frozen=True)
class Description:
    """What netdecouple.json holds, besides the plan."""

    version: int
    netdecouple: str
    changes: tuple[Change, ...]
    tied: tuple[tuple[str, str], ...]  # names in the state that mean a tensor written under another one
    report: Report | None


def write(module: nn.Module, decoupling: Decoupling, folder: str | os.PathLike[str]) -> None:
    """Write a decoupled module into a folder of its own, all at once or not at all.

    Raises:
        OutputError: the folder cannot be written, or holds something else.
        ModelError: the module was changed since, or its state is more than tensors.
    """
    target = Path(folder).resolve()
    state, tied = _written(module.state_dict())
    changes = tuple(_changes(module, decoupling))
    report = None if decoupling.report is None else decoupling.report.without_pictures
    description = Description(VERSION, __version__, changes, tied, report)
    text = json.dumps(asdict(description) | {"plan": asdict(decoupling.plan)}, indent=1, ensure_ascii=False)
    try:
        check_replaceable(target)
        with Scratch(parent=target.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            (new / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
            save_file(state, new / WEIGHTS, metadata={"format": "pt"})
            if _described(new / DESCRIPTION) != (decoupling.plan, description) or not _equal(
                _weights(new), state
            ):
                raise ModelError(f"{target}: something else once written; choose another place")
            with publishing(folder):
                _put(new, target, Path(scratch) / "old")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"{target}: cannot write there ({reason}); choose another place") from error


def read(module: nn.Module, folder: str | os.PathLike[str]) -> tuple[nn.Module, Decoupling]:
    """Decouple a copy of the original module as the one in a folder was, and give it that one's numbers.

    Modes, types, devices and whether gradients are wanted are those of the module given.

    Raises:
        PlanError: the description is missing, damaged, or of another version.
        ModelError: the weights are missing or damaged, or of another module than the one given.
    """
    folder = Path(folder)
    plan, description = _described(folder / DESCRIPTION)
    rows = {row.name: row for row in plan.layers if row.changed}
    if list(rows) != [change.name for change in description.changes]:
        raise PlanError(f"{folder / DESCRIPTION}: its plan and its changes differ; save the module again")
    state = _weights(folder)
    state |= {name: state[other] for name, other in description.tied if other in state}
    new = duplicate(module)
    for change in description.changes:
        new = _rebuilt(new, change, _structure(change, rows[change.name], folder))
    _fill(new, state, folder)
    for change in description.changes:
        _check_channels(new.get_submodule(change.name), change.name)
    norms = {change.name: change.norm for change in description.changes if change.norm}
    return new, Decoupling(plan, description.report, norms)


def _changes(module: nn.Module, decoupling: Decoupling) -> Iterator[Change]:
    for row in decoupling.plan.layers:
        if not row.changed:
            continue
        try:
            layer = module.get_submodule(row.name)
        except AttributeError:
            layer = None
        if not isinstance(layer, Factorized):
            raise ModelError(f"layer {row.name!r} is not what decoupling made of it; it cannot be saved")
        yield Change(row.name, layer.convolution, layer.selects, decoupling.norms.get(row.name, ""))


def _written(state: Mapping[str, Any]) -> tuple[State, tuple[tuple[str, str], ...]]:
    """Every tensor once, by itself in memory; and the names that mean the same as one of them."""
    kept: State = {}
    tied = []
    first: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
            kind = "not a tensor" if not isinstance(value, torch.Tensor) else "a tensor without plain numbers"
            raise ModelError(f"{name!r} in the module's state is {kind}; it cannot be saved")
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        same = first.setdefault(place, name) if value.numel() else name
        if same != name:
            tied.append((name, same))
        else:
            kept[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return kept, tuple(tied)


def check_replaceable(target: Path) -> None:
    """Nothing but what an earlier call wrote is ever removed.

    Raises:
        OutputError: something else is there.
    """
    if os.path.exists(target) and not os.path.isdir(target):
        raise OutputError(f"{target}: is a file; give the name of a folder")
    if os.path.exists(target) and os.path.samefile(target, os.curdir):  # who works there would lose it
        raise OutputError(f"{target}: is the current folder; give the name of a new folder")
    names = {path.name for path in target.iterdir()} if os.path.exists(target) else set()
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


def _described(path: Path) -> tuple[Plan, Description]:
    try:
        data = json.loads(limits.read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: cannot read it ({first_line(error)}); save the module again") from error
    if not isinstance(data, dict) or not {"version", "plan", "netdecouple"} <= data.keys():
        raise PlanError(f"{path}: does not describe a decoupled module; save the module again")
    if data["version"] != VERSION:
        raise PlanError(f"{path}: version {data['version']!r:.20}, this netdecouple reads {VERSION}")
    plan = Plan.from_json(json.dumps(data.pop("plan")), str(path))
    if data["netdecouple"] != __version__:  # reports are to be read by people, and change
        data["report"] = None
    try:
        return plan, records.read(Description, data, signed=True)
    except ValueError as error:
        raise PlanError(f"{path}: {error}; save the module again") from error


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
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ModelError(f"{path}: cannot read the weights ({reason}); save the module again") from error
    return state


def _structure(change: Change, row: LayerPlan, folder: Path) -> Structure:
    c = change.convolution
    try:
        if c.mode not in MODES or len({len(v) for v in _per_dimension(c)}) != 1:
            raise ValueError("its convolution is none")
        structure = method(row.family).structure(c.geometry, row.steps)
    except ValueError as error:
        raise PlanError(f"{folder}: layer {row.name!r}: {error}; save the module again") from error
    # which channels they are is with the weights
    channels = (
        np.zeros(stage.n_i, np.int64) if index in change.selects else None
        for index, stage in enumerate(structure.stages)
    )
    return replace(structure, channels=tuple(channels))


def _per_dimension(c: Convolution) -> Iterable[tuple[int, ...]]:
    return (c.kernel, *((c.strides, c.before, c.after, c.dilations) if c.kernel else ()))


def _rebuilt(root: nn.Module, change: Change, structure: Structure) -> nn.Module:
    """Put the stages in the layer's place, and take the BatchNorm out that is in their numbers."""
    old = _part(root, change.name)
    if not isinstance(old, LAYERS) or not _fits(old, change.convolution):
        found = _shown(Convolution.of(old)) if isinstance(old, LAYERS) else type(old).__name__
        raise ModelError(
            f"layer {change.name!r} is {found}, not the {_shown(change.convolution)} that was decoupled; "
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
    """Whether a layer is what it was; how a subclass pads, only running it shows."""
    own = Convolution.of(module)
    if type(module) not in KINDS:
        own = replace(own, before=convolution.before, after=convolution.after, mode=convolution.mode)
    return own == convolution


def _shown(c: Convolution) -> str:
    kernel = "×".join(map(str, c.kernel))
    return " ".join(filter(None, (c.operator, f"{c.n_i}→{c.n_o}", kernel)))


def _fill(module: nn.Module, state: State, folder: Path) -> None:
    wanted = module.state_dict()
    differences = [f"it has no {name!r}" for name in wanted if name not in state]
    differences += [f"it has {name!r} as well" for name in state if name not in wanted]
    differences += [
        f"its {name!r} is {_kind(state[name])}, not {_kind(value)}"
        for name, value in wanted.items()
        if name in state and _kind(value) != _kind(state[name])
    ]
    if differences:
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise ModelError(f"{folder} is of another module: {differences[0]}{more}; give the original module")
    wanted.update(state)  # the same names; it carries the versions that some modules ask for
    module.load_state_dict(wanted)


def _kind(tensor: torch.Tensor) -> str:
    """What may not differ: the shape, and whether the numbers are whole."""
    return f"{list(tensor.shape)} {'floating' if tensor.is_floating_point() else 'whole'}"


def _check_channels(module: Any, name: str) -> None:
    """Refuse channels that are not there: on some devices that would go unnoticed."""
    count = module.geometry.n_i
    for part in module:
        if isinstance(part, Gather):
            if not bool(((part.channels >= 0) & (part.channels < count)).all()):
                raise ModelError(f"layer {name!r} reads channels that are not there; save the module again")
        elif isinstance(part, LAYERS):
            count = Convolution.of(part).n_o
