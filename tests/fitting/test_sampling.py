"""What is fitted on, what is held out, and where a layer is looked at."""

from __future__ import annotations

import numpy as np
import pytest

from netdecouple.errors import CalibrationError
from netdecouple.fitting.sampling import ROWS, UNUSUAL, Inputs, Scale, SplitMoments, sample_positions
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.moments import Moments
from tests import networks
from tests.planning.layers import conv


def test_a_fifth_is_held_out_and_nothing_is_lost() -> None:
    images = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1)
    inputs = Inputs.split(images, seed=3)
    assert (inputs.fitted, len(inputs.held_out)) == (40, 10)
    assert sorted(inputs.images.ravel()) == list(range(50))
    assert Inputs.split(images, seed=3).images.tobytes() == inputs.images.tobytes()
    assert Inputs.split(images, seed=4).images.tobytes() != inputs.images.tobytes()


def test_the_fingerprint_is_of_the_images_not_of_their_order_under_a_seed() -> None:
    images = np.random.default_rng(0).standard_normal((12, 1, 2, 2)).astype(np.float32)
    assert Inputs.split(images, 0).fingerprint == Inputs.split(images, 1).fingerprint
    assert Inputs.split(images + 1, 0).fingerprint != Inputs.split(images, 0).fingerprint


def test_a_handful_of_images_is_refused() -> None:
    with pytest.raises(CalibrationError, match="too few"):
        Inputs.split(np.zeros((9, 1, 2, 2), np.float32), 0)


def test_small_maps_are_taken_whole() -> None:
    positions = sample_positions(conv("a", 4, 4, 5), 100, seed=0)
    np.testing.assert_array_equal(positions, np.tile(np.arange(25), (100, 1)))


def test_large_maps_are_sampled_evenly_and_differently_in_every_image() -> None:
    positions = sample_positions(conv("a", 64, 64, 224), 1000, seed=0)
    assert ROWS <= positions.size < 1.2 * ROWS
    assert positions.min() >= 0
    assert positions.max() < 224 * 224
    assert np.all(np.diff(positions, axis=1) > 0)  # no position twice
    assert not np.array_equal(positions[0], positions[1])
    assert np.histogram(positions, 10, (0, 224 * 224))[0].min() > 0.09 * positions.size


def test_layers_are_sampled_independently_and_repeatably() -> None:
    a, b = conv("a", 4, 4, 64), conv("b", 4, 4, 64)
    np.testing.assert_array_equal(sample_positions(a, 50, 0), sample_positions(a, 50, 0))
    assert not np.array_equal(sample_positions(a, 50, 0), sample_positions(b, 50, 0))
    assert not np.array_equal(sample_positions(a, 50, 0), sample_positions(a, 50, 1))


def test_every_image_goes_to_its_own_side_whatever_the_batches() -> None:
    layer = conv("a", 2, 3, 4)
    inputs = Inputs(np.zeros((10, 2, 4, 4), np.float32), 8, "")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((10, 5, 1, 18)), rng.standard_normal((10, 5, 3))
    moments = SplitMoments(layer, inputs)
    for batch in (slice(0, 3), slice(3, 9), slice(9, 10)):
        moments.add(batch, x[batch].reshape(-1, 1, 18), y[batch].reshape(-1, 3))
    whole = moments.both
    assert (whole.fitted.count, whole.held_out.count) == (40, 10)
    np.testing.assert_allclose(whole.fitted.mean_x[0], x[:8].reshape(-1, 18).mean(0))
    np.testing.assert_allclose(whole.held_out.mean_y[0], y[8:].reshape(-1, 3).mean(0))


def test_an_unusual_input_counts_as_much_as_the_most_of_a_usual_one() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((10, 40, 3))
    y[4] *= 10
    means, squares = y.mean(axis=1), np.square(y).mean(axis=1)
    scale = Scale.of(means, squares)
    energies = np.square(y - scale.mean).mean(axis=1).sum(axis=1)
    np.testing.assert_allclose(scale.energy, np.median(energies))
    weights = scale.weights(y.reshape(400, 3), 10).reshape(10, 40)
    assert np.all(np.delete(weights, 4, axis=0) == 1)
    np.testing.assert_allclose(weights[4] * energies[4], UNUSUAL * scale.energy)


def test_outputs_that_are_mostly_constant_count_alike() -> None:
    y = np.zeros((5, 1, 2))
    y[0] = 1
    assert np.all(Scale.of(y[1:, 0], y[1:, 0] ** 2).weights(y.reshape(5, 2), 5) == 1)


def test_moments_take_the_weights_of_the_layers_scale() -> None:
    model = networks.classifier()
    images = networks.images_for(model, 20)
    images[3] *= 100
    network = OnnxNetwork(read_model(model), images)
    inputs = Inputs.split(images, 0).with_scales(network, 0)
    layer = next(la for la in network.layers if la.name in inputs.scales)
    positions = {layer.name: sample_positions(layer, 20, 0)}
    split, samples = SplitMoments(layer, inputs), []
    for seen in network.observe(inputs.images, positions):
        split.add(seen.images, seen.patches, seen.outputs)
        samples.append((seen.patches, seen.outputs))
    x, y = (np.concatenate(parts) for parts in zip(*samples, strict=True))
    weights = inputs.weights(layer.name, y, 20)
    assert weights.min() < 0.1
    kept = slice(0, len(x) * inputs.fitted // 20)
    expected = Moments.of(x[kept], y[kept, None], weights[kept])
    np.testing.assert_allclose(split.both.fitted.cross, expected.cross, rtol=1e-6)
    assert split.both.fitted.count < len(x[kept])


def test_a_part_has_inputs_of_both_kinds_and_fewer_samples() -> None:
    inputs = Inputs.split(np.arange(400, dtype=np.float32).reshape(400, 1, 1, 1), seed=0)
    part, layer = inputs.part(0.25, 10), conv("a", 4, 4, 64)
    assert (part.fitted, len(part.held_out)) == (80, 20)
    np.testing.assert_array_equal(part.images[:80], inputs.images[:80])
    np.testing.assert_array_equal(part.held_out, inputs.held_out[:20])
    samples = inputs.positions(layer, 0).size
    assert part.positions(layer, 0).size == pytest.approx(samples / 4, rel=0.02)
    least = inputs.part(0.25, 200)
    assert len(least.images) == 200
    assert inputs.part(0.25, 1000).images.shape == inputs.images.shape
