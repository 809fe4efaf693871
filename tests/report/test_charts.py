"""Where things stand in the charts."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from netdecouple.report.charts import Point, Series, plot, spectrum, structure
from netdecouple.report.model import Report, Stage


def chart(*losses: float, points: tuple[Point, ...] = ()):  # type: ignore[no-untyped-def]
    series = Series("predicted", tuple((1 + i, loss) for i, loss in enumerate(losses)))
    return plot("title", "words", "y", [series], points)


def test_more_loss_is_higher_and_fewer_macs_further_right() -> None:
    """And all of it is inside the frame."""
    drawn = chart(0.001, 0.01, 0.1)
    (_, path) = drawn.lines[0]
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path)]
    xs, ys = zip(*places, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    assert np.diff(ys)[0] == pytest.approx(np.diff(ys)[1], abs=0.2)  # decades are of one height
    for x, y in places:
        assert drawn.left <= x <= drawn.right
        assert drawn.top <= y <= drawn.bottom


def test_ticks_stand_where_their_numbers_belong() -> None:
    drawn = chart(0.001, 0.01, 0.1)
    assert drawn.y_ticks[0].label in ("0.001", "0.002")
    assert {"0.01", "0.1"} <= {tick.label for tick in drawn.y_ticks}
    assert drawn.x_ticks[0].label == "1×"
    assert drawn.x_ticks[0].at == drawn.left


def test_losses_of_nothing_are_drawn_at_the_bottom() -> None:
    drawn = chart(0.0, 0.01, 0.1)
    assert drawn is not None
    assert chart(0.0, 0.0) is None
    assert chart() is None


def test_labels_do_not_lie_on_each_other() -> None:
    near = (Point(2, 0.01, "this run", "run"), Point(2, 0.0101, "predicted", "hollow"))
    far = (near[0], replace(near[1], y=0.09))
    assert [m.label for m in chart(0.001, 0.01, 0.1, points=near).marks] == ["", "this run"]
    assert {m.label for m in chart(0.001, 0.01, 0.1, points=far).marks} == {"this run", "predicted"}
    assert chart(0.001, 0.01, 0.1, points=far).marks[-1].kind == "run"  # above all others


def test_a_structure_has_the_stages_of_the_layer(full_report: Report) -> None:
    """Two chains to one scale, with the channels between the stages and the MACs of each."""
    changed = [layer for layer in full_report.layers if layer.stages]
    assert changed
    for layer in changed:
        drawn = structure(layer)
        assert drawn is not None
        was, now = drawn.rows
        assert len(was.flows) == 1
        assert len(now.flows) == len(layer.stages)
        assert layer.before is not None
        channels = [layer.before.n_i, *(stage.n_o for stage in layer.stages)]
        assert [bar.label for bar in now.bars] == [str(n) for n in channels]
        bars = [(int(bar.label), bar.height) for bar in (*was.bars, *now.bars)]
        assert all((a[0] > b[0]) <= (a[1] >= b[1]) for a in bars for b in bars)
        for stage, flow in zip(layer.stages, now.flows, strict=True):
            assert (flow.kind == "lines") == (stage.kind == "depthwise")
            assert flow.kernel.startswith(f"{stage.kernel[0]}×{stage.kernel[1]}")
        assert str(layer.stages[0].n_o) in drawn.description


def test_stages_cost_what_the_layer_costs(full_report: Report) -> None:
    """Unless filters have gone that nobody reads: then the layer costs less."""
    for layer in full_report.layers:
        if layer.before is not None:
            assert layer.before.macs == layer.macs_before
        if layer.stages:
            assert sum(stage.macs for stage in layer.stages) >= layer.macs


def test_kept_layers_are_not_drawn(full_report: Report) -> None:
    kept = next(layer for layer in full_report.layers if layer.family == "kept")
    assert structure(kept) is None


def test_a_spectrum_shows_shares_that_fall() -> None:
    drawn = spectrum("conv", [0.6, 0.85, 0.95, 1.0], taken=2.0)
    assert drawn is not None
    heights = [height for _, _, _, height, _ in drawn.bars]
    assert heights == sorted(heights, reverse=True)
    assert [kind for *_, kind in drawn.bars] == ["taken", "taken", "rest", "rest"]
    assert drawn.caption == "95% in 3 of 4"
    assert "60.0%, 25.0%, 10.0%, 5.0%" in drawn.description
    assert spectrum("conv", []) is None


def test_grouped_stages_are_bands_of_their_own(full_report: Report) -> None:
    layer = next(layer for layer in full_report.layers if layer.stages)
    grouped = Stage(kind="convolution", reads=8, n_i=8, n_o=8, kernel=(3, 3), groups=2, macs=100)
    drawn = structure(replace(layer, before=grouped, stages=(grouped,)))
    assert drawn is not None
    assert drawn.rows[0].flows[0].path.count("Z") == 2
    assert drawn.rows[0].flows[0].kernel == "3×3 /2"
