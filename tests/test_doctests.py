"""The examples in the docstrings of what only computes: they say what they print."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from netdecouple import convolution, families, moments

MODULES = [convolution.__name__, moments.__name__, families.__name__]
MODULES += [f"{families.__name__}.{part.name}" for part in pkgutil.iter_modules(families.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert not failed
    assert attempted or name.startswith(families.__name__)
