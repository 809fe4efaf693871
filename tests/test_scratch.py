"""Temporary folders and results in the making."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from netdecouple.scratch import Scratch

ABANDONED = """
import os, sys
from pathlib import Path
from netdecouple import scratch

here = Path(sys.argv[1])
held = [scratch.Scratch(), scratch.Scratch(beside=here)]
(Path(held[1].name) / "half").write_text("ha")
with scratch.publishing(here / "whole"):
    (here / "whole").write_text("all of it")
try:
    with scratch.publishing(here / "failed"):
        raise OSError
except OSError:
    pass
print(*scratch.abandon(), *(os.path.exists(folder.name) for folder in held), sep="\\n")
print(scratch._lock.locked())
os._exit(0)
"""


def test_folders_lie_where_they_are_wanted_and_go(tmp_path: Path):
    """Beside what is to be renamed, with a name that nobody lists; else among the system's."""
    with Scratch(beside=tmp_path) as folder:
        assert Path(folder).parent == tmp_path
        assert Path(folder).name.startswith(".netdecouple-")
    assert not list(tmp_path.iterdir())
    with Scratch() as folder:
        assert Path(folder).parent != tmp_path


def test_abandoning_removes_folders_and_tells_what_was_written(tmp_path: Path):
    """And nothing is written afterwards: whoever wants to waits for ever."""
    command = [sys.executable, "-c", ABANDONED, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [str(tmp_path / "whole"), "False", "False", "True"]
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
