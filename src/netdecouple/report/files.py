"""Writing reports to files, all of one or nothing."""

from __future__ import annotations

import os
from pathlib import Path

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch, check_writable, publishing, unwritable

ENDINGS = (".html", ".json")


def report_ending(path: str | os.PathLike[str]) -> str:
    """How a report's path ends, which says what it is written as.

    Raises:
        OutputError: reports are not written so.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise OutputError(f"{path}: reports are written as .html or .json; let the name end so")
    return ending


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in one step.

    Raises:
        OutputError: the place is not writable, or no place for a file.
    """
    target = check_writable(path)
    try:
        with Scratch(parent=target.parent) as folder:
            partial = Path(folder) / target.name
            # names of files may hold bytes that are no text
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
            with publishing(path):
                os.replace(partial, target)
    except OSError as error:
        raise unwritable(path, error) from error
