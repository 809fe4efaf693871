"""What the pages say, without a browser."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from netdecouple import api
from netdecouple.errors import OutputError, PlanError
from netdecouple.planning.settings import Settings
from netdecouple.report.files import save_report
from netdecouple.report.formatting import advice
from netdecouple.report.html import gains, inspect_html, losses, report_html, sweep_html, verdict
from netdecouple.report.model import Agreement, Report
from netdecouple.report.sweep import Sweep
from netdecouple.report.text import summary
from netdecouple.runtimes.benchmark import LayerTimes, TimedLayer
from netdecouple.runtimes.timing import Ratio, Timing
from tests import networks
from tests.report.conftest import HOSTILE, hostile, pictures


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


@pytest.fixture(scope="session", params=["report", "inspect", "sweep"])
def page(request: pytest.FixtureRequest, full_report: Report, sweep: Sweep) -> str:
    """Every kind of page, full of names that are markup."""
    if request.param == "report":
        return report_html(full_report)
    if request.param == "inspect":
        seen = api.inspect(hostile(networks.classifier()))
        return inspect_html(replace(seen, model=HOSTILE))
    return sweep_html(sweep)


def test_names_are_text(page: str) -> None:
    """One script, ours; no element and no attribute comes out of a name; the name is shown as it is."""
    found = Page(page)
    assert found.tags["script"] == 1
    assert not [a for a in found.attributes if a[1].startswith("on")]
    assert not [
        a for a in found.attributes if a[1] == "src" and not a[2].startswith("data:image/png;base64,")
    ]
    assert HOSTILE in "".join(found.parts)
    assert "<script>window.broken" not in page


def test_pages_need_nothing_else(page: str) -> None:
    """No address but those within the page; and the page forbids itself to ask for any."""
    found = Page(page)
    links = [
        value for _, name, value in found.attributes if name in ("href", "src", "action", "data", "srcset")
    ]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in page
    assert "@import" not in page
    (policy,) = [value for _, name, value in found.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'")


def test_every_link_leads_somewhere(page: str) -> None:
    """Identifiers are there, and once only."""
    found = Page(page)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [value[1:] for _, name, value in found.attributes if name == "href"]
    named += [
        part for _, name, value in found.attributes if name == "aria-labelledby" for part in value.split()
    ]
    assert set(named) <= set(ids)


def test_a_report_answers_in_order(full_report: Report) -> None:
    """What was gained, what was lost, layer by layer, other budgets, inputs, provenance."""
    text = Page(report_html(full_report)).text
    parts = [
        "Gained",
        "Lost",
        "Time",
        "Layers",
        "Other budgets",
        "Where the two networks differ most",
        "Provenance",
    ]
    heads = [
        text.index(f" {part} ", text.index("Gained")) if part != "Gained" else text.index(part)
        for part in parts
    ]
    assert heads == sorted(heads)
    p = full_report.provenance
    assert p is not None
    for part in (
        p.model_hash,
        p.calibration_hash,
        p.plan_hash,
        p.machine,
        "onnxruntime",
        "seed 0",
        p.command,
    ):
        assert part in text
    assert "1 unreadable image" in text
    assert "Left out: " in text
    assert "cannot be opened" in text


def test_every_layer_is_told(full_report: Report) -> None:
    """Its name, costs, errors and times; why it was kept; a drawing of each that was changed."""
    page = report_html(full_report)
    text = Page(page).text
    changed = [layer for layer in full_report.layers if layer.family != "kept"]
    assert changed
    for layer in full_report.layers:
        assert f"{layer.reason}" in text
        assert layer.shape in text
    assert page.count('<svg class="structure"') == len(changed)
    assert page.count('<svg class="spectrum"') == sum(bool(layer.energy) for layer in changed)
    assert full_report.benchmark is not None
    (times,) = full_report.benchmark.layers
    assert {row.name for row in times.layers} >= {layer.name for layer in full_report.layers}
    assert "all nodes" in text


def test_json_and_back(full_report: Report) -> None:
    """Everything but the pictures is there again."""
    assert full_report.pictures
    text = full_report.to_json()
    assert Report.from_json(text) == full_report.without_pictures
    data = json.loads(text)
    assert "pictures" not in data
    assert data["bytes"] > 0
    assert data["curve"][0]["label"].endswith("×")
    assert data["layers"][0]["energy"][-1] == pytest.approx(1)
    assert data["benchmark"]["models"][1]["faster"]["lower"] > 0
    assert {d["sample"] for d in data["disagreements"]} <= set(range(24))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 1}', "null"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a report"):
        Report.from_json(text)


def test_the_ending_decides(full_report: Report, tmp_path: Path) -> None:
    """A page or data; anything else is refused, and nothing is left behind."""
    save_report(full_report, tmp_path / "a.html")
    save_report(full_report, tmp_path / "a.json")
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["model"] == HOSTILE
    with pytest.raises(OutputError, match=r"written as \.html or \.json"):
        save_report(full_report, tmp_path / "a.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_names_that_are_not_unicode_can_be_written(full_report: Report, tmp_path: Path) -> None:
    """File names may hold bytes that are no text."""
    save_report(replace(full_report, model="a\udcff.onnx"), tmp_path / "a.html")
    save_report(replace(full_report, model="a\udcff.onnx"), tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["model"] == "a\udcff.onnx"


# --- the numbers that are read first


def with_ratio(report: Report, ratio: Ratio) -> Report:
    assert report.benchmark is not None
    rows = tuple(row if row.faster is None else replace(row, faster=ratio) for row in report.benchmark.models)
    return replace(report, benchmark=replace(report.benchmark, models=rows))


def test_a_gain_is_a_gain(full_report: Report) -> None:
    faster = with_ratio(full_report, Ratio(1.4, 1.5, 1.6))
    facts = {fact.label: fact for fact in gains(faster)}
    assert facts["fewer MACs"].value == f"{full_report.macs_before / full_report.macs:.2f}×"
    assert facts["faster"].value == "1.50×"
    assert "1.40–1.60×; ONNX Runtime, 1 thread" in facts["faster"].detail
    assert "1.50× faster in ONNX Runtime on 1 thread" in verdict(faster)


def test_slower_is_not_called_faster(full_report: Report) -> None:
    slower = with_ratio(full_report, Ratio(0.4, 0.5, 0.8))
    (fact,) = [fact for fact in gains(slower) if fact.label == "slower"]
    assert (fact.value, fact.tone) == ("2.00×", "loss")
    assert "1.25–2.50×" in fact.detail
    assert " but 2.00× slower" in verdict(slower)
    assert "without a budget the network becomes as fast as it can" in report_html(slower)


def test_a_ratio_that_noise_hides_is_not_quoted(full_report: Report) -> None:
    hidden = with_ratio(full_report, Ratio(0.9, None, 1.3))
    (fact,) = [fact for fact in gains(hidden) if "time" in fact.label]
    assert (fact.value, fact.label, fact.tone) == ("≈", "no measurable difference in time", "")
    assert "no measurable difference (0.90–1.30)" in Page(report_html(hidden)).text


def test_the_terminal_says_what_became_of_the_time(full_report: Report) -> None:
    """And what to do where it has not become less."""
    for ratio, said, advises in (
        (Ratio(1.4, 1.5, 1.6), "1.50× faster in onnxruntime", False),
        (Ratio(0.4, 0.5, 0.8), "2.00× slower in onnxruntime", True),
        (Ratio(0.9, None, 1.3), "no measurable difference in onnxruntime", True),
    ):
        lines = "\n".join(line.plain for line in summary(with_ratio(full_report, ratio)))
        assert said in lines
        assert ("without a budget the network becomes as fast as it can" in lines) == advises


def test_the_layers_that_lose_time_are_named(full_report: Report) -> None:
    """Those that are slower beyond noise, most first, and how many more there are."""
    slower = with_ratio(full_report, Ratio(0.4, 0.5, 0.8))
    assert slower.benchmark is not None
    old = Timing(0.9, 1.0, 1.1)
    rows = tuple(
        TimedLayer(
            name=name,
            timings=(old, replace(old, median=1 + more)),
            faster=(None, Ratio(0.4, None if name == "noise" else 1 / (1 + more), 0.9)),
        )
        for name, more in (("a", 0.1), ("b", 0.4), ("noise", 9), ("gain", -0.5), ("c", 0.2), ("d", 0.3))
    )
    times = LayerTimes(models=("before", "after"), version="1", threads=1, layers=rows)
    slower = replace(slower, benchmark=replace(slower.benchmark, layers=(times,)))
    named = "b (0.400 ms more), d (0.300 ms more), c (0.200 ms more) and others (1)"
    for text in (advice(slower), "\n".join(map(str, summary(slower))), Page(report_html(slower)).text):
        assert f"slower than in the original: {named}; without a budget" in text


def test_no_times_are_told_as_such(full_report: Report) -> None:
    untimed = replace(full_report, benchmark=None, not_timed=())
    assert "time not measured" in [fact.label for fact in gains(untimed)]
    text = Page(report_html(untimed)).text
    assert "no times were asked for" in text
    assert "Time now" not in text


def test_what_was_lost(full_report: Report) -> None:
    agreement = Agreement(images=200, loss="kl", divergence=0.0123, predicted=0.0105, same_class=0.985)
    report = replace(full_report, agreement=agreement)
    accuracy, classes, kl = losses(report)
    assert (accuracy.value, accuracy.detail) == ("−1.0", "91.5% → 90.5% top-1, labelled images")
    assert (classes.value, classes.detail) == ("1.5%", "3 of 200 held-out inputs")
    assert (kl.value, kl.detail) == ("0.012", "0.0105 predicted; 200 held-out inputs")
    assert "stays at 91.5%" in verdict(replace(report, accuracy=(0.915, 0.915)))


# --- other runs


def test_networks_that_are_no_classifiers() -> None:
    """Relative error, no classes; inputs of four channels are not drawn."""
    model = networks.restorer()
    images = networks.images_for(model, 12)
    report = api.decouple(model, images, macs=0.7).report
    text = Page(report_html(report)).text
    assert "relative error of the outputs" in text
    assert "class" not in text.replace("classifier", "")
    assert report.disagreements
    assert all(d.original is None for d in report.disagreements)
    assert "error" in text


def test_inputs_that_are_no_pictures() -> None:
    b = networks.Builder()
    x = b.node("Relu", b.conv("image", 5, 16, 3, "conv1"))
    x = b.node("Relu", b.conv(x, 16, 16, 3, "conv2"))
    b.classifier(x, 16)
    images = np.random.default_rng(0).standard_normal((20, 5, 8, 8)).astype(np.float32)
    report = api.decouple(b.model(shape=("N", 5, 8, 8)), images, macs=0.6).report
    assert report.disagreements
    assert report.pictures == ()
    page = Page(report_html(report))
    assert page.tags["img"] == 0
    assert "Where the two networks differ most" in page.text


def test_runs_without_inputs_claim_nothing() -> None:
    """Data-free: no agreement, no inputs; the curve says what it is worth."""
    report = api.decouple(networks.classifier(), macs=0.6, settings=Settings(data_free=True)).report
    assert (report.agreement, report.disagreements, report.pictures) == (None, (), ())
    text = Page(report_html(report)).text
    assert "without inputs to compare the two networks on" in text
    assert "no calibration inputs" in text
    assert "Where the two networks differ most" not in text


def test_rules_have_no_curve() -> None:
    from netdecouple.planning.candidates import Rule

    settings = Settings(rule=Rule.parse("nd-dp:T=2"))
    report = api.decouple(networks.classifier(), pictures(), settings=settings).report
    assert report.curve == ()
    assert "Other budgets" not in Page(report_html(report)).text


def test_the_curve_is_the_planners(full_report: Report) -> None:
    assert [row.label for row in full_report.curve] == sorted(
        (row.label for row in full_report.curve), key=lambda s: float(s[:-1])
    )
    text = Page(report_html(full_report)).text
    for row in full_report.curve:
        assert row.label in text
    assert "this run" in text


def test_disagreements_are_the_worst_inputs(result: api.Result) -> None:
    """In falling order, numbered as in the calibration set, with what both networks say."""
    from netdecouple.runtimes.onnxruntime import open_session, run

    found = result.report.disagreements
    assert [d.divergence for d in found] == sorted((d.divergence for d in found), reverse=True)
    images = pictures()
    original = run(open_session(hostile(networks.classifier())), None, {"image": images})[0]
    new = run(open_session(result.model), None, {"image": images})[0]
    for d in found:
        assert d.original is not None
        assert d.new is not None
        assert d.original.chosen == original[d.sample].argmax()
        assert d.new.chosen == new[d.sample].argmax()


def test_what_cannot_be_timed_says_why(result: api.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing never fails a run."""
    untimed = replace(result, report=replace(result.report, benchmark=None))
    timed = untimed.timed(["nonsense"], seconds=0)
    assert timed.report.benchmark is None
    (why,) = timed.report.not_timed
    assert "there is no runtime 'nonsense'" in why
    assert "there is no runtime" in Page(report_html(timed.report)).text

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the clock stands still")

    monkeypatch.setattr("netdecouple.api.benchmark", fail)
    assert untimed.timed().report.not_timed == ("onnxruntime: the clock stands still",)


