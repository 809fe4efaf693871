"""Write reports to files, each complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch, check_writable, publishing, unwritable
from netdecouple.report.html import report_html, sweep_html
from netdecouple.report.model import Report
from netdecouple.report.sweep import Sweep

ENDINGS = (".html", ".json")


def report_ending(path: str | os.PathLike[str]) -> str:
    """Return the ending of a report's path, which decides the format; refuse all but .html and .json."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise OutputError(f"{path}: reports are written as .html or .json; choose a name that ends so")
    return ending


def rendered(report: Report | Sweep, path: str | os.PathLike[str]) -> str:
    """Return a report or a sweep as a page or as JSON, as the ending of ``path`` says."""
    if report_ending(path) == ".json":
        return report.to_json()
    return report_html(report) if isinstance(report, Report) else sweep_html(report)


def save_report(
    report: Report, path: str | os.PathLike[str], timed: Callable[[], Report] | None = None
) -> None:
    """Write a report as .html or .json, as the path ends; ``timed`` adds times to a page that has none."""
    if timed is not None and report_ending(path) == ".html" and not (report.benchmark or report.not_timed):
        report = timed()
    write_text(path, rendered(report, path))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in one step."""
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
