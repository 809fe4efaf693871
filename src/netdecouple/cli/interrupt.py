"""Ctrl-C that works at once, also while LAPACK, ONNX Runtime or PyTorch are computing.

Python handles a signal in its main thread, and not before a native call there has returned. So commands run
in a thread of their own, and the main thread does nothing but wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any

STACK = 64 << 20  # bytes: what main threads have, and more; some systems give others far less
POLL = 0.2  # seconds: some systems handle no signals while they wait for longer


class Interrupted(BaseException):
    """Ctrl-C, under a name that no other code handles."""


def interruptible(work: Callable[[], Any]) -> Any:
    """Do some work in a thread of its own, and return what it returns.

    Raises:
        Interrupted: Ctrl-C, at once. The work goes on: the process is to be ended, by `leave`.
        BaseException: whatever the work raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # only the main thread handles signals
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    handler = signal.signal(signal.SIGINT, _interrupt)
    try:
        usual = threading.stack_size(STACK)
        threading.Thread(target=run, name="command", daemon=True).start()
        threading.stack_size(usual)
        while not wait([result], POLL).done:
            pass
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if sys.exc_info()[0] is Interrupted else handler)
    return result.result()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def leave(code: int) -> None:
    """End the process without waiting for any thread."""
    with contextlib.suppress(OSError):  # the reader may have gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
