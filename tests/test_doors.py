"""What is said where the door for PyTorch does not open."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from netdecouple import doors
from netdecouple.errors import UnavailableError


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a module be one that cannot be imported."""

    def set_missing(module: str) -> None:
        def fail(name: str) -> None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        monkeypatch.setattr(doors.importlib, "import_module", fail)

    return set_missing


@pytest.mark.parametrize("module", ["torch", "torch._C", "safetensors.torch"])
def test_a_package_that_is_missing_is_named_with_its_remedy(missing, module: str):
    """Those that the extra installs."""
    missing(module)
    with pytest.raises(UnavailableError, match=rf"{module}.*pip install 'netdecouple\[torch\]'"):
        doors.named()


@pytest.mark.parametrize("module", ["netdecouple.named", "torchvision", "numpy.core"])
def test_another_import_that_fails_is_not_put_down_to_them(missing, module: str):
    """Nobody is sent to install what is there."""
    missing(module)
    with pytest.raises(ModuleNotFoundError, match=module):
        doors.named()
