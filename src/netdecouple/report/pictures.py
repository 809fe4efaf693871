"""Network inputs as people see them: un-normalised, small, PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from netdecouple.data.preprocessing import Preprocessing
from netdecouple.network import Array

LARGEST = 224  # pixels along the longer side; more would only make the page heavy
TOLERANCE = 0.02  # by which what was rounded or resampled may leave 0..1


def pictures(inputs: Sequence[Array], preprocessing: Preprocessing) -> tuple[bytes, ...]:
    """Draw inputs (c, h, w); none if they do not have one channel or three.

    The mean and the standard deviation are taken back. Where that does not lead to values in 0..1 the inputs
    were made otherwise, and all are stretched to that range together.
    """
    if not inputs or any(x.ndim != 3 or x.shape[0] not in (1, 3) or not x.size for x in inputs):
        return ()
    channels = inputs[0].shape[0]
    mean, std = (np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    if {len(mean), len(std)} <= {1, channels}:
        shown = [x * std[:, None, None] + mean[:, None, None] for x in inputs]
    else:
        shown = list(inputs)
    low, high = float(min(x.min() for x in shown)), float(max(x.max() for x in shown))
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        span = max(high - low, 1e-30)
        shown = [(x - low) / span for x in shown]
    return tuple(_png(np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)) for x in shown)


def _png(pixels: np.ndarray) -> bytes:
    """Write (c, h, w) bytes."""
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
