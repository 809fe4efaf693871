"""Give cases to a worker process, and see what becomes of them and of it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fuzz.case import Case

PATIENCE = 60.0  # seconds of the processor's time that one case may take
SLEEP = 60.0  # seconds by the clock with next to none of it, however busy the machine is
REPOSITORY = Path(__file__).parents[2]
LIMITS = {  # small ones, so that a case that goes beyond them is small, too
    "NETDECOUPLE_MAX_MODEL_BYTES": 50_000_000,
    "NETDECOUPLE_MAX_TENSOR_BYTES": 15_000_000,
    "NETDECOUPLE_MAX_SAMPLE_BYTES": 50_000_000,
    "NETDECOUPLE_MAX_PIXELS": 4_000_000,
    "NETDECOUPLE_MAX_TEXT_BYTES": 2_000_000,
}


@dataclass
class Finding:
    """What a case should not have done."""

    case: Case
    problem: str


class Worker:
    """A process that runs cases; when one kills it, the next gets another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.seconds = 0.0  # of the processor's time, all workers together

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, case: Case) -> str:
        """Return what was wrong about how a case ended; nothing if it ended well."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(json.loads(case.to_json())) + "\n")
        process.stdin.flush()
        begun, spent = time.monotonic(), _processor_time(process.pid)
        while True:
            if select.select([process.stdout], [], [], 1.0)[0]:
                answer = process.stdout.readline()
                self.seconds += _processor_time(process.pid) - spent
                if answer:
                    return str(json.loads(answer))
                code = process.wait()
                said = self._said()
                self._process = None
                name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return f"the process died: {name}; {said}"
            used = _processor_time(process.pid) - spent
            if used > PATIENCE or (time.monotonic() - begun > SLEEP and used < 1):
                self.seconds += used
                said = self._said()
                self._end()
                return f"no end after {used:.0f} s of processor time; {said}"

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            environment = os.environ | {key: str(value) for key, value in LIMITS.items()}
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=REPOSITORY,
                env=environment | {"OMP_NUM_THREADS": "1"},
            )
        return self._process

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-3000:].decode(errors="replace")

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            self._process = None


def _processor_time(pid: int) -> float:
    """Seconds of the processor's time that a process has taken."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
