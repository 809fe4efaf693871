"""One hostile input: some files, and the command that is given them."""

from __future__ import annotations

import base64
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """Files by their names relative to a working folder, symbolic links, pipes, and what reads them."""

    command: tuple[str, ...]  # of the command line, or of `worker.PYTHON`
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # name → what it points at
    pipes: tuple[str, ...] = ()
    sparse: dict[str, int] = field(default_factory=dict)  # name → size in bytes, with nothing in it

    def write(self, folder: Path) -> None:
        """Put everything into a folder."""
        for name, content in self.files.items():
            _parent(folder / name).write_bytes(content)
        for name, target in self.links.items():
            _parent(folder / name).symlink_to(target)
        for name in self.pipes:
            os.mkfifo(_parent(folder / name))
        for name, size in self.sparse.items():
            with open(_parent(folder / name), "r+b" if name in self.files else "wb") as file:
                file.truncate(size)

    def to_json(self) -> str:
        """The case as text, small enough to be kept."""
        packed = {
            name: base64.b85encode(zlib.compress(content, 9)).decode() for name, content in self.files.items()
        }
        data = {"command": self.command, "files": packed}
        more = {"links": self.links, "pipes": self.pipes, "sparse": self.sparse}
        return json.dumps(data | {key: value for key, value in more.items() if value}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """Read a kept case."""
        data = json.loads(text)
        files = {name: zlib.decompress(base64.b85decode(packed)) for name, packed in data["files"].items()}
        return cls(
            tuple(data["command"]),
            files,
            data.get("links", {}),
            tuple(data.get("pipes", ())),
            data.get("sparse", {}),
        )


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
