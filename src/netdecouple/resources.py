"""What a run may use: where it keeps what it has found, and how much memory it takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from netdecouple.checkpoint import NOWHERE, Checkpoint

DEFAULT_MEMORY = 5 << 30  # bytes, for what grows with the inputs and the layers; models come on top


@dataclass(frozen=True)
class Resources:
    """What a run may use. None of it changes the result by more than rounding.

    Args:
        work: a folder for what has been found so far. A run that was ended by whatever it may be, started
            again with the same folder, goes on, and ends with the same bytes.
    """

    work: str | os.PathLike[str] | None = None
    checkpoint: Checkpoint = field(default=NOWHERE, repr=False, compare=False)  # opened in ``work``

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[Resources]:
        """The same, while the work folder is open for the run that ``identity`` describes.

        Raises:
            OutputError: it cannot be written, is in use, or is another run's.
        """
        checkpoint = Checkpoint(self.work, identity)
        try:
            yield replace(self, checkpoint=checkpoint)
        finally:
            checkpoint.close()

    @property
    def moment_bytes(self) -> int:
        """Of moments held at once."""
        return DEFAULT_MEMORY // 4

    @property
    def row_bytes(self) -> int:
        """Of a layer's moments that gets one sample per image: too few for so many inputs."""
        return self.moment_bytes // 4

    @property
    def store_bytes(self) -> int:
        """Of targets, and of live tensors, that are held in memory; the rest goes to disk."""
        return DEFAULT_MEMORY // 5

    @property
    def batch_bytes(self) -> int:
        """Of activations that are made at once."""
        return DEFAULT_MEMORY // 20
