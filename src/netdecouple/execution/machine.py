"""The processor of this machine, by name."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """Return this machine's architecture, processor name and number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{platform.machine()} {model}, {os.cpu_count()} cores"
