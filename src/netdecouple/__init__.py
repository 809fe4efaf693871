"""Make pretrained convolutional networks faster without training, by network decoupling."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from netdecouple.version import __version__

if TYPE_CHECKING:
    from netdecouple import kernels, runtimes
    from netdecouple.api import (
        Result,
        apply_plan,
        bench,
        decouple,
        evaluate,
        inspect,
        load,
        open_model,
        save,
        sweep,
    )
    from netdecouple.data.preprocessing import Preprocessing
    from netdecouple.errors import NetDecoupleError
    from netdecouple.execution.run import Resources
    from netdecouple.planning.plan import Plan
    from netdecouple.planning.settings import Settings
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
    "bench",
    "decouple",
    "evaluate",
    "inspect",
    "kernels",
    "load",
    "open_model",
    "runtimes",
    "save",
    "sweep",
]

# imported at first use, so that the command line reacts to Ctrl-C from the first moment
_MODULES = {
    "NetDecoupleError": "errors",
    "Plan": "planning.plan",
    "Preprocessing": "data.preprocessing",
    "Resources": "execution.run",
    "Settings": "planning.settings",
    "Sweep": "report.sweep",
}


def __getattr__(name: str) -> Any:
    if name in ("kernels", "runtimes"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
