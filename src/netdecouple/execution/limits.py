"""How large an input may be, and where links in it may lead. All else is taken for a mistake, or for malice.

Each limit can be set by an environment variable, a whole number, for the command line and the Python
functions. Limits never change a result.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from netdecouple.errors import NetDecoupleError, PlanError

GB = 10**9


def leads_elsewhere(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is, by way of links, one outside it.

    The ``blobs`` of a cache of the Hugging Face Hub belong to all folders in its ``snapshots``, which are
    made of links to them.
    """
    here = Path(os.path.abspath(folder))
    caches = [p.parent / "blobs" for p in (here, *here.parents) if p.name == "snapshots"]
    real = Path(os.path.realpath(path))
    return not any(real.is_relative_to(os.path.realpath(place)) for place in (here, *caches[:1]))


@dataclass(frozen=True)
class Limit:
    """One limit, its default, and its unit."""

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The limit, as it is set now; NetDecoupleError if the variable is not a positive whole number."""
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        if not (text.isascii() and text.isdigit() and int(text[:30]) > 0):
            raise NetDecoupleError(
                f"{self.variable}={text!r:.40}: give a positive whole number of {self.unit}"
            )
        return int(text[:30])

    def check(self, size: int, what: str, error: type[NetDecoupleError]) -> None:
        """Raise ``error`` if the ``size`` of ``what`` is beyond this limit."""
        if size > self.value:
            raise error(
                f"{what} takes {size:,} {self.unit}, the limit is {self.value:,}; "
                f"set {self.variable} if that is meant"
            )


MODEL_BYTES = Limit("NETDECOUPLE_MAX_MODEL_BYTES", 32 * GB, "bytes")  # of a model, external weights included
TENSOR_BYTES = Limit("NETDECOUPLE_MAX_TENSOR_BYTES", 8 * GB, "bytes")  # of one tensor in the network
SAMPLE_BYTES = Limit("NETDECOUPLE_MAX_SAMPLE_BYTES", 32 * GB, "bytes")  # of inputs, unpacked and prepared
PIXELS = Limit("NETDECOUPLE_MAX_PIXELS", 100_000_000, "pixels")  # of one image file
TEXT_BYTES = Limit("NETDECOUPLE_MAX_TEXT_BYTES", 100_000_000, "bytes")  # of a plan or a description
ALL = (MODEL_BYTES, TENSOR_BYTES, SAMPLE_BYTES, PIXELS, TEXT_BYTES)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file that is not larger than its limit.

    Raises:
        OSError: there is no such file, or it cannot be read.
        PlanError: it is too large.
        ValueError: it is not a file, or not UTF-8.
    """
    path = Path(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is a folder, a device or a pipe")
    TEXT_BYTES.check(path.stat().st_size, str(path), PlanError)
    return path.read_text(encoding="utf-8")
