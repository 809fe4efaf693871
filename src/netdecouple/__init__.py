"""Make pretrained convolutional networks faster without training, by network decoupling."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from netdecouple.version import __version__

if TYPE_CHECKING:
    from netdecouple import kernels, runtimes
    from netdecouple.api import Result
    from netdecouple.data.preprocessing import Preprocessing
    from netdecouple.doors import apply_plan, decouple, load, save, sweep
    from netdecouple.errors import NetDecoupleError
    from netdecouple.execution.run import Resources
    from netdecouple.planning.analysis import Settings
    from netdecouple.planning.plan import Plan
    from netdecouple.report.sweep import Sweep

__all__ = [
    "NetDecoupleError",
    "Plan",
    "Preprocessing",
    "Resources",
    "Result",
    "Settings",
    "Sweep",
    "__version__",
    "apply_plan",
    "decouple",
    "kernels",
    "load",
    "runtimes",
    "save",
    "sweep",
]

# imported when first asked for, so that the command line is there for Ctrl-C from the first moment
_HOMES = {
    "NetDecoupleError": "errors",
    "Plan": "planning.plan",
    "Preprocessing": "data.preprocessing",
    "Resources": "execution.run",
    "Result": "api",
    "Settings": "planning.analysis",
    "Sweep": "report.sweep",
    "apply_plan": "doors",
    "decouple": "doors",
    "load": "doors",
    "save": "doors",
    "sweep": "doors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in ("kernels", "runtimes"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
