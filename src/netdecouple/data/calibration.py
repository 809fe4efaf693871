"""Turn what a user has (a folder of images, a file of arrays, a function) into float32 NCHW arrays.

uint8 means pictures: NHWC, 0..255, to be preprocessed. Floating point means network inputs: NCHW,
taken as they are. Low-level errors say what is wrong; the source is named once, at the top.
"""

import contextlib
import hashlib
import importlib
import math
import os
import re
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from netdecouple.errors import CalibrationError
from netdecouple.execution import limits

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

PRESETS = ("imagenet", "cifar10", "none")
NOISE = "noise"  # where samples come from that nobody gave
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARRAY_EXTENSIONS = (".npy", ".npz")

_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # not EPS: it would start a program
_MODES = {1: "L", 3: "RGB"}
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SOURCES = "a folder of images, FILE.npy, FILE.npz[:KEY] or MODULE:FUNCTION"


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a network input: resize, centre crop, (value / 255 - mean) / std.

    `size` is (H, W) in pixels; None keeps the size of the picture. `resize` is the shorter side before
    the centre crop, as in torchvision; None resizes straight to `size`. A picture that the crop would
    overlap is enlarged to cover it, never padded. `mean` and `std` are per channel, of values in 0..1;
    one value serves all channels. Raises CalibrationError for numbers that make no sense.
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
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise CalibrationError(f"size {self.size}: give height and width, both positive")
        if self.resize is not None and self.resize < min(self.size or (1,)):
            raise CalibrationError(f"resize {self.resize}: give at least the shorter side of the crop")

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the preprocessing known as `name`, one of PRESETS; dataclasses.replace changes parts."""
        if name == "imagenet":
            return cls((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=256)
        if name == "cifar10":
            return cls((32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        if name == "none":
            return cls()
        raise CalibrationError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")

    def resized_for(self, size: tuple[int, int] | None) -> Self:
        """Return the same preprocessing for another crop (H, W); `resize` keeps its ratio to the crop."""
        if size is None or size == self.size:
            return self
        if self.resize is None or self.size is None:
            return replace(self, size=size)
        return replace(self, size=size, resize=round(self.resize * min(size) / min(self.size)))

    def __call__(self, images: U8) -> F32:
        """Preprocess pictures (N, H, W, C), uint8, to (N, C, H', W'); those of `size` are only normalised."""
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise CalibrationError(f"found {_describe(images)}, expected uint8 (N, H, W, C)")
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
        """Turn a Pillow image upright as its EXIF data say, resize and crop it, to (H, W, channels)."""
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith(("I", "F")):  # convert() would clip, silently
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
        """Raise CalibrationError unless pictures can become inputs of that many channels."""
        if channels not in _MODES:
            raise CalibrationError(f"pictures have 1 or 3 channels, not {channels}: give arrays (N, C, H, W)")
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

    def _scale(self, channels: int) -> list[F32]:  # two of (C, 1, 1)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise CalibrationError(f"{name} has {len(values)} values: give one, or {channels} (channels)")
        return [np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std)]


@dataclass(frozen=True, eq=False)
class Samples:
    """Network inputs, `images` (N, C, H, W) float32, their source, and the names of unreadable files."""

    images: F32
    origin: str
    skipped: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return the SHA-256 of shape and values, in hexadecimal."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images, dtype="<f4").data)
        return digest.hexdigest()


def load(
    source: str | os.PathLike[str],
    *,
    channels: int,
    size: tuple[int, int] | None,
    preprocessing: Preprocessing,
    samples: int | None,
    seed: int,
) -> Samples:
    """Load inputs for a network that takes (N, channels, *size); `size` is None when it is dynamic.

    `source` is a folder of images (searched recursively, without hidden files and linked folders),
    FILE.npy, FILE.npz[:KEY] or MODULE:FUNCTION; an existing path always wins. A fixed network size
    replaces that of `preprocessing`. Of more than `samples` inputs a seeded random subset is taken, in
    their order; of a generator, the first. Raises CalibrationError, naming the source.
    """
    text = os.fspath(source)
    with _naming(text):
        request = _Request(channels, size, preprocessing.resized_for(size), samples, seed)
        path, key = _split_key(text)
        if os.path.isdir(path):
            return request.from_folder(Path(path))
        if os.path.isfile(path) and path.lower().endswith(ARRAY_EXTENSIONS):
            return Samples(request.inputs(_read_array(path, key)), text)
        if os.path.exists(path):
            raise CalibrationError(f"this kind of file is not supported: give {_SOURCES}")
        if names_function(text):
            return Samples(request.inputs(call(text)), text)
        raise CalibrationError(f"not found: give {_SOURCES}")


def load_labelled(
    source: str | os.PathLike[str],
    *,
    channels: int,
    size: tuple[int, int] | None,
    preprocessing: Preprocessing,
    samples: int | None,
    seed: int,
) -> tuple[Samples, npt.NDArray[np.int64]]:
    """Load FILE.npz:IMAGES,LABELS; return the inputs, as `load` does, and the labels (N,) of the same."""
    text = os.fspath(source)
    with _naming(text):
        request = _Request(channels, size, preprocessing.resized_for(size), samples, seed)
        path, key = _split_key(text)
        keys = (key or "").split(",")
        if len(keys) != 2 or not os.path.isfile(path):
            problem = "labels are missing" if os.path.isfile(path) else "not found"
            raise CalibrationError(f"{problem}: give FILE.npz:IMAGES,LABELS, with the names of two arrays")
        batch, labels = request.batched(_read_array(path, keys[0])), _read_array(path, keys[1])
        if labels.dtype.kind not in "iu" or labels.shape != (len(batch),):
            raise CalibrationError(f"labels are {_describe(labels)}, expected integers ({len(batch)},)")
        chosen = request.chosen(len(batch))
        return Samples(request.converted(batch, chosen), text), labels[chosen].astype(np.int64)


def from_arrays(
    arrays: AnyArray | Iterable[AnyArray],
    *,
    channels: int,
    size: tuple[int, int] | None,
    preprocessing: Preprocessing,
    samples: int | None,
    seed: int,
    origin: str = "arrays",
) -> Samples:
    """Take an array, or an iterable of arrays, by the rules of `load`; the result never shares their memory.

    Each array is float (N, C, H, W) or (C, H, W), or uint8 (N, H, W, C), or (N, H, W) for one channel.
    """
    with _naming(origin):
        request = _Request(channels, size, preprocessing.resized_for(size), samples, seed)
        return Samples(request.inputs(arrays), origin)


@dataclass(frozen=True)
class _Request:
    """What the network takes, how pictures get there, and how many of them."""

    channels: int
    size: tuple[int, int] | None
    preprocessing: Preprocessing
    samples: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise CalibrationError(f"{self.samples} samples asked for: ask for at least 1")

    def chosen(self, available: int) -> Indices:
        if self.samples is None or self.samples >= available:
            return np.arange(available)
        return np.sort(np.random.default_rng(self.seed).permutation(available)[: self.samples])

    def inputs(self, arrays: Any) -> F32:
        if hasattr(arrays, "__array__"):
            batch = self.batched(arrays)
            return self.converted(batch, self.chosen(len(batch)))
        if not isinstance(arrays, Iterable):
            raise CalibrationError(f"found {type(arrays).__name__}: give an array or an iterable of arrays")
        limit = None if isinstance(arrays, Sequence) else self.samples  # a generator may be endless
        batches: list[F32] = []
        count = 0
        for array in _blamed(arrays):
            batch = self.batched(array)
            batch = batch if limit is None else batch[: limit - count]
            batches.append(self.converted(batch, np.arange(len(batch))))
            count += len(batch)
            if count == limit:
                break
        images = _stack(batches)
        chosen = self.chosen(count)
        return images if len(chosen) == count else images[chosen]

    def batched(self, array: Any) -> AnyArray:
        """Return the array with four axes, or raise unless its dtype and shape fit the network."""
        if not hasattr(array, "__array__"):
            raise CalibrationError(f"found {type(array).__name__} among the arrays: give inputs only")
        with _blaming("cannot be made a NumPy array"):
            batch: AnyArray = np.asarray(array)
        found = _describe(batch)
        if batch.dtype == np.uint8:
            batch = batch[..., None] if batch.ndim == 3 and self.channels == 1 else batch
            fits, layout = batch.shape[3:] == (self.channels,), f"pictures (N, H, W, {self.channels})"
        elif batch.dtype.kind == "f":
            batch = batch[None] if batch.ndim == 3 else batch
            fits = batch.ndim == 4 and batch.shape[1:] == (self.channels, *(self.size or batch.shape[2:]))
            height, width = self.size or ("H", "W")
            layout = f"float inputs (N, {self.channels}, {height}, {width})"
        else:
            raise CalibrationError(f"found {found}: give uint8 (N, H, W, C) or float (N, C, H, W)")
        if not fits or not batch.size:
            raise CalibrationError(f"found {found}, expected {layout}, not empty: transpose or resize them")
        return batch

    def converted(self, batch: AnyArray, chosen: Indices) -> F32:
        if batch.dtype == np.uint8:
            self.check_bytes(len(chosen), *(self.preprocessing.size or batch.shape[1:3]))
            return self.preprocessing(batch[chosen])
        self.check_bytes(len(chosen), *batch.shape[2:])
        images = np.empty((len(chosen), *batch.shape[1:]), np.float32)
        for image, index in zip(images, chosen, strict=True):
            with np.errstate(over="ignore"):
                image[...] = batch[index]
            if not np.isfinite(image).all():
                raise CalibrationError(f"sample {index} has NaN or infinite values: repair or remove it")
        return images

    def check_bytes(self, count: int, height: int, width: int) -> None:
        """Raise CalibrationError if so many inputs of that size would take more than the limit."""
        limits.SAMPLE_BYTES.check(
            4 * count * self.channels * height * width, "as inputs this", CalibrationError
        )

    def from_folder(self, folder: Path) -> Samples:
        self.preprocessing.check(self.channels)  # what fails for all is not the fault of the first
        names = sorted(_image_names(folder))
        if not names:
            raise CalibrationError(f"no images in this folder: it should hold {' '.join(IMAGE_EXTENSIONS)}")
        wanted = min(self.samples or len(names), len(names))
        order = np.random.default_rng(self.seed).permutation(len(names))
        crops: dict[str, U8] = {}
        skipped: dict[str, str] = {}
        if self.preprocessing.size is not None:
            self.check_bytes(wanted, *self.preprocessing.size)
        held = 0
        for name in (names[index] for index in order):  # others take the place of unreadable ones
            try:
                crops[name] = self._read_crop(folder / name)
            except Exception as error:  # decoders of damaged files raise anything
                skipped[name] = _brief(error)
            else:
                held += crops[name].nbytes
                limits.SAMPLE_BYTES.check(4 * held, "as inputs this", CalibrationError)
            if len(crops) == wanted:
                break
        if not crops:
            name, reason = min(skipped.items())
            raise CalibrationError(f"none of {len(skipped)} can be read, {name} ({reason}): add others")
        images = self.preprocessing.normalise([crops[name] for name in sorted(crops)])
        return Samples(images, str(folder), tuple(sorted(skipped)))

    def _read_crop(self, path: Path) -> U8:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise CalibrationError("is no file")
        with warnings.catch_warnings(), _pixels_within_the_limit():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                with Image.open(path, formats=_IMAGE_FORMATS) as picture:
                    return self.preprocessing.crop(picture, self.channels)
            except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
                limit = f"more than {limits.PIXELS.value:,} pixels"
                raise CalibrationError(f"{limit}; set {limits.PIXELS.variable} if that is meant") from error


@contextlib.contextmanager
def _pixels_within_the_limit() -> Iterator[None]:
    """Let Pillow's guard against small files of large pictures heed our limit; it has no other setting."""
    usual = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limits.PIXELS.value
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = usual


