"""How large an input may be: beyond these sizes it is taken for a mistake, or for malice, and refused.

Each limit is an environment variable, a whole number, that every front door heeds. They never change a
result: what is within them comes out the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from netdecouple.errors import NetDecoupleError

GB = 10**9


@dataclass(frozen=True)
class Limit:
    """One limit, its default, and what it is counted in."""

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The limit that holds now.

        Raises:
            NetDecoupleError: the variable is set to something else than a positive whole number.
        """
        text = os.environ.get(self.variable)
        if text is None:
            return self.default
        if not (text.isascii() and text.isdigit() and int(text[:30]) > 0):
            raise NetDecoupleError(
                f"{self.variable}={text!r:.40}: give a positive whole number of {self.unit}"
            )
        return int(text[:30])

    def check(self, found: int, what: str, error: type[NetDecoupleError]) -> None:
        """Raise ``error`` if ``what`` is larger than this limit."""
        if found > self.value:
            raise error(
                f"{what} takes {found:,} {self.unit}, the limit is {self.value:,}; "
                f"set {self.variable} if that is meant"
            )


MODEL_BYTES = Limit("NETDECOUPLE_MAX_MODEL_BYTES", 32 * GB, "bytes")  # of a model, with the weights beside it
TENSOR_BYTES = Limit("NETDECOUPLE_MAX_TENSOR_BYTES", 8 * GB, "bytes")  # of one tensor inside the network
SAMPLE_BYTES = Limit("NETDECOUPLE_MAX_SAMPLE_BYTES", 32 * GB, "bytes")  # of inputs, unpacked and prepared
PIXELS = Limit("NETDECOUPLE_MAX_PIXELS", 100_000_000, "pixels")  # of one picture
TEXT_BYTES = Limit("NETDECOUPLE_MAX_TEXT_BYTES", 100_000_000, "bytes")  # of a plan or a description
ALL = (MODEL_BYTES, TENSOR_BYTES, SAMPLE_BYTES, PIXELS, TEXT_BYTES)
