"""Real pretrained networks, on small subsets; `benchmarks/accuracy.py` has the whole table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import netdecouple
from netdecouple import Preprocessing, Settings
from netdecouple.api import evaluate, inspect

CIFAR10 = Preprocessing(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

pytestmark = pytest.mark.shared


def test_resnet20_keeps_its_accuracy_at_half_the_macs(shared: Path, tmp_path: Path) -> None:
    """400 unlabelled images; the published method falls to about 30 % here, others lose 7 points and more."""
    model, images = shared / "models" / "resnet20.onnx", shared / "data" / "cifar10.npz"
    result = netdecouple.decouple(model, f"{images}:calib", macs="2x", samples=400, preprocessing=CIFAR10)
    result.save(tmp_path / "faster.onnx")
    before, after = evaluate([model, tmp_path / "faster.onnx"], f"{images}:test,test_labels", CIFAR10)
    assert before.top1 == 0.915
    assert after.top1 >= 0.90
    assert sum(la.macs for la in inspect(tmp_path / "faster.onnx").layers) <= 40_551_040 / 2


def test_the_published_method_is_reproduced_on_resnet20(shared: Path, tmp_path: Path) -> None:
    """Data-free, T = 3 for every layer but the first: 2.2 times fewer MACs and most of the accuracy gone."""
    model, images = shared / "models" / "resnet20.onnx", shared / "data" / "cifar10.npz"
    paper = Settings(data_free=True, uniform_rank=True)
    result = netdecouple.decouple(model, macs="2x", settings=paper)
    assert {terms for layer in result.report.layers for terms in layer.terms_per_channel or ()} == {3}
    result.save(tmp_path / "faster.onnx")
    _, after = evaluate([model, tmp_path / "faster.onnx"], f"{images}:test,test_labels", CIFAR10)
    assert result.plan.before.macs / result.plan.after.macs == pytest.approx(2.2, abs=0.05)
    assert after.top1 == pytest.approx(0.296, abs=0.03)


@pytest.mark.parametrize(
    ("name", "macs"),
    [("resnet20", 40_551_040), ("resnet56", 125_485_696), ("vgg16_cifar10", 313_196_544 + 512 * 10)],
)
def test_macs_of_the_pretrained_networks(shared: Path, name: str, macs: int) -> None:
    """As the networks' own documentation counts them: 40.55, 125.5 and 313.2 M."""
    seen = inspect(shared / "models" / f"{name}.onnx")
    assert sum(layer.macs for layer in seen.layers) == macs
    assert all(np.all(np.diff(shares) >= -1e-9) for shares in seen.energy.values())
    assert all(shares[-1] == pytest.approx(1) for shares in seen.energy.values())
