"""Sensitivity: how much the network's outputs change with the error of one layer.

A few candidates of every layer are probed: fitted, put into the network alone, and the outputs compared. The
losses of all other candidates are interpolated between the probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from netdecouple.errors import ModelError
from netdecouple.families.base import reference
from netdecouple.fitting.sampling import Inputs, sample_positions
from netdecouple.network import Array, Images, Layer, Network
from netdecouple.planning.candidates import Candidate
from netdecouple.planning.divergence import Comparison, Loss

PROBE_MACS = 2e12  # of all probes together; more takes long and changes few plans
LEAST_SAMPLES: dict[Loss, int] = {
    "kl": 16,
    "relative": 4,
    "boxes": 4,
}  # of a probe; an output map says more than a class
MANY_SAMPLES = 64  # if three probes per layer cannot have as many, one probe is made
STEEPEST = 8.0  # greatest power of the error with which a loss may rise beyond the probes; 5.7 was measured
ROUNDING = 1e-12  # errors and losses below are rounding
# Where plain ND competes, the errors of all other methods count as 1.25 times as large in the choice: they
# rely on correlations between a layer's inputs, which errors of earlier layers weaken. On 1,690 images that
# no fit has used, the logits' relative error is 1 to 3 % lower than with 1.0 (ResNet-20 at 2.8× and 3.5×,
# ResNet-56 at 2.8×); in KL there is no difference.
MARGIN = 1.25


@dataclass(frozen=True)
class OriginalOutputs:
    """Outputs of the original network on the held-out inputs. The network runs at the first use.

    Raises:
        ModelError: NaN or Inf.
    """

    network: Network
    inputs: Inputs
    layers: Sequence[Layer]  # to search for the cause of NaN and Inf

    @cached_property
    def outputs(self) -> list[Array]:
        """The network's outputs; all of them are finite."""
        images = self.inputs.held_out
        outputs = self.network.run(images)
        if all(np.isfinite(o).all() for o in outputs if o.dtype.kind == "f"):
            return outputs
        positions = {la.name: sample_positions(la, len(images), 0) for la in self.layers}
        for observation in self.network.observe(images, positions):
            observation.patches  # noqa: B018  # raises at the first layer that reads or makes NaN or Inf
        raise ModelError(
            "the network's outputs are NaN or Inf on the calibration images; check the preprocessing"
        )

    def probe_samples(self, count: int, loss: Loss) -> tuple[Images, Comparison]:
        """Return the first ``count`` held-out inputs, and the comparison with the outputs on them.

        The network runs again instead of cutting ``outputs``, as an output (boxes of a detector, for example)
        need not have one row per input.
        """
        images = self.inputs.held_out[:count]
        outputs = self.outputs if count >= len(self.inputs.held_out) else self.network.run(images)
        return images, Comparison(outputs, loss)


def probe_counts(layers: int, macs: int, samples: int, loss: Loss) -> tuple[int, int]:
    """Return how many candidates to probe of every one of ``layers``, and on how many of ``samples`` inputs.

    ``macs`` are those of the whole network, for one input.
    """
    probes = 3 if 3 * layers * MANY_SAMPLES * macs < PROBE_MACS else 1
    least = min(LEAST_SAMPLES[loss], samples)
    return probes, int(np.clip(PROBE_MACS / (probes * layers * macs), least, samples))


def errors_with_margin(candidates: Sequence[Candidate]) -> list[float]:
    """Return the candidates' relative errors to choose by: times `MARGIN`, except for plain ND."""
    preferred = reference().name
    competes = any(c.method == preferred for c in candidates)
    return [c.relative_error * (MARGIN if competes and c.method != preferred else 1.0) for c in candidates]


def predicted_losses(
    errors: Sequence[float], probe_errors: Sequence[float], probe_losses: Sequence[float]
) -> tuple[float, ...]:
    """Predict the loss for each of a layer's relative errors: interpolate log loss over log error.

    Below the probes the loss is proportional to the error, as it is for small perturbations. Beyond them it
    rises as between the last two probes, and at least in proportion to the error. It never falls as the error
    rises.
    """
    if not probe_errors:
        return ()
    pairs = sorted(zip(probe_errors, probe_losses, strict=True))
    x, y = np.log(np.maximum(np.array(pairs).T, ROUNDING))  # log error, log loss
    at = np.log(np.maximum(errors, ROUNDING))
    ratios = np.interp(at, x, y - x)
    if len(pairs) > 1 and x[-1] > x[-2]:
        slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
        ratios += (np.clip(slope, 1.0, STEEPEST) - 1.0) * np.maximum(at - x[-1], 0.0)
    losses = np.exp(at + ratios)
    rising = np.argsort(at, kind="stable")
    losses[rising] = np.maximum.accumulate(losses[rising])
    return tuple(float(v) for v in losses)
