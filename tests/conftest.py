"""Fixtures that several rooms share."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import settings

from tests import networks
from tests.browser import Browser, started

# the same examples every time: what fails here fails everywhere
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

SHARED = Path(os.environ.get("NETDECOUPLE_SHARED") or Path(__file__).parents[2] / "shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--level", help="instruction set of the fused operator, if the processor has it")


def pytest_configure(config: pytest.Config) -> None:
    if level := config.getoption("--level"):
        from tests.kernels.cases import kernels, use_level  # not before coverage is measured

        if kernels.available():
            use_level(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason=f"no pretrained networks in {SHARED}; set NETDECOUPLE_SHARED")
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Spare every garbage collection the modules and tests, which stay until the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with pretrained networks and images; its tests are marked ``shared``."""
    return SHARED


@pytest.fixture(params=networks.ALL.values(), ids=networks.ALL)
def network_maker(request: pytest.FixtureRequest) -> Callable[[], onnx.ModelProto]:
    """Each of the small networks in turn."""
    return request.param


@pytest.fixture
def model(network_maker: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    return network_maker()


@pytest.fixture
def images(model: onnx.ModelProto) -> np.ndarray:
    return networks.images_for(model)


@pytest.fixture
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stopwatch runs as it does, for a few rounds only."""
    from netdecouple.runtimes import benchmark, timing  # not before coverage is measured

    rounds = timing.rounds
    monkeypatch.setattr(timing, "FEWEST", 2)
    monkeypatch.setattr(timing, "TURN", 0.1)
    for module in (timing, benchmark):
        monkeypatch.setattr(module, "rounds", lambda count, _, **more: rounds(count, 0, **more))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium, started once; skipped where there is none."""
    with started(tmp_path_factory.mktemp("chromium")) as window:
        yield window


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """The torchvision package, also where its compiled operators do not fit the installed PyTorch."""
    pytest.importorskip("torch")
    return import_torchvision()


def import_torchvision() -> Any:
    """Import torchvision; where its library of operators does not load, its import asks for one in vain."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _define_nms()
        package = importlib.import_module("torchvision")
        package.extension._has_ops = _has_ops
        return package


def _has_ops() -> bool:  # is asked before every nms, and compiled where a detector is exported
    return True


def _define_nms() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # the second is for quantized boxes, and only has to be there
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    globals()["_library"] = library  # its definitions go when it does


def _nms(boxes: Any, scores: Any, threshold: float) -> Any:
    """Keep boxes in falling order of their scores, none overlapping a better one by more than a threshold."""
    import torch

    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    overlap = (torch.minimum(high, boxes[None, :, 2:]) - torch.maximum(low, boxes[None, :, :2])).clamp(min=0)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    shared = overlap.prod(dim=2)
    clashes = shared / (area[:, None] + area[None] - shared) > threshold
    kept, dropped = [], torch.zeros(len(boxes), dtype=torch.bool)
    for index in scores.argsort(descending=True, stable=True).tolist():
        if not dropped[index]:
            kept.append(index)
            dropped |= clashes[index]
    return torch.tensor(kept, dtype=torch.int64)
