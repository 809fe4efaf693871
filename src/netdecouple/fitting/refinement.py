"""Train the stages of all decoupled layers together until the network's outputs are the original's again.

The original is the teacher (distillation, Hinton, Vinyals and Dean 2015), so that no labels are needed. Needs
PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError
from netdecouple.execution.progress import Progress, quiet
from netdecouple.fitting.apply import Applied, Refinement
from netdecouple.fitting.sampling import Inputs
from netdecouple.network import Array, Images, Network, Trainable
from netdecouple.planning.boxes import layout_of
from netdecouple.planning.divergence import (
    TINY,
    Comparison,
    Loss,
    are_probabilities,
    log_probabilities,
    rounding,
    weights_of,
)

BATCH = 64  # inputs per step, or as many as fit in memory
RATE = 1e-3  # of Adam, relative to the root mean square of every array of weights
WARM_UP = 0.03  # share of the time in which the rate rises from zero
CHECKS = 20  # how often the network is compared on held-out inputs
SHIFT = 8  # pictures are shifted by at most one part in so many of their size
KEPT = 4  # maps in memory per layer, for the gradients
STEP = "Refining"


def refine(
    network: Network,
    inputs: Inputs,
    applied: Applied,
    loss: Loss,
    minutes: float,
    progress: Progress = quiet,
) -> Applied:
    """Train the stages on the inputs that are fitted to, and keep the state with the least held-out loss.

    That state may be the one from before. Pictures are mirrored, shifted and mixed. The time decides how many
    steps there are, so that results differ from run to run.

    Raises:
        ModelError: PyTorch cannot run the network, or not with gradients.
    """
    if not applied.factorizations:
        return applied
    start, limit = monotonic(), 60 * minutes
    trained, teacher = network.trainable(applied.factorizations), network.trainable({})
    comparison = Comparison(_outputs(network, teacher, inputs.held_out), loss)

    def held_out_loss() -> float:
        return comparison.divergence(_outputs(network, trained, inputs.held_out))

    before = least = held_out_loss()
    check_time = monotonic() - start
    best, steps, checked = applied.factorizations, 0, 0
    groups = [{"params": [p], "lr": 0.0, "size": _size(p)} for p in trained.parameters]
    optimizer = torch.optim.Adam(groups)
    rng = np.random.default_rng(applied.plan.seed)
    for batch in _batches(network, inputs, rng):
        share = (monotonic() - start) / max(limit - check_time, TINY)
        due = min(int(share * CHECKS), CHECKS)
        if due > checked:
            checked = due
            if (now := held_out_loss()) < least:
                least, best = now, trained.factorizations()
            progress(STEP, checked, CHECKS)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * group["size"] * min(share / WARM_UP, (1 + math.cos(math.pi * share)) / 2)
        images = trained.augmented(batch, lambda pictures: augmented(pictures, rng))
        with torch.no_grad():
            right = teacher(images)
        value = _loss(right, trained(images), loss)
        if not torch.isfinite(value):
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        steps += 1
    progress(STEP, CHECKS, CHECKS)
    seconds = monotonic() - start
    refinement = Refinement(seconds=seconds, steps=steps, loss_before=before, loss=least)
    # the layers' own errors were those of other weights
    return replace(applied, factorizations=best, errors={}, refinement=refinement)


def check(network: Network, images: Images) -> None:
    """Find out before the work whether a network can be refined, by its first layer as a single stage.

    Raises:
        ModelError: PyTorch cannot run it, or not with gradients, or computes something else.
    """
    layer = next((la for la in network.layers if la.geometry and not la.reason), None)
    if layer is None or layer.geometry is None:
        return  # nothing will be changed
    arrays = (array.astype(np.float32) for array in (layer.weight, layer.bias))
    exact = Factorization.whole(layer.geometry, *arrays)
    trained, few = network.trainable({layer.name: exact}), images[network.batches(len(images))[0]][:2]
    original, outputs = network.run(few), trained(few)
    if any(output.ndim == 0 or len(output) != len(few) for output in outputs):
        raise ModelError(
            f"{network.name}: it cannot be refined, as not all outputs are one per input; leave out refine="
        )
    if not rounding(original, [output.numpy(force=True) for output in outputs]) <= network.tolerance:
        raise ModelError(
            f"{network.name}: it cannot be refined, as PyTorch computes something else; leave out refine="
        )
    _loss([torch.from_numpy(output) for output in original], outputs, "relative").backward()


@torch.no_grad()
def _outputs(network: Network, trained: Trainable, images: Images) -> list[Array]:
    parts = [trained(images[batch]) for batch in network.batches(len(images))]
    return [torch.cat(outputs).numpy(force=True) for outputs in zip(*parts, strict=True)]


def _size(parameter: Tensor) -> float:
    """The root mean square of an array of weights."""
    return float(parameter.detach().square().mean().sqrt()) or 1.0


def _batches(network: Network, inputs: Inputs, rng: np.random.Generator) -> Iterator[Images]:
    """Yield batches of the inputs that are fitted to, in a new order every time around, for ever."""
    images = inputs.images[: inputs.fitted]
    maps = (la.geometry.n_o * math.prod(la.output_size) * la.maps for la in network.layers if la.geometry)
    held = round(KEPT * 4 * sum(maps))
    size = min(BATCH, network.batches(inputs.fitted, held)[0].stop)
    while True:
        order = rng.permutation(inputs.fitted)
        for start in range(0, max(len(order) - size, 0) + 1, size):
            yield images[order[start : start + size]]


def augmented(pictures: Array, rng: np.random.Generator) -> Array:
    """Mirror half of the pictures (n, c, h, w), shift all, and mix each with another (Zhang et al. 2018)."""
    pictures = pictures.copy()
    n, _, h, w = pictures.shape
    mirrored = rng.random(n) < 0.5
    pictures[mirrored] = pictures[mirrored, ..., ::-1]
    rows, columns = (_shifted(size, n, rng) for size in (h, w))
    each = np.arange(n)[:, None, None]
    pictures = pictures[each, :, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2)
    mixed = np.asarray(rng.random(n), pictures.dtype)[:, None, None, None]
    return np.ascontiguousarray(mixed * pictures + (1 - mixed) * pictures[rng.permutation(n)])


def _shifted(size: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices (n, size) along an axis, shifted, and reflected at the ends."""
    most = size // SHIFT
    indices = np.abs(np.arange(size) + rng.integers(-most, most + 1, size=(n, 1)))
    return np.minimum(indices, 2 * (size - 1) - indices)