def _image_names(folder: Path) -> Iterator[str]:
    """Yield the images below the folder, relative to it, with forward slashes."""

    def unlisted(error: OSError) -> NoReturn:
        raise CalibrationError(f"cannot be listed ({_brief(error)}): check its permissions") from error

    for parent, children, files in os.walk(folder, onerror=unlisted):
        children[:] = [child for child in children if not child.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS):
                yield (Path(parent) / name).relative_to(folder).as_posix()


def _split_key(text: str) -> tuple[str, str | None]:
    """Split FILE.npz:KEY; an existing file wins, so that drive letters and colons in names do no harm."""
    if os.path.exists(text):
        return text, None
    colons = [match.start() for match in re.finditer(":", text)]
    splits = [(text[:at], text[at + 1 :]) for at in colons if text[:at].lower().endswith(ARRAY_EXTENSIONS)]
    existing = [split for split in splits if os.path.isfile(split[0])]
    return next(iter(existing + splits), (text, None))


def _read_array(path: str, key: str | None) -> AnyArray:
    with _blaming("cannot be read: save it with numpy.save or numpy.savez, without objects"):
        if not zipfile.is_zipfile(path):
            if key is not None:
                raise CalibrationError(f"the file holds one array without a name: leave out ':{key}'")
            with open(path, "rb") as file:
                _check_header(file, os.path.getsize(path))
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # only the subset is read
        with zipfile.ZipFile(path) as archive:
            member = _find_member(archive, key)
            limits.SAMPLE_BYTES.check(member.file_size, f"{member.filename} unpacked", CalibrationError)
            with archive.open(member) as file:
                _check_header(file, member.file_size)
            with archive.open(member) as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _find_member(archive: zipfile.ZipFile, key: str | None) -> zipfile.ZipInfo:
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    if key is None:
        found = (
            list(members) if len(members) == 1 else [n for n in members if _axes(archive, members[n]) == 4]
        )
    else:
        found = [name for name in members if name == key]
    if len(found) != 1:
        raise CalibrationError(f"choose one array: FILE.npz:KEY with KEY among {', '.join(members)}")
    return members[found[0]]


