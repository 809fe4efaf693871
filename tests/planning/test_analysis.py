"""Which layers are left alone before any work, and why."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.convolution import Structure
from netdecouple.errors import ModelError
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.analysis import EXCLUDED, Original, Settings, _losses, kept_reasons
from netdecouple.planning.candidates import Candidate, LayerCandidates, Probe, Rule
from tests import networks
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


def test_a_fully_connected_layer_may_follow_a_rule_or_be_excluded_or_too_small() -> None:
    assert kept_reasons(LAYERS, Settings(rule=Rule.parse("cd:rank=2"))) == {}
    assert kept_reasons(LAYERS, Settings(exclude=("f*",))) == {"fc": EXCLUDED}
    with pytest.raises(ModelError, match="too small"):
        kept_reasons([linear("one", 16, 1)], Settings())


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


def test_what_is_compared_with_probes_is_of_the_same_samples() -> None:
    """Boxes of all samples in one list, and a constant, cannot be cut by the number of samples."""
    model = networks.detector()
    images = networks.images_for(model, 20)
    network, inputs = OnnxNetwork(read_model(model), images), Inputs(images, 10, "")
    shown, outputs = Original(network, inputs, network.layers).trials(4)
    for expected, found in zip(network.run(shown), outputs, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_losses_rise_within_bounds() -> None:
    """Two probes of nearly the same error, one twice as bad by chance, say little of larger errors."""
    weight = np.zeros((1, 1, 1, 1), np.float32)
    probes = tuple(Probe(weight, weight[:, 0, 0, 0], error) for error in (0.05, 0.3, 0.3003))
    layer = conv("c", 8, 16, 10)
    assert layer.geometry is not None
    candidates = tuple(
        Candidate(method="nd-dp", steps=(), structure=Structure.of(layer.geometry), relative_error=error)
        for error in (0.3, 0.6, 0.9)
    )
    losses = _losses(LayerCandidates(layer="c", candidates=candidates, probes=probes), (1e-4, 1e-3, 2e-3))
    assert losses[0] < losses[1] < losses[2] < 30
