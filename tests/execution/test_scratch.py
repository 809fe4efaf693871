"""Temporary folders, and results before they have their final name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from netdecouple.errors import OutputError
from netdecouple.execution.scratch import Scratch, check_writable
from netdecouple.frontends.onnx.model import write_model
from netdecouple.report.files import write_text
from tests import networks

ABANDONED = """
import os, sys, threading
from pathlib import Path
from netdecouple.execution import scratch

here = Path(sys.argv[1])
held = [scratch.Scratch(), scratch.Scratch(parent=here)]
(Path(held[1].name) / "half").write_text("ha")
with scratch.publishing(here / "whole"):
    (here / "whole").write_text("all of it")
try:
    with scratch.publishing(here / "failed"):
        raise OSError
except OSError:
    pass
print(*scratch.abandon(), *(os.path.exists(folder.name) for folder in held), sep="\\n")
writer = threading.Thread(target=scratch.Scratch, daemon=True)
writer.start()
writer.join(0.3)
print(writer.is_alive())
os._exit(0)
"""


def test_folders_are_created_where_asked_and_removed(tmp_path: Path):
    """Hidden ones in a given folder; otherwise where the system puts temporary files."""
    with Scratch(parent=tmp_path) as folder:
        assert Path(folder).parent == tmp_path
        assert Path(folder).name.startswith(".netdecouple-")
    assert not list(tmp_path.iterdir())
    with Scratch() as folder:
        assert Path(folder).parent != tmp_path


def test_abandoning_removes_folders_and_returns_what_was_written(tmp_path: Path):
    """And nothing is written afterwards: writers wait for ever."""
    command = [sys.executable, "-c", ABANDONED, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [str(tmp_path / "whole"), "False", "False", "True"]
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("place", ["folder", "missing/out.onnx", "file/out.onnx", "pipe", "n" * 300])
def test_places_that_cannot_be_written_are_refused(tmp_path: Path, place: str):
    """Folders, missing folders, devices and impossible names, each in one line that names the place."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError) as caught:
        check_writable(tmp_path / place)
    assert place in str(caught.value)
    assert "\n" not in str(caught.value)


WRITERS = (lambda path: write_text(path, "text"), lambda path: write_model(networks.classifier(), path))


@pytest.mark.parametrize("write", WRITERS, ids=["text", "model"])
@pytest.mark.parametrize("exists", [True, False])
def test_links_stay_and_lead_to_what_was_written(tmp_path: Path, write, exists: bool):
    """What a link leads to is replaced, not the link."""
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "file"
    if exists:
        target.write_text("old")
    link = tmp_path / "link.onnx"
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.read_bytes() not in (b"", b"old")
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("write", WRITERS, ids=["text", "model"])
@pytest.mark.parametrize("name", ["pipe", "link"])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, write, name: str):
    """Neither itself nor a link to it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(OutputError, match=f"{name}: is a device or a pipe"):
        write(tmp_path / name)
    assert (tmp_path / "link").is_fifo()
    assert (tmp_path / "link").is_symlink()


def test_links_out_of_reach_are_refused_before_the_work(tmp_path: Path):
    """It is the folder that a link leads to that must be there."""
    (tmp_path / "link").symlink_to("missing/file")
    with pytest.raises(OutputError, match="link: cannot write there"):
        check_writable(tmp_path / "link")
