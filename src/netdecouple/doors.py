"""One name for both front doors: ONNX models go to `api`, PyTorch modules to `modules`.

PyTorch is imported only where a module is given, or one is asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from netdecouple import api, curve
from netdecouple.api import Calibration, Result
from netdecouple.data import calibration
from netdecouple.errors import UnavailableError
from netdecouple.frontends.onnx.model import ModelSource
from netdecouple.planning.plan import Plan
from netdecouple.report.sweep import Sweep

if TYPE_CHECKING:
    from torch.nn import Module

LIBRARIES = ("torchvision", "timm")  # of PyTorch models


@overload
def decouple(model: ModelSource, calib: Calibration | None = None, **options: Any) -> Result: ...
@overload
def decouple(model: Module, calib: Iterable[Any], **options: Any) -> Module: ...
def decouple(model: Any, calib: Any = None, **options: Any) -> Any:
    """Decouple a network to a budget; the one given is not changed.

    An ONNX model, as a path or a ModelProto, gives a `Result`: see `api.decouple` for the options. A PyTorch
    module gives a new module: see `modules.decouple`.

    Raises:
        NetDecoupleError: one of its children, with one line that says what to do.
    """
    if _is_module(model):
        return _modules().decouple(model, calib, **options)
    return api.decouple(model, calib, **options)


@overload
def apply_plan(
    model: ModelSource, plan: Plan, calib: Calibration | None = None, **options: Any
) -> Result: ...
@overload
def apply_plan(model: Module, plan: Plan, calib: Iterable[Any], **options: Any) -> Module: ...
def apply_plan(model: Any, plan: Plan, calib: Any = None, **options: Any) -> Any:
    """Carry out a saved plan; see `api.apply_plan` and `modules.apply_plan`.

    Raises:
        PlanError: the plan is of another network or of other samples.
        NetDecoupleError: as in `decouple`.
    """
    if _is_module(model):
        return _modules().apply_plan(model, plan, calib, **options)
    return api.apply_plan(model, plan, calib, **options)


def sweep(model: Any, calib: Any = None, macs: Any = (), **options: Any) -> Sweep:
    """Decouple a network to several budgets, from one analysis, and find the best trade.

    For ONNX models, as a path or a ModelProto, see `curve.sweep`; for PyTorch modules `modules.sweep`.

    Raises:
        NetDecoupleError: as in `decouple`.
    """
    if _is_module(model):
        swept: Sweep = _modules().sweep(model, calib, macs, **options)
        return swept
    return curve.sweep(model, calib, macs, **options)


def save(module: Module, folder: str | os.PathLike[str]) -> None:
    """Write a decoupled PyTorch module's weights and plan into a folder; see `modules.save`."""
    _modules().save(module, folder)


def load(module: Module, folder: str | os.PathLike[str]) -> Module:
    """Make a decoupled PyTorch module again out of the original one; see `modules.load`."""
    return _modules().load(module, folder)


def _is_module(model: Any) -> bool:
    torch = sys.modules.get("torch")  # who has a module has imported it
    return torch is not None and isinstance(model, torch.nn.Module)


def is_named(model: str | os.PathLike[str]) -> bool:
    """Tell whether a source names a PyTorch model: torchvision:NAME, timm:NAME, or MODULE:FUNCTION."""
    text = os.fspath(model)
    library, _, name = text.partition(":")
    if Path(text).suffix == ".onnx" or os.path.exists(text) or not name:
        return False
    return library in LIBRARIES or calibration.names_function(text)


def named() -> Any:
    """The front door for PyTorch models that are named.

    Raises:
        UnavailableError: PyTorch is not installed.
    """
    return _imported("named")


def _modules() -> Any:
    return _imported("modules")


def _imported(door: str) -> Any:
    try:
        return importlib.import_module(f"netdecouple.{door}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "safetensors"):
            raise
        raise UnavailableError(
            f"PyTorch modules need torch and safetensors ({error}); pip install 'netdecouple[torch]'"
        ) from error
