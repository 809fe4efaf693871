"""Draw network inputs as small pictures: normalisation undone, PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from netdecouple.data.preprocessing import Preprocessing
from netdecouple.network import Array

LARGEST = 224  # pixels along the longer side, to keep pages small
TOLERANCE = 0.02  # rounded or resampled values may leave 0..1 by this much


def pictures(inputs: Sequence[Array], preprocessing: Preprocessing) -> tuple[bytes, ...]:
    """Draw inputs (c, h, w); return none unless all have one channel or three.

    Normalisation by mean and standard deviation is undone. If that does not give values in 0..1, another
    preprocessing was used, and all inputs are scaled together to that range.
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
    """Encode uint8 pixels (c, h, w)."""
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
