"""OpenVINO, where it is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from netdecouple.errors import ModelError
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
