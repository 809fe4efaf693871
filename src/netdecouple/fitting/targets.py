"""What layers are fitted to: the original network's outputs, recorded at sampled positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from netdecouple.execution.memory import ArrayStore
from netdecouple.execution.progress import Progress, quiet
from netdecouple.execution.run import Run
from netdecouple.fitting.sampling import Inputs, sample_positions
from netdecouple.network import Array, Network, Observation
from netdecouple.planning.eligibility import EXCLUDED
from netdecouple.planning.plan import Plan


class Targets:
    """Targets of asymmetric reconstruction (DESIGN §4), for all layers that some plans change.

    A layer is fitted to ``t = (y + s) - s'``: y is its output in the original network, s the original's
    shortcut that is added to y, and s' the same shortcut in the partly decoupled network. So the last layer
    of a residual branch also corrects the error that the shortcut has by then. Without a shortcut, t = y.

    All layers that could be changed are observed, whatever the plans say, because a runtime may round
    differently when fewer tensors are asked for: the targets of several plans are, bit by bit, those of each
    of them.

    Args:
        inputs: all inputs, or those of one ``part`` of ``total``.
    """

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        plans: Sequence[Plan],
        progress: Progress = quiet,
        part: slice | None = None,
        total: int = 0,
    ) -> None:
        count = len(inputs.images)
        excluded = {row.name for row in plans[0].layers if row.reason == EXCLUDED}
        able = [la for la in network.layers if la.geometry and not la.reason and la.name not in excluded]
        fitted = {row.name for plan in plans for row in plan.layers if row.changed and not row.data_free}
        part, total = part or slice(0, count), total or count
        self.positions = {la.name: sample_positions(la, total, plans[0].seed)[part] for la in able}
        self.sums = {la.name: np.zeros((2, len(la.bias))) for la in able if la.name in fitted}  # of y, of y²
        self._store = ArrayStore(network.memory.store_bytes, network.memory.scratch)  # y + s
        self._batches: dict[str, list[slice]] = {name: [] for name in fitted}
        for observed in network.observe(inputs.images, self.positions if fitted else {}, with_patches=False):
            progress("Recording targets", min(observed.images.stop, count), count)
            if observed.layer not in fitted:
                continue
            y, s = observed.outputs, observed.shortcut
            self.sums[observed.layer] += [
                y.sum(axis=0, dtype=np.float64),
                np.square(y, dtype=np.float64).sum(axis=0),
            ]
            self._store[observed.layer, observed.images.start] = y if s is None else y + s
            self._batches[observed.layer].append(observed.images)

    def of(self, observed: Observation) -> Array | None:
        """Return the targets t (n · p, n_o) of a batch of the partly decoupled network.

        None if the original network did not run the layer for all of its images: which layers are run may
        depend on the images. The batches of the two networks need not be the same.
        """
        layer, images = observed.layer, observed.images
        per_image = self.positions[layer].shape[1]
        rows = []
        for batch in self._batches[layer]:
            if batch.start < images.stop and images.start < batch.stop:
                begin = max(images.start - batch.start, 0) * per_image
                rows.append(self._store[layer, batch.start][begin : (images.stop - batch.start) * per_image])
        if sum(map(len, rows)) < len(observed.patches):
            return None
        t = np.concatenate(rows) if rows else observed.outputs
        return t if observed.shortcut is None else t - observed.shortcut


def targets_for(
    network: Network, inputs: Inputs, plans: Sequence[Plan], progress: Progress, run: Run
) -> Targets | None:
    """Record the original network's outputs once for all ``plans``.

    None if this process does not need all of them: with workers, with several shards, or data-free.
    """
    alone = run.workers is None and run.shards == 1
    return Targets(network, inputs, plans, progress) if alone and not plans[0].data_free else None
