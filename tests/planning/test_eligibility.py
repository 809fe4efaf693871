"""Which layers are kept before any work, and why."""

from __future__ import annotations

import pytest

from netdecouple.errors import ModelError
from netdecouple.planning.candidates import Rule
from netdecouple.planning.eligibility import EXCLUDED, kept_reasons
from netdecouple.planning.settings import Settings
from tests.planning.layers import conv, linear, vgg16

LAYERS = [conv("c", 8, 16, 10), linear("fc", 16, 10)]


def test_a_fully_connected_layer_too_wide_for_its_moments_is_kept() -> None:
    """VGG16's; without data there are no moments. Convolutions, and ResNet-50's last, are not affected."""
    assert kept_reasons(vgg16(), Settings()) == {
        name: f"too wide: the moments of its inputs take {size} GB, more than 0.3 GB"
        for name, size in (("fc6", 17.6), ("fc7", 0.8), ("fc8", 0.5))
    }
    assert kept_reasons(vgg16(), Settings(data_free=True)) == {}
    assert kept_reasons([conv("wide", 1024, 512, 14), linear("fc", 2048, 1000)], Settings()) == {}


@pytest.mark.parametrize(
    "settings",
    [
        Settings(families=("nd", "sd")),
        Settings(rule=Rule.parse("nd-dp:T=4")),
        Settings(data_free=True, uniform_rank=True),
    ],
)
def test_a_fully_connected_layer_is_kept_where_low_rank_is_not_asked_for(settings: Settings) -> None:
    assert kept_reasons(LAYERS, settings) == {"fc": "only cd would do, which is not asked for"}


def test_a_name_is_a_name_before_it_is_a_glob() -> None:
    """Layers are named after nodes, and nodes after whatever an exporter likes."""
    layers = [conv(name, 8, 16, 10) for name in ("conv[0]", "conv0", "*", "last")]
    for pattern, names in (
        ("conv[0]", ["conv[0]"]),
        ("conv[0-9]", ["conv0"]),
        ("conv*", ["conv[0]", "conv0"]),
        ("*", ["*"]),
    ):
        reasons = kept_reasons(layers, Settings(exclude=(pattern,)))
        assert [name for name, reason in reasons.items() if reason == EXCLUDED] == names


def test_a_fully_connected_layer_may_follow_a_rule_or_be_excluded_or_too_small() -> None:
    assert kept_reasons(LAYERS, Settings(rule=Rule.parse("cd:rank=2"))) == {}
    assert kept_reasons(LAYERS, Settings(exclude=("f*",))) == {"fc": EXCLUDED}
    with pytest.raises(ModelError, match="too small"):
        kept_reasons([linear("one", 16, 1)], Settings())


def test_if_no_layer_is_left_the_reasons_are_said_once_each() -> None:
    """The most frequent first, with a layer that has each."""
    layers = [conv("head", 8, 16, 10), *(linear(name, 16, 1) for name in ("a", "b", "c"))]
    with pytest.raises(ModelError) as refused:
        kept_reasons(layers, Settings(exclude=("head",)))
    assert str(refused.value) == (
        "none of the 4 layers can be decoupled "
        "(a and 2 more: too small: nothing costs less than the layer itself; head: excluded)"
    )


def test_a_wide_layer_that_is_little_of_the_network_is_not_worth_the_work() -> None:
    """As the small heads of detectors are; a rule, and fits without data, which are quick, go there too."""
    layers = [conv("a", 512, 512, 38), conv("b", 512, 512, 38), conv("head", 1024, 8, 19)]
    assert kept_reasons(layers, Settings()) == {
        "head": "not worth the work: 80 % of all, for 2 % of the network"
    }
    for settings in (Settings(data_free=True), Settings(rule=Rule.parse("nd-dp:T=1"))):
        assert kept_reasons(layers, settings) == {}
    assert kept_reasons([*layers[:2], conv("head", 1024, 256, 19)], Settings()) == {}
    assert kept_reasons([*layers[:2], conv("narrow", 128, 2, 19)], Settings()) == {}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="exclude='head' matches no layer"):
        kept_reasons(LAYERS, Settings(exclude="head"))  # type: ignore[arg-type]
