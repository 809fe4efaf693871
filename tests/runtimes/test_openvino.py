"""OpenVINO, where it is installed."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from netdecouple.errors import ModelError
from tests.networks import classifier
from tests.runtimes.base import OnnxRuntimeCase, installed
from tests.runtimes.test_onnxruntime import with_own_operator


class TestOpenVino(OnnxRuntimeCase):
    name = "openvino"

    def test_refuses_our_own_operators(self):
        """It says where they do run."""
        runtime = installed("openvino")
        with pytest.raises(ModelError, match="onnxruntime only"):
            runtime.open(with_own_operator(), 1)

    def test_does_not_report_home(self):
        """Opening OpenVINO leaves its telemetry unloaded, and importable for those who want it."""
        installed("openvino")
        code = (
            "import sys\n"
            "from netdecouple.runtimes import runtime\n"
            "runtime('openvino')\n"
            "sys.exit(any(name.startswith('openvino_telemetry') for name in sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.skipif(sys.platform != "linux", reason="OpenVINO's plugin does so on Linux")
    def test_the_stack_for_signals_outlives_every_model(self):
        """Models may be closed in any order; a signal that comes later still finds its stack."""
        runtime = installed("openvino")
        sessions, stacks = [], []
        for _ in range(2):
            sessions.append(runtime.open(classifier(), 1))
            stacks.append(_signal_stack())
        while sessions:
            sessions.pop(0)
        assert {*stacks, _signal_stack()} == {stacks[0]}


class _Stack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def _signal_stack() -> tuple[int | None, int]:
    """Return the address and the size of this thread's stack for signals."""
    stack = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.start, stack.size
