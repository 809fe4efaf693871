"""The machine that a result was computed or measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """Describe this machine's processor, by the name it gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{platform.machine()} {model}, {os.cpu_count()} cores"
