"""Errors a user can act on.

Every message is one line that names the layer or the file and says what to do. The command line
prints it and exits with code 2; nothing has been written by then.
"""


class NetDecoupleError(Exception):
    """Base of every error netdecouple raises on purpose."""


class ModelError(NetDecoupleError):
    """The network cannot be read, run, or decoupled."""


class CalibrationError(NetDecoupleError):
    """The calibration or evaluation data cannot be read or do not fit the network."""


class BudgetError(NetDecoupleError, ValueError):
    """The budget cannot be parsed or cannot be met; the message says what can."""


class QualityError(NetDecoupleError):
    """The outputs differ from the original's by more than was allowed; the message says by how much."""


class SpeedError(NetDecoupleError):
    """No network is faster than the original within what the outputs may change."""


class PlanError(NetDecoupleError, ValueError):
    """The plan file is malformed or was made for another network."""


class OutputError(NetDecoupleError):
    """A result cannot be written where it was asked for."""


class UnavailableError(NetDecoupleError):
    """A runtime is not known, or the package it needs is not installed."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """Shorten an error's message to its first line; those of runtimes run over several."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]
