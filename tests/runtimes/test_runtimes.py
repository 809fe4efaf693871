"""Finding a runtime by its name."""

from __future__ import annotations

import sys

import pytest

from netdecouple.errors import UnavailableError
from netdecouple.runtimes import NAMES, runtime


def test_onnxruntime_is_always_there():
    """It comes with the package."""
    assert runtime("onnxruntime").name == "onnxruntime"


@pytest.mark.parametrize("name", NAMES[1:])
def test_others_say_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch):
    """The extra has the package's name."""
    package = name.partition(".")[0]
    monkeypatch.delitem(sys.modules, f"netdecouple.runtimes.{package}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=rf"{package} is not installed.*netdecouple\[{package}\]"):
        runtime(name)


def test_unknown():
    """The message lists those there are."""
    with pytest.raises(UnavailableError, match="'tvm'; there are onnxruntime, openvino"):
        runtime("tvm")
