"""Writing reports to files, all of one or nothing."""

from __future__ import annotations

import os
from pathlib import Path

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch, check_writable, publishing, unwritable
from netdecouple.report.html import report_html
from netdecouple.report.report import Report

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


def rendered(report: Report, path: str | os.PathLike[str]) -> str:
    """Return a report as .html or .json, by the ending of the path it goes to.

    Raises:
        OutputError: the path ends in something else.
    """
    return report_html(report) if report_ending(path) == ".html" else report.to_json()


def save_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report as .html or .json, by the ending, all of it or nothing.

    Raises:
        OutputError: the ending is another one, or the place is not writable.
    """
    write_text(path, rendered(report, path))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in one step.

    Raises:
        OutputError: the place is not writable, or no place for a file.
    """
    target = check_writable(path)
    try:
        with Scratch(beside=target.parent) as folder:
            partial = Path(folder) / target.name
            # names of files may hold bytes that are no text
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
            with publishing(path):
                os.replace(partial, target)
    except OSError as error:
        raise unwritable(path, error) from error