def _axes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    with archive.open(member) as file:
        try:
            return len(_check_header(file, member.file_size))
        except ValueError:  # an array of objects, or none at all
            return 0


def _check_header(file: IO[bytes], size: int) -> tuple[int, ...]:
    """Return the shape of an array in the .npy format; ValueError unless it fits into ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format, which plain arrays are not written in")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("objects, which could run programs when they are read, are refused")
    if min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"the file is shorter than an array {shape} of {dtype}; copy it again")
    return shape


def names_function(source: str) -> bool:
    """Tell whether this is MODULE:FUNCTION, and no file."""
    path, key = _split_key(source)
    return key is None and not os.path.exists(path) and _FUNCTION.fullmatch(source) is not None


def call(name: str) -> Any:
    """Import MODULE, also from the current directory, and call its FUNCTION without arguments.

    Raises:
        CalibrationError: the module or the function is not there, or fails.
    """
    module_name, _, function_name = name.partition(":")
    with _blaming(f"cannot import {module_name}"):
        here = os.getcwd()
        sys.path.insert(0, here)
        try:
            module = importlib.import_module(module_name)
        finally:
            with contextlib.suppress(ValueError):  # the module may have tidied up itself
                sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise CalibrationError(f"{module_name} has no such function: correct the name")
    with _blaming(f"{function_name}() failed"):
        return function()


def _blamed(arrays: Iterable[Any]) -> Iterator[Any]:
    with _blaming("failed while it made its arrays"):
        yield from arrays


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(" ".join(f"{source}: {error}".splitlines())) from error


@contextlib.contextmanager
def _blaming(problem: str) -> Iterator[None]:
    """Report as CalibrationError what code outside this file raises, sys.exit() included."""
    try:
        yield
    except CalibrationError:
        raise
    except (Exception, SystemExit) as error:
        raise CalibrationError(f"{problem} ({_brief(error)})") from error


def _brief(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def _describe(array: AnyArray) -> str:
    return f"{array.dtype} {array.shape}"


def _resample(picture: Image.Image, size: tuple[int, int]) -> Image.Image:  # size (W, H)
    # a very long picture passes Pillow's own guard
    limits.PIXELS.check(
        math.prod(size), f"resized to {size[0]}x{size[1]} before the crop it", CalibrationError
    )
    return picture.resize(size, Image.Resampling.BILINEAR)


def _stack(batches: list[F32]) -> F32:
    """Join batches (n, C, H, W) of one size."""
    if not batches:
        raise CalibrationError("there are no samples: give at least one")
    shapes = sorted({batch.shape[1:] for batch in batches})
    if len(shapes) > 1:
        raise CalibrationError(f"samples differ in shape, {shapes[0]} and {shapes[-1]}: give one size")
    return np.concatenate(batches)
