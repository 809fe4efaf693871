"""Write reports to files, each complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch, check_writable, publishing, unwritable
from netdecouple.report.html import report_html
from netdecouple.report.model import Report

ENDINGS = (".html", ".json")


def report_ending(path: str | os.PathLike[str]) -> str:
    """Return the ending of a report's path, which decides the format.

    Raises:
        OutputError: the ending is neither .html nor .json.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise OutputError(f"{path}: reports are written as .html or .json; choose a name that ends so")
    return ending


def rendered(report: Report, path: str | os.PathLike[str]) -> str:
    """Return the report as a page or as JSON, as the ending of ``path`` says.

    Raises:
        OutputError: the ending is neither .html nor .json.
    """
    return report_html(report) if report_ending(path) == ".html" else report.to_json()


def save_report(
    report: Report, path: str | os.PathLike[str], timed: Callable[[], Report] | None = None
) -> None:
    """Write a report as .html or .json, as the path ends.

    Args:
        report: the report.
        path: the file to write.
        timed: measures times and returns the report with them; called for a page if the report has none.

    Raises:
        OutputError: the ending is neither .html nor .json, or the file cannot be written.
    """
    if timed is not None and report_ending(path) == ".html" and not (report.benchmark or report.not_timed):
        report = timed()
    write_text(path, rendered(report, path))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in one step.

    Raises:
        OutputError: the file cannot be written.
    """
    target = check_writable(path)
    try:
        with Scratch(parent=target.parent) as folder:
            partial = Path(folder) / target.name
            # file names in the text may hold bytes that are not Unicode
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
            with publishing(path):
                os.replace(partial, target)
    except OSError as error:
        raise unwritable(path, error) from error
