"""Sweeps of ONNX models: the same networks as of single runs, for less."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import netdecouple
from netdecouple import Settings, pipeline
from netdecouple.errors import BudgetError, ModelError, OutputError
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.goal import parse_sweep
from netdecouple.planning.candidates import Rule
from netdecouple.planning.plan import Plan
from netdecouple.report.sweep import SweepPoint
from tests import networks

QUICK = Settings(families=("nd-dp",))  # a single family is weighed in a fraction of the time


def test_onnx_runtime_may_be_installed_under_another_name(monkeypatch: pytest.MonkeyPatch):
    """As onnxruntime-gpu; its version is what it says itself."""
    found = metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", version)
    model = networks.residual()
    result = netdecouple.decouple(model, images_for(model), macs=0.9, settings=QUICK)
    assert dict(result.report.provenance.versions)["onnxruntime"] == onnxruntime.__version__


def test_the_fused_operator_is_refused_for_float16_before_the_work(monkeypatch: pytest.MonkeyPatch):
    if not netdecouple.kernels.available():
        pytest.skip("the fused operator was not built")
    monkeypatch.setattr(pipeline, "analyze", lambda *_: pytest.fail("it worked"))
    model = networks.halved(networks.residual())
    with pytest.raises(ModelError, match="emit='fused' is for float32"):
        netdecouple.sweep(model, images_for(model), 0.5, settings=QUICK, emit="fused")


def images_for(model: onnx.ModelProto) -> np.ndarray:
    return networks.images_for(model, 40)


@pytest.mark.parametrize(("emit", "data_free"), [("standard", False), ("fused", False), ("standard", True)])
def test_a_sweep_makes_the_networks_of_single_runs(tmp_path: Path, emit: str, data_free: bool):
    """Byte for byte, whichever layers the other budgets change; and with the same figures."""
    if emit == "fused" and not netdecouple.kernels.available():
        pytest.skip("the fused operator was not built")
    model = networks.residual()
    images = images_for(model)
    settings = Settings(data_free=data_free, families=("nd", "cd"))
    options = {"settings": settings, "emit": emit}
    sweep = netdecouple.sweep(model, images, (0.9, "40%"), output=tmp_path / "nets", **options)
    assert [point.budget for point in sweep.points] == ["90% MACs", "40% MACs"]
    for point in sweep.points:
        one = netdecouple.decouple(model, images, macs=point.budget.removesuffix(" MACs"), **options)
        one.save(tmp_path / "one.onnx")
        assert Path(point.file).read_bytes() == (tmp_path / "one.onnx").read_bytes()
        assert SweepPoint.of(one.report, one.plan, point.file) == point
    kept = {tuple(row.changed for row in plan_in(point.file).layers) for point in sweep.points}
    assert len(kept) > 1  # or else nothing was put to the test


def plan_in(path: str) -> Plan:
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return Plan.from_json(metadata["netdecouple.plan"])


def test_the_original_is_watched_once(monkeypatch: pytest.MonkeyPatch):
    """For scales, the analysis, and the targets of trials and fits, however many budgets there are."""
    model = networks.classifier()
    images = images_for(model)
    seen: list[int] = []
    observe = OnnxNetwork.observe

    def count(network: OnnxNetwork, images: np.ndarray, positions: object, **options: bool) -> object:
        seen.append(len(images))
        return observe(network, images, positions, **options)

    monkeypatch.setattr(OnnxNetwork, "observe", count)
    for budgets in ((0.5,), (0.9, 0.7, 0.5, 0.4)):
        seen.clear()
        netdecouple.sweep(model, images, budgets, settings=QUICK)
        assert len(seen) == 4


def test_without_output_only_figures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is written; every point is shown as soon as it is known."""
    monkeypatch.chdir(tmp_path)
    model = networks.classifier()
    shown: list[SweepPoint] = []
    sweep = netdecouple.sweep(model, images_for(model), "2x,80%", settings=QUICK, show=shown.append)
    assert tuple(shown) == sweep.points
    assert [point.file for point in shown] == [None, None]
    assert not list(tmp_path.iterdir())


def test_networks_of_earlier_runs_are_compared(tmp_path: Path):
    """On the same held-out inputs, with what their plans did; also when there is nothing else to do."""
    model = networks.classifier()
    images = images_for(model)
    sweep = netdecouple.sweep(model, images, (0.7, 0.5), settings=QUICK, output=tmp_path)
    paths = [point.file for point in sweep.points]
    both = netdecouple.sweep(model, images, compare=paths)
    assert (both.points, both.knee) == ((), None)
    for compared, point in zip(both.compared, sweep.points, strict=True):
        assert compared.point.macs == point.macs
        assert compared.point.macs_before == point.macs_before
        assert compared.point.agreement.divergence == pytest.approx(point.agreement.divergence, rel=1e-4)
        assert compared.point.agreement.predicted == point.agreement.predicted
        rows = plan_in(point.file).layers
        assert [(c.layer, c.family) for c in compared.layers] == [(row.name, row.family) for row in rows]
    stranger = netdecouple.sweep(model, images, compare=[networks.classifier(seed=1)]).compared[0]
    assert stranger.layers == ()
    assert stranger.point.agreement.divergence > 0.01


def test_what_cannot_be_compared():
    """Another input, another output: the network is named."""
    model = networks.classifier()
    images = images_for(model)
    with pytest.raises(ModelError, match="outputs are"):
        netdecouple.sweep(model, images, compare=[networks.restorer()])
    with pytest.raises(ModelError, match="no such file"):
        netdecouple.sweep(model, images, compare=["gone.onnx"])


def test_budgets():
    """Each once, most MACs first, in every way they can be written."""
    assert [goal.budgets[0].share for goal in parse_sweep("50%,2x,0.8", None)] == [0.8, 0.5]
    assert [goal.budgets[0].share for goal in parse_sweep((0.25, "50%"), None)] == [0.5, 0.25]
    assert [goal.budgets[0].share for goal in parse_sweep(0.7, None)] == [0.7]
    assert parse_sweep("", None) == []
    assert len(parse_sweep("2x,50.001%,1.9999x,49%", None)) == 2  # files are named after four digits
    with pytest.raises(BudgetError, match="80%x"):
        parse_sweep("80%x,50%", None)


def test_nothing_to_do():
    """Neither budgets nor networks to compare."""
    with pytest.raises(BudgetError, match="give budgets to sweep over"):
        netdecouple.sweep(networks.classifier(), images_for(networks.classifier()))


def test_a_rule_leaves_nothing_to_sweep_over():
    """It is refused, as `decouple` refuses it with a budget."""
    model = networks.classifier()
    with pytest.raises(BudgetError, match="leave out the rule"):
        netdecouple.sweep(model, images_for(model), "80%", settings=Settings(rule=Rule.parse("nd-dp:T=2")))


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That is said before any work."""
    monkeypatch.setattr(pipeline, "analyze", None)
    model = networks.classifier()
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "no" / "where"):
        with pytest.raises(OutputError, match=place.name):
            netdecouple.sweep(model, images_for(model), "50%", output=place)
