"""A process that has imported the command line, and forks for each command: none waits for imports.

The copies begin and end as ``python -m netdecouple`` does, with standard streams of their own
that are flushed at the end.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Prepared:
    """The parent's end of the connection."""

    connection: socket.socket = field(repr=False)

    def __call__(
        self,
        folder: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        out: int | None = None,
        encoding: str = "utf-8",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder; standard output is returned, unless it goes to a descriptor, ``out``."""
        environment = dict(os.environ if environment is None else environment)
        request = {"folder": str(folder), "arguments": list(arguments), "environment": environment}
        with (
            tempfile.TemporaryFile() as asked,
            tempfile.TemporaryFile() as written,
            tempfile.TemporaryFile() as told,
        ):
            asked.write(json.dumps(request).encode())
            asked.seek(0)
            streams = [asked.fileno(), written.fileno() if out is None else out, told.fileno()]
            socket.send_fds(self.connection, [b"."], streams)
            code = int(self.connection.recv(8))
            for stream in (written, told):
                stream.seek(0)
            texts = [stream.read().decode(encoding) for stream in (written, told)]
        return subprocess.CompletedProcess(list(arguments), code, *texts)


@contextmanager
def prepared() -> Iterator[Prepared]:
    """Start the process that imports, and end it."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.cli.prepared", str(theirs.fileno())]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    with ours, theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": path})
        theirs.close()
        try:
            yield Prepared(ours)
        finally:
            ours.close()
            process.wait()


def _serve(connection: socket.socket) -> None:
    """Fork for every request, and return in the copies."""
    import netdecouple.api
    import netdecouple.cli  # noqa: F401

    while True:
        byte, files, _, _ = socket.recv_fds(connection, 1, 3)
        if not byte:
            os._exit(0)
        process = os.fork()
        if not process:
            connection.close()
            with open(files[0]) as asked:
                _begin(json.load(asked), files[1:])
            return
        for file in files:
            os.close(file)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        connection.send(str(code).encode())


def _begin(request: dict[str, Any], streams: Sequence[int]) -> None:
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]
    sys.argv = ["netdecouple", *request["arguments"]]
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    for number, stream, name, errors in zip(
        (1, 2), streams, ("stdout", "stderr"), ("strict", "backslashreplace"), strict=True
    ):
        os.dup2(stream, number)
        os.close(stream)
        made = open(number, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, made)
        setattr(sys, f"__{name}__", made)


def _main() -> int:
    from netdecouple.__main__ import main

    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """Flush and leave as the interpreter does; it destroys what it imported too, which a copy must not."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            traceback.print_exc()
            code = 120
    os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    _end(_main())
