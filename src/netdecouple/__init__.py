"""Make pretrained convolutional networks faster without training, by network decoupling."""

from netdecouple.api import Result
from netdecouple.calibration import Preprocessing
from netdecouple.doors import apply_plan, decouple, load, save, sweep
from netdecouple.errors import NetDecoupleError
from netdecouple.planning.analysis import Settings
from netdecouple.planning.plan import Plan
from netdecouple.version import __version__

__all__ = [
    "NetDecoupleError",
    "Plan",
    "Preprocessing",
    "Result",
    "Settings",
    "__version__",
    "apply_plan",
    "decouple",
    "load",
    "save",
    "sweep",
]