def _loss(original: Sequence[Tensor], outputs: Sequence[Tensor], loss: Loss) -> Tensor:
    """The divergence of outputs from the original's, with gradients: see `planning.divergence`."""
    arrays = [output.numpy(force=True) for output in original]
    layout = layout_of(arrays, len(arrays[0])) if loss == "boxes" else None
    # a detector's weights are those of a sum
    weights = map(_mean_weights, arrays) if layout is None else layout.weights(arrays)
    values = [
        _kl(a, b) if loss == "kl" else _weighted(a, b, weight)
        for a, b, weight in zip(original, outputs, weights, strict=True)
        if b.requires_grad
    ]
    if not values:
        raise ModelError("no output depends on a changed layer by way of gradients; leave out refine=")
    return torch.stack(values).mean()


def _kl(original: Tensor, outputs: Tensor) -> Tensor:
    right = original.numpy(force=True)
    target = torch.from_numpy(log_probabilities(right)).to(outputs)
    logs = outputs.clamp_min(1e-12).log() if are_probabilities(right) else outputs.log_softmax(dim=-1)
    return (target.exp() * (target - logs)).sum(dim=-1).mean()


def _weighted(original: Tensor, outputs: Tensor, weights: Array) -> Tensor:
    return (torch.from_numpy(np.asarray(weights)).to(outputs) * (outputs - original).square()).sum()


def _mean_weights(original: Array) -> Array:
    return weights_of(original) / original.size
