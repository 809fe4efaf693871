"""Counting: the figures everybody quotes, and budgets as people write them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.errors import BudgetError
from netdecouple.families.chain import Step, method
from netdecouple.network import Layer
from netdecouple.planning.candidates import Candidate, least_cost
from netdecouple.planning.cost import Budget, Macs, Parameters, parse_share
from tests.planning.layers import conv, linear, vgg16


def test_vgg16_has_15_35_g_macs_in_convolutions_and_15_47_in_all() -> None:
    layers = vgg16()
    assert sum(la.macs for la in layers if la.operator == "Conv") / 1e9 == pytest.approx(15.35, abs=5e-3)
    assert sum(la.macs for la in layers) / 1e9 == pytest.approx(15.47, abs=5e-3)


def macs_at_rank(
    rank: int, stages: Callable[[ConvGeometry, int], tuple[ConvGeometry, ConvGeometry]]
) -> float:
    """G MACs of VGG16 with its first layer kept and every other one in two stages."""
    first, *rest = vgg16()
    total = first.macs
    for layer in rest:
        if layer.operator != "Conv":
            total += layer.macs
            continue
        chain = tuple(
            ConvStage(g, np.broadcast_to(0.0, g.weight_shape)) for g in stages(layer.geometry, rank)
        )
        total += Factorization(layer.geometry, chain).macs(*layer.size)
    return total / 1e9


def pointwise_then_depthwise(g: ConvGeometry, rank: int) -> tuple[ConvGeometry, ConvGeometry]:
    wide = ConvGeometry(rank * g.n_o, g.n_i, 1, 1)
    return wide, ConvGeometry(g.n_o, rank * g.n_o, g.kh, g.kw, g.strides, g.pads, g.dilations, g.n_o)


def depthwise_then_pointwise(g: ConvGeometry, rank: int) -> tuple[ConvGeometry, ConvGeometry]:
    wide = ConvGeometry(rank * g.n_i, g.n_i, g.kh, g.kw, g.strides, g.pads, g.dilations, g.n_i)
    return wide, ConvGeometry(g.n_o, rank * g.n_i, 1, 1)


@pytest.mark.parametrize(("rank", "pd", "dp"), [(5, 9.15, 9.09), (4, 7.36, 7.31)])
def test_vgg16_decoupled_at_one_rank(rank: int, pd: float, dp: float) -> None:
    """Fully connected layers included. PD filters n_o maps per term, DP n_i, of which VGG16 has fewer."""
    assert macs_at_rank(rank, pointwise_then_depthwise) == pytest.approx(pd, abs=5e-3)
    assert macs_at_rank(rank, depthwise_then_pointwise) == pytest.approx(dp, abs=5e-3)


def candidate(layer: Layer, name: str, *sizes: int) -> Candidate:
    steps = tuple(Step(size) for size in sizes)
    return Candidate(
        method=name, steps=steps, structure=method(name).structure(layer.geometry, steps), relative_error=0.1
    )


def test_the_counter_of_candidates_agrees_with_the_stages() -> None:
    layers = [la for la in vgg16()[1:] if la.operator == "Conv"]
    total = (
        sum(Macs().decoupled(la, candidate(la, "nd-dp", 4 * la.geometry.n_i)) for la in layers)
        + vgg16()[0].macs
    )
    fully_connected = sum(la.macs for la in vgg16() if la.operator != "Conv")
    assert (total + fully_connected) / 1e9 == pytest.approx(macs_at_rank(4, depthwise_then_pointwise))


def test_vgg16_has_138_m_parameters() -> None:
    assert sum(Parameters().dense(la) for la in vgg16()) / 1e6 == pytest.approx(138.36, abs=5e-3)


def test_a_term_costs_a_depthwise_filter_and_a_pointwise_column() -> None:
    layer = conv("c", 8, 16, 10)
    assert Macs().decoupled(layer, candidate(layer, "nd-dp", 5)) == 5 * (9 + 16) * 100
    assert Parameters().decoupled(layer, candidate(layer, "nd-dp", 5)) == 5 * (9 + 16) + 16


def test_a_grouped_term_is_paid_for_in_every_group() -> None:
    layer = conv("c", 8, 16, 10, groups=2)
    assert Macs().decoupled(layer, candidate(layer, "nd-dp", 5)) == 2 * 5 * (9 + 8) * 100


def test_every_family_is_paid_for_stage_by_stage() -> None:
    layer = conv("c", 8, 16, 10)
    assert Macs().decoupled(layer, candidate(layer, "cd", 3)) == (3 * 8 * 9 + 16 * 3) * 100
    assert Macs().decoupled(layer, candidate(layer, "sd", 3)) == (3 * 8 * 3 + 16 * 3 * 3) * 100
    assert Macs().decoupled(layer, candidate(layer, "cp", 5)) == 16 * 5 * 9 * 100
    assert Macs().decoupled(layer, candidate(layer, "nd-pd", 2)) == 2 * 16 * (8 + 9) * 100
    assert Macs().decoupled(layer, candidate(layer, "cd+nd-dp", 3, 5)) == (5 * (9 + 3) + 16 * 3) * 100


def test_the_least_is_the_smallest_of_a_family_or_the_layer_itself() -> None:
    assert least_cost(conv("c", 8, 16, 10), Macs()) == (9 + 16) * 100
    assert least_cost(linear("f", 8, 16), Macs()) == 8 + 16
    assert least_cost(conv("c", 1, 1, 10, k=1), Macs()) == 100
    assert least_cost(conv("p", 8, 16, 10, k=1), Macs()) == 16 * 100


@pytest.mark.parametrize(
    ("text", "share"),
    [("50%", 0.5), ("2x", 0.5), ("0.5", 0.5), (0.25, 0.25), (" 4X ", 0.25), ("100%", 1.0), (1, 1.0)],
)
def test_budgets_are_shares_in_any_notation(text: str | float, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize(
    "text", ["", "half", "0%", "200%", "0.5x", "-1", "x", "0x", "nan", "inf", "2y", "1e400"]
)
def test_nonsense_budgets_are_named(text: str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        parse_share(text)


def test_a_budget_limits_the_whole_network() -> None:
    layers = [conv("a", 8, 8, 10), linear("f", 10, 10)]
    assert Budget(Macs(), 0.5).limit(layers) == (8 * 8 * 9 * 100 + 100) // 2
    assert str(Budget(Macs(), 0.5)) == "50% MACs"