def test_a_result_times_itself_for_a_page(
    result: api.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for JSON, which says the same every time."""
    untimed = replace(result, report=replace(result.report, benchmark=None))
    monkeypatch.setattr("netdecouple.api.SHORT", 0.0)
    untimed.save_report(tmp_path / "r.json")
    assert Report.from_json((tmp_path / "r.json").read_text(encoding="utf-8")).benchmark is None
    untimed.save_report(tmp_path / "r.html")
    assert "Median" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_a_sweep_marks_its_knee(sweep: Sweep) -> None:
    text = Page(sweep_html(sweep)).text
    assert "The knee of the curve is at 2.00× fewer MACs (50% MACs)" in text
    assert "66.7% MACs" in text
    assert "compared" in text
    assert "has no knee" in Page(sweep_html(replace(sweep, knee=None))).text


def test_an_empty_sweep_is_a_page(sweep: Sweep) -> None:
    assert "too few points" in Page(sweep_html(replace(sweep, points=(), knee=None, compared=()))).text


def test_pytorch_modules_report_the_same(tmp_path: Path) -> None:
    """Sizes, spectra, curve, inputs; what is saved with the weights holds no pictures."""
    torch = pytest.importorskip("torch")
    import netdecouple

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(12, 16, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    ).eval()
    faster = netdecouple.decouple(net, torch.from_numpy(pictures()), macs=0.5)
    report = faster.decoupling.report
    assert report.bytes_before == 4 * sum(p.numel() for p in net.parameters())
    assert report.bytes == sum(t.nbytes for t in (*faster.parameters(), *faster.buffers()))
    assert report.curve
    assert len(report.pictures) == len(report.disagreements) > 0
    assert dict(report.provenance.versions)["torch"]
    text = Page(report_html(report)).text
    assert "Sequential" in text
    assert "time not measured" in text
    netdecouple.save(faster, tmp_path / "faster")
    again = netdecouple.load(net, tmp_path / "faster").decoupling.report
    assert again == report.without_pictures
    for size in (path.stat().st_size for path in (tmp_path / "faster").iterdir()):
        assert size < 200_000
