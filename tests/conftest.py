"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings

from tests import networks

# the same examples every time: what fails here fails everywhere
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

SHARED = Path(os.environ.get("NETDECOUPLE_SHARED") or Path(__file__).parents[2] / "shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason=f"no pretrained networks in {SHARED}; set NETDECOUPLE_SHARED")
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(skip)


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
