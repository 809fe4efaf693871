"""What is built from a name, with which weights, and what its pictures are to look like."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

from torch import nn  # noqa: E402

from netdecouple.api import is_named  # noqa: E402
from netdecouple.errors import ModelError, UnavailableError  # noqa: E402
from netdecouple.frontends.torch import sources  # noqa: E402


class Enum:
    """A weights enum of torchvision's."""

    url = "https://example.org/tiny.pth"

    def __str__(self) -> str:
        return "Tiny_Weights.V1"

    def transforms(self) -> Any:
        return SimpleNamespace(crop_size=[8], resize_size=[10], mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


def tiny(*, weights: Any = None, weights_backbone: Any = "more to download") -> nn.Module:
    if weights is not None:
        raise OSError("no network\nhere")
    assert weights_backbone is None
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.fixture(autouse=True)
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with one model."""
    models = SimpleNamespace(
        list_models=lambda: ["tiny", "tall"],
        get_model_builder=lambda name: tiny,
        get_model_weights=lambda name: SimpleNamespace(DEFAULT=Enum()),
        get_model=lambda name, **options: tiny(**options),
    )
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("torchvision:vgg16", True),
        ("timm:resnet50.a1_in1k", True),
        ("timm:hf-hub:some/one", True),
        ("package.module:factory", True),
        ("model.onnx", False),
        ("torchvision:vgg16.onnx", False),
        ("torchvision:", False),
        ("torchvision", False),
        ("C:\\models\\net", False),
        (".:x", False),
    ],
)
def test_names_differ_from_files(source: str, named: bool):
    assert is_named(source) is named


def test_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever it is called."""
    monkeypatch.chdir(tmp_path)
    Path("timm:net").touch()
    assert not is_named("timm:net")


def test_random_weights_have_a_seed_and_download_nothing():
    """Global random numbers are left alone; preprocessing is what the pretrained weights say."""
    before = torch.get_rng_state()
    one, two, other = (sources.build("torchvision:tiny", "random", seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.module[0].weight, two.module[0].weight)
    assert not torch.equal(one.module[0].weight, other.module[0].weight)
    p = one.preprocessing
    assert (p.size, p.resize, p.mean, p.std) == ((8, 8), 10, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (one.weights, one.module.training) == ("random (seed 0)", False)


@pytest.mark.parametrize("weights", [None, "default"])
def test_weights_that_cannot_be_downloaded(weights: str | None):
    """One line, with what to do instead."""
    with pytest.raises(ModelError, match=r"cannot be downloaded \(OSError: no network\); give weights="):
        sources.build("torchvision:tiny", weights)


def test_close_names_are_suggested():
    with pytest.raises(ModelError, match=r"no model 'tiney'; did you mean tiny\? All: python -c"):
        sources.build("torchvision:tiney", "random")


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnavailableError, match="pip install timm"):
        sources.build("timm:resnet18")


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_are_unwrapped(tmp_path: Path, wrap: Any, prefix: str):
    """Under a key, or from DataParallel."""
    wanted = sources.build("torchvision:tiny", "random", 5).module.state_dict()
    torch.save(wrap({prefix + name: value for name, value in wanted.items()}), tmp_path / "w.pt")
    found = sources.build("torchvision:tiny", str(tmp_path / "w.pt"))
    assert all(torch.equal(value, wanted[name]) for name, value in found.module.state_dict().items())
    assert found.weights == str(tmp_path / "w.pt")


def test_safetensors(tmp_path: Path):
    wanted = sources.build("torchvision:tiny", "random", 5).module.state_dict()
    safetensors.save_file(wanted, tmp_path / "w.safetensors")
    found = sources.build("torchvision:tiny", str(tmp_path / "w.safetensors")).module
    assert torch.equal(found[0].weight, wanted["0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None}, "it has no 0.weight"),
        ({"2.weight": 3}, "it has 2.weight as well"),
        ({"0.bias": 7}, r"0.bias is \[7\], not \[4\]"),
    ],
)
def test_weights_of_another_network(tmp_path: Path, change: dict[str, int | None], message: str):
    """Strictly, and said in one line."""
    state = sources.build("torchvision:tiny", "random").module.state_dict()
    for name, size in change.items():
        state.pop(name, None)
        if size is not None:
            state[name] = torch.zeros(size)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=message):
        sources.build("torchvision:tiny", str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes, suffix: str):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot read it"):
        sources.build("torchvision:tiny", str(path))


def test_whole_modules_are_not_unpickled(tmp_path: Path):
    """They could run any code."""
    torch.save(tiny(weights_backbone=None), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"save the module's state_dict\(\) alone"):
        sources.build("torchvision:tiny", str(tmp_path / "w.pth"))
