"""Probes, and the losses that are interpolated between them."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.convolution import Structure
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.planning.candidates import Candidate
from netdecouple.planning.sensitivity import (
    MARGIN,
    OriginalOutputs,
    errors_with_margin,
    predicted_losses,
    probe_counts,
)
from tests import networks
from tests.planning.layers import conv

GEOMETRY = conv("c", 8, 16, 10).geometry
assert GEOMETRY is not None


def test_what_is_compared_with_probes_is_of_the_same_samples() -> None:
    """Boxes of all samples in one list, and a constant, cannot be cut by the number of samples."""
    model = networks.detector()
    images = networks.images_for(model, 20)
    network, inputs = OnnxNetwork(read_model(model), images), Inputs(images, 10, "")
    shown, comparison = OriginalOutputs(network, inputs, network.layers).probe_samples(4, "relative")
    for expected, found in zip(network.run(shown), comparison.original, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_losses_rise_within_bounds() -> None:
    """Two probes of nearly the same error, one twice as bad by chance, say little of larger errors."""
    losses = predicted_losses((0.3, 0.6, 0.9), (0.05, 0.3, 0.3003), (1e-4, 1e-3, 2e-3))
    assert losses[0] < losses[1] < losses[2] < 30


def test_losses_at_the_probes_are_theirs_and_below_in_proportion_to_the_error() -> None:
    losses = predicted_losses((0.01, 0.1, 0.4), (0.4, 0.1), (0.03, 0.002))
    assert losses == pytest.approx((0.0002, 0.002, 0.03))
    assert predicted_losses((0.2, 0.1), (0.2,), (0.5,)) == pytest.approx((0.5, 0.25))
    assert predicted_losses((0.2, 0.1), (), ()) == ()


def test_a_greater_error_is_never_predicted_to_lose_less() -> None:
    losses = predicted_losses((0.05, 0.2, 0.1), (0.1, 0.2), (0.02, 0.001))
    assert losses == pytest.approx((0.01, 0.02, 0.02))


def candidates(*methods: str) -> list[Candidate]:
    structure = Structure.of(GEOMETRY, GEOMETRY)
    return [Candidate(method=name, steps=(), structure=structure, relative_error=0.3) for name in methods]


def test_other_methods_than_plain_nd_have_a_margin_where_that_competes() -> None:
    assert errors_with_margin(candidates("nd-dp", "sd", "sd+nd-dp")) == [0.3, 0.3 * MARGIN, 0.3 * MARGIN]
    assert errors_with_margin(candidates("sd", "nd-pd")) == [0.3, 0.3]
    assert errors_with_margin([]) == []


def test_large_networks_are_probed_less() -> None:
    """Once per layer instead of three times, on fewer inputs; never on fewer than the loss needs."""
    assert probe_counts(20, 10**7, 200, "kl") == (3, 200)
    assert probe_counts(50, 10**9, 200, "kl") == (1, 40)
    assert probe_counts(100, 10**10, 200, "kl") == (1, 16)
    assert probe_counts(100, 10**11, 200, "relative") == (1, 4)
    assert probe_counts(100, 10**11, 2, "relative") == (1, 2)
