"""Turn pictures into network inputs: resize, crop and normalise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from netdecouple.errors import CalibrationError
from netdecouple.execution import limits

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

_MODES = {1: "L", 3: "RGB"}  # of Pillow, by number of channels


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preprocessing of pictures: resize, centre crop, (value / 255 - mean) / std.

    Attributes:
        size: (H, W) of the crop in pixels; None keeps the size of the picture.
        mean: per channel, of values in 0..1 (those of 0..255 divided by 255); one serves all channels.
        std: per channel, like ``mean``.
        resize: shorter side in pixels before the centre crop, as in torchvision; None resizes straight to
            ``size``. If the crop is larger than the resized picture, the picture is enlarged, never padded.

    Raises:
        CalibrationError: a number is not finite, not positive or of values in 0..255, or ``resize`` is
            smaller than the crop.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: int | None = None

    def __post_init__(self) -> None:
        if not self.mean or not all(map(math.isfinite, self.mean)):
            raise CalibrationError(f"mean {self.mean}: give one finite number, or one per channel")
        if not self.std or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise CalibrationError(f"std {self.std}: give one positive number, or one per channel")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if max(map(abs, values)) > 1:
                scaled = ",".join(f"{value / 255:.4g}" for value in values)
                raise CalibrationError(
                    f"{name} {values}: values are in 0..1 here, and these are of 0..255; divide mean and std "
                    f"by 255 ({name} {scaled}; a std of 1 is {1 / 255:.4g})"
                )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise CalibrationError(f"size {self.size}: give height and width, both positive")
        if self.resize is not None and self.resize < min(self.size or (1,)):
            raise CalibrationError(f"resize {self.resize}: give at least the shorter side of the crop")

    @staticmethod
    def preset(name: str) -> Preprocessing:
        """Return one of PRESETS; dataclasses.replace changes parts of it."""
        if name not in PRESETS:
            raise CalibrationError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def resized_for(self, size: tuple[int, int] | None) -> Preprocessing:
        """Return the same preprocessing for another crop (H, W); ``resize`` keeps its ratio to the crop."""
        if size is None or size == self.size:
            return self
        if self.resize is None or self.size is None:
            return replace(self, size=size)
        return replace(self, size=size, resize=round(self.resize * min(size) / min(self.size)))

    def __call__(self, images: U8) -> F32:
        """Preprocess pictures (N, H, W, C), uint8, to (N, C, H', W'); only normalise those of ``size``."""
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise CalibrationError(f"found {images.dtype} {images.shape}, expected uint8 (N, H, W, C)")
        channels = images.shape[3]
        if images.shape[1:3] == self.size or (self.size is None and self.resize is None):
            return self.normalise(images)
        self.check(channels)
        pictures = (Image.fromarray(image.squeeze(2) if channels == 1 else image) for image in images)
        return self.normalise([self.crop(picture, channels) for picture in pictures])

    def picture(self, picture: Image.Image, channels: int) -> F32:
        """Preprocess one Pillow image to (1, channels, H, W)."""
        self.check(channels)
        return self.normalise([self.crop(picture, channels)])

    def crop(self, picture: Image.Image, channels: int) -> U8:
        """Rotate a Pillow image as its EXIF data say, resize and crop it to (H, W, channels)."""
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith(("I", "F")):  # convert() would clip the values without a warning
            raise CalibrationError(f"mode {upright.mode} has more than 8 bits: save 8 bits, or give arrays")
        fitted = self._fit(upright.convert(_MODES[channels]))
        return np.asarray(fitted).reshape(fitted.height, fitted.width, channels)

    def normalise(self, crops: Sequence[U8] | U8) -> F32:
        """Turn crops (H, W, C) of one size into (N, C, H, W)."""
        shapes = sorted({crop.shape for crop in crops})
        if len(shapes) > 1:
            raise CalibrationError(f"pictures differ in shape, {shapes[0]} and {shapes[-1]}: give a size")
        height, width, channels = shapes[0]
        mean, std = self._scale(channels)
        images = np.empty((len(crops), channels, height, width), np.float32)
        for image, crop in zip(images, crops, strict=True):
            image[...] = crop.transpose(2, 0, 1)
            image /= np.float32(255)
            image -= mean
            image /= std
        return images

    def check(self, channels: int) -> None:
        """Raise CalibrationError unless pictures can become inputs with that number of channels."""
        if channels not in _MODES:
            raise CalibrationError(f"pictures have 1 or 3 channels, not {channels}: give arrays of floats")
        self._scale(channels)

    def _fit(self, picture: Image.Image) -> Image.Image:
        if self.resize is None:
            return picture if self.size is None else _resample(picture, self.size[::-1])
        shorter = min(picture.size)
        width, height = (self.resize * side // shorter for side in picture.size)
        if self.size is None:
            return _resample(picture, (width, height))
        crop_height, crop_width = self.size
        enlarge = max(1.0, crop_width / width, crop_height / height)
        width, height = max(crop_width, round(width * enlarge)), max(crop_height, round(height * enlarge))
        left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
        return _resample(picture, (width, height)).crop((left, top, left + crop_width, top + crop_height))

    def _scale(self, channels: int) -> list[F32]:  # mean and std, each (C, 1, 1)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise CalibrationError(f"{name} has {len(values)} values: give one, or {channels} (channels)")
        return [np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std)]


PRESETS = {
    "imagenet": Preprocessing(
        size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256
    ),
    "cifar10": Preprocessing(size=(32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "none": Preprocessing(),
}


def _resample(picture: Image.Image, size: tuple[int, int]) -> Image.Image:  # size (W, H)
    # Pillow checks the size of the file's picture only; a very long picture becomes larger
    what = f"resized to {size[0]}x{size[1]} before the crop it"
    limits.PIXELS.check(math.prod(size), what, CalibrationError)
    return picture.resize(size, Image.Resampling.BILINEAR)
