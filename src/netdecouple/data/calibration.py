"""Load calibration inputs from a folder of images, a file of arrays or a function: float32, as networks ask.

Arrays of uint8 are pictures, NHWC with values in 0..255, and are preprocessed. Arrays of floating point are
network inputs, and are not changed. Every error starts with the name of the source.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from netdecouple.data.preprocessing import F32, U8, Preprocessing
from netdecouple.errors import CalibrationError
from netdecouple.execution import limits

AnyArray = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]

GREY_AS = 3  # channels that grey pictures are repeated to, as Pillow does
NOISE = "noise"  # origin of samples that are random because no calibration inputs were given
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ARRAY_EXTENSIONS = (".npy", ".npz")

_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # not EPS: it starts Ghostscript
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SOURCES = "a folder of images, FILE.npy, FILE.npz[:KEY] or MODULE:FUNCTION"


@dataclass(frozen=True, eq=False)
class Samples:
    """Network inputs, float32, their source, and the names of unreadable files."""

    images: F32
    origin: str
    skipped: tuple[str, ...] = ()


def load(
    source: str | os.PathLike[str] | AnyArray | Iterable[AnyArray],
    *,
    channels: int,
    size: tuple[int, int] | None,
    preprocessing: Preprocessing,
    samples: int | None,
    seed: int,
    channels_last: bool = False,
    is_free: bool = False,
) -> Samples:
    """Load inputs for a network with some number of channels and, if it is fixed, a size (H, W).

    They are (N, C, H, W), or (N, H, W, C) with the channels last. A network ``is_free`` if it may take
    something else than pictures: then floats that have not four axes are (N, …), and all floats are if it
    has 0 ``channels``.

    Args:
        source: a folder of images (searched recursively, without hidden files and links to folders outside
            it), FILE.npy, FILE.npz[:KEY] or MODULE:FUNCTION, where an existing path comes first; or an array
            or an iterable of arrays, each float, as the result or one of it; or uint8 (N, H, W, C), one
            (H, W, C), or grey (N, H, W). The result is a copy.
        preprocessing: of pictures, not of floating-point arrays; ``size`` replaces its own.
        samples: how many inputs to take, at most; None takes all. Of more inputs a random subset is taken, in
            the order of the source; of a generator, the first.

    Raises:
        CalibrationError: the source cannot be read, or its inputs do not fit the network.
    """
    text = os.fspath(source) if isinstance(source, str | os.PathLike) else "arrays"
    with _prefixed(text):
        loader = _Loader(
            channels, size, preprocessing.resized_for(size), channels_last, is_free, samples, seed
        )
        if not isinstance(source, str | os.PathLike):
            return Samples(loader.inputs(source), text)
        path, key = _split_key(text)
        if os.path.isdir(path):
            return loader.from_folder(Path(path))
        if os.path.isfile(path) and path.lower().endswith(ARRAY_EXTENSIONS):
            return Samples(loader.inputs(_read_array(path, key)), text)
        if os.path.exists(path):
            raise CalibrationError(f"this kind of file is not supported: give {_SOURCES}")
        if names_function(text):
            return Samples(loader.inputs(call(text)), text)
        raise CalibrationError(f"not found: give {_SOURCES}")


def load_labelled(
    source: str | os.PathLike[str],
    *,
    channels: int,
    size: tuple[int, int] | None,
    preprocessing: Preprocessing,
    channels_last: bool = False,
    is_free: bool = False,
) -> tuple[F32, Indices | F32]:
    """Load FILE.npz:IMAGES,LABELS as `load` does; return all inputs and their `answers`."""
    text = os.fspath(source)
    with _prefixed(text):
        loader = _Loader(channels, size, preprocessing.resized_for(size), channels_last, is_free)
        path, key = _split_key(text)
        keys = (key or "").split(",")
        if len(keys) != 2 or not os.path.isfile(path):
            problem = "labels are missing" if os.path.isfile(path) else "not found"
            raise CalibrationError(f"{problem}: give FILE.npz:IMAGES,LABELS, with the names of two arrays")
        batch = loader.batched(_read_array(path, keys[0]))
        right = answers(_read_array(path, keys[1]), len(batch))
        return loader.converted(batch), right


def named(source: str | os.PathLike[str], names: Iterable[str]) -> dict[str, AnyArray]:
    """Read the arrays of FILE.npz, with a key or without, that have some of these names; {} of other sources.

    Raises CalibrationError if one cannot be read.
    """
    path, _ = _split_key(os.fspath(source))
    if not zipfile.is_zipfile(path):
        return {}
    with _prefixed(path), zipfile.ZipFile(path) as archive:
        there = {member.filename.removesuffix(".npy") for member in archive.infolist()}
        return {name: _read_array(path, name) for name in names if name in there}


def answers(labels: Any, count: int) -> Indices | F32:
    """Return class labels (N,), or the images (N, …) that a network should return; uint8 ones as 0 to 1.

    Raises CalibrationError unless there are ``count``.
    """
    array = np.asarray(labels)
    if array.ndim > 2 and len(array) == count and array.dtype.kind in "fu":
        return array.astype(np.float32) / np.float32(255 if array.dtype == np.uint8 else 1)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        advice = ""
        if array.ndim == 2 and len(array) == count and np.all((array != 0).sum(axis=1) == 1):
            advice = "; of one-hot labels give labels.argmax(axis=1)"
        raise CalibrationError(f"labels are {array.dtype} {array.shape}, expected {count} integers{advice}")
    return array.astype(np.int64)


@dataclass(frozen=True)
class _Loader:
    """The arguments of `load`, with the preprocessing adapted to the network."""

    channels: int  # 0: it takes no pictures
    size: tuple[int, int] | None
    preprocessing: Preprocessing
    channels_last: bool = False
    is_free: bool = False
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise CalibrationError(f"{self.samples} samples asked for: ask for at least 1")

    def chosen(self, available: int) -> Indices:
        """Return the indices of the random subset, ascending."""
        if self.samples is None or self.samples >= available:
            return np.arange(available)
        return np.sort(np.random.default_rng(self.seed).permutation(available)[: self.samples])

    def inputs(self, arrays: Any) -> F32:
        """Convert an array or an iterable of arrays."""
        if hasattr(arrays, "__array__"):
            batch = self.batched(arrays)
            return self.converted(batch, self.chosen(len(batch)))
        if not isinstance(arrays, Iterable):
            raise CalibrationError(f"found {type(arrays).__name__}: give an array or an iterable of arrays")
        limit = None if isinstance(arrays, Sequence) else self.samples  # a generator may be endless
        batches: list[F32] = []
        count = 0
        for array in _guarded(arrays):
            batch = self.batched(array)
            batches.append(self.converted(batch if limit is None else batch[: limit - count]))
            count += len(batches[-1])
            if count == limit:
                break
        if not batches:
            raise CalibrationError("there are no samples: give at least one")
        shapes = sorted({batch.shape[1:] for batch in batches})
        if len(shapes) > 1:
            raise CalibrationError(f"samples differ in shape, {shapes[0]} and {shapes[-1]}: give one size")
        images = np.concatenate(batches)
        chosen = self.chosen(count)
        return images if len(chosen) == count else images[chosen]

    def batched(self, array: Any) -> AnyArray:
        """Return the array with an axis of samples, pictures with the network's channels, if it fits it."""
        if not hasattr(array, "__array__"):
            raise CalibrationError(f"found {type(array).__name__} among the arrays: give inputs only")
        with _reported("cannot be made a NumPy array"):
            batch: AnyArray = np.asarray(array)
        found = f"{batch.dtype} {batch.shape}"
        if self.is_free and batch.dtype.kind == "f" and self.is_no_picture(batch.shape):
            return batch if batch.ndim > 1 else batch[None]
        if not self.channels:
            raise CalibrationError(f"found {found}, and the network takes no pictures: give floats (N, …)")
        height, width = self.size or ("H", "W")
        axes = (height, width, self.channels) if self.channels_last else (self.channels, height, width)
        inputs, pictures = f"(N, {', '.join(map(str, axes))})", f"(N, H, W, {self.channels})"
        if batch.dtype == np.uint8:
            if batch.ndim == 3:
                is_one = batch.shape[2] in (1, self.channels)
                batch = batch[None] if is_one else batch[..., None]
            if batch.shape[3:] == (1,) and self.channels == GREY_AS:
                batch = np.broadcast_to(batch, (*batch.shape[:3], self.channels))
            fits, expected = batch.shape[3:] == (self.channels,), f"pictures {pictures}"
        elif batch.dtype.kind == "f":
            batch = batch[None] if batch.ndim == 3 else batch
            sizes = zip(batch.shape[1:], axes, strict=False)
            fits = batch.ndim == 4 and all(isinstance(n, str) or size == n for size, n in sizes)
            expected = f"float inputs {inputs}"
        else:
            raise CalibrationError(f"found {found}: give uint8 {pictures} or float {inputs}")
        if not fits or not batch.size:
            raise CalibrationError(f"found {found}, expected {expected}, not empty: transpose or resize them")
        return batch

    def is_no_picture(self, shape: tuple[int, ...]) -> bool:
        """Whether floats of this shape are samples of something else; some must be there."""
        is_picture = len(shape) == 4 or (len(shape) == 3 and shape[0] == self.channels)
        return math.prod(shape) > 0 and len(shape) > 0 and not (is_picture and self.channels)

    def converted(self, batch: AnyArray, chosen: Indices | None = None) -> F32:
        """Copy the chosen inputs (None: all), pictures preprocessed."""
        chosen = np.arange(len(batch)) if chosen is None else chosen
        if batch.dtype == np.uint8:
            self.check_bytes(len(chosen), *(self.preprocessing.size or batch.shape[1:3]), self.channels)
            return self.laid_out(self.preprocessing(batch[chosen]))
        self.check_bytes(len(chosen), *batch.shape[1:])
        images = np.empty((len(chosen), *batch.shape[1:]), np.float32)
        for image, index in zip(images, chosen, strict=True):
            with np.errstate(over="ignore"):
                image[...] = batch[index]
            if not np.isfinite(image).all():
                raise CalibrationError(f"sample {index} has NaN or infinite values: repair or remove it")
        return images

    def laid_out(self, images: F32) -> F32:
        """Put the channels of (N, C, H, W) where the network wants them."""
        return np.ascontiguousarray(np.moveaxis(images, 1, -1)) if self.channels_last else images

    @staticmethod
    def check_bytes(*shape: int) -> None:
        """Raise CalibrationError if inputs of this shape would take more memory than the limit."""
        limits.SAMPLE_BYTES.check(4 * math.prod(shape), "as inputs this", CalibrationError)

    def from_folder(self, folder: Path) -> Samples:
        """Read a random subset of the images in a folder; unreadable images are replaced by others."""
        if not self.channels:
            raise CalibrationError("the network takes no pictures: give floats (N, …)")
        self.preprocessing.check(self.channels)  # before the loop, which would skip every image for it
        names, elsewhere = _listed(folder)
        if not names and elsewhere:
            raise CalibrationError(
                f"no images in this folder, and {elsewhere[0]!r} in it is a link to another place, which is "
                f"not followed: give {os.path.realpath(folder / elsewhere[0])}"
            )
        if not names:
            raise CalibrationError(f"no images in this folder: it should hold {' '.join(IMAGE_EXTENSIONS)}")
        wanted = min(self.samples or len(names), len(names))
        order = np.random.default_rng(self.seed).permutation(len(names))
        crops: dict[str, U8] = {}
        skipped = dict.fromkeys(elsewhere, "a link to another place")
        if self.preprocessing.size is not None:
            self.check_bytes(wanted, *self.preprocessing.size, self.channels)
        size = 0
        for name in (names[index] for index in order):
            try:
                crops[name] = self._read_crop(folder / name)
            except Exception as error:  # decoders of damaged files raise anything
                skipped[name] = _brief(error)
            else:
                size += crops[name].nbytes
                limits.SAMPLE_BYTES.check(4 * size, "as inputs this", CalibrationError)
            if len(crops) == wanted:
                break
        if not crops:
            name, reason = min(skipped.items())
            raise CalibrationError(f"none of {len(names)} can be read, {name} ({reason}): add others")
        images = self.preprocessing.normalise([crops[name] for name in sorted(crops)])
        return Samples(self.laid_out(images), str(folder), tuple(sorted(skipped)))

    def _read_crop(self, path: Path) -> U8:
        if not os.path.isfile(path):  # reading a pipe could block forever
            raise CalibrationError("not a file")
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
    """Set Pillow's limit on the size of pictures, a global variable, for a while."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = limits.PIXELS.value
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """List the images in a folder, and the folders in it that are links to another place.

    These are not searched; links to folders inside, which may be hidden, are. Paths are relative to the
    folder, with forward slashes, and sorted.
    """
    names: list[str] = []
    elsewhere: list[str] = []
    seen: set[str] = set()
    linked = [folder]  # what links lead to is searched where nothing else leads there

    def fail(error: OSError) -> NoReturn:
        raise CalibrationError(f"cannot be listed ({_brief(error)}): check its permissions") from error

    for top in linked:
        for parent, children, files in os.walk(top, onerror=fail):
            real, here = os.path.realpath(parent), Path(parent)
            if real in seen:
                children.clear()
                continue
            seen.add(real)
            children[:] = [child for child in children if not child.startswith(".")]
            for link in (here / child for child in children if (here / child).is_symlink()):
                if limits.leads_elsewhere(link, folder):
                    elsewhere.append(link.relative_to(folder).as_posix())
                else:
                    linked.append(link)
            names += [
                (here / name).relative_to(folder).as_posix()
                for name in files
                if not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)
            ]
    return sorted(names), sorted(elsewhere)


def files_of(source: str | os.PathLike[str]) -> list[Path]:
    """Return the file or folder that `load` reads; of MODULE:FUNCTION the module and the packages around it.

    The module is not imported. Nothing is returned where nothing is found.
    """
    text = os.fspath(source)
    path, _ = _split_key(text)
    if os.path.exists(path):
        return [Path(path)]
    found: list[Path] = []
    places: Sequence[str] | None = [os.getcwd(), *sys.path]
    for name in accumulate(text.partition(":")[0].split("."), "{}.{}".format) if names_function(text) else ():
        spec = None if places is None else PathFinder.find_spec(name, places)
        if spec is None:
            break
        found += [Path(spec.origin)] if spec.origin and spec.has_location else []
        places = spec.submodule_search_locations
    return found


def pictures(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder, which `load` reads or may read."""
    yield from (folder / name for name in _listed(folder)[0])


def _split_key(text: str) -> tuple[str, str | None]:
    """Split FILE.npz:KEY. An existing file comes first: names may contain colons, after drive letters too."""
    if os.path.exists(text):
        return text, None
    colons = [match.start() for match in re.finditer(":", text)]
    splits = [(text[:at], text[at + 1 :]) for at in colons if text[:at].lower().endswith(ARRAY_EXTENSIONS)]
    existing = [split for split in splits if os.path.isfile(split[0])]
    return next(iter(existing + splits), (text, None))


def _read_array(path: str, key: str | None) -> AnyArray:
    with _reported("cannot be read: save it with numpy.save or numpy.savez, without objects"):
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
                file.seek(0)
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _find_member(archive: zipfile.ZipFile, key: str | None) -> zipfile.ZipInfo:
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    names = list(members) if key is None else [name for name in members if name == key]
    if key is None and len(names) > 1:
        names = [name for name in names if _axes(archive, members[name]) == 4]
    if len(names) != 1:
        raise CalibrationError(f"choose one array: FILE.npz:KEY with KEY among {', '.join(members)}")
    return members[names[0]]


def _axes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    with archive.open(member) as file:
        try:
            return len(_check_header(file, member.file_size))
        except ValueError:  # an array of objects, or not an array
            return 0


def _check_header(file: IO[bytes], size: int) -> tuple[int, ...]:
    """Return the shape of an array in the .npy format; ValueError unless it fits into ``size`` bytes."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format, which numpy.save does not write for plain arrays")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds objects, which could run programs when they are read")
    if min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"the file is shorter than an array {shape} of {dtype}; copy it again")
    return shape


def names_function(source: str) -> bool:
    """Return whether the source is MODULE:FUNCTION and not a file."""
    path, key = _split_key(source)
    return key is None and not os.path.exists(path) and _FUNCTION.fullmatch(source) is not None


def call(name: str) -> Any:
    """Import MODULE, also from the current directory, and call its FUNCTION without arguments.

    Raises CalibrationError if one of them does not exist, or raises an exception.
    """
    module_name, _, function_name = name.partition(":")
    with _reported(f"cannot import {module_name}"):
        folder = os.getcwd()
        sys.path.insert(0, folder)
        try:
            module = importlib.import_module(module_name)
        finally:
            with contextlib.suppress(ValueError):  # the module may have removed it
                sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise CalibrationError(f"{module_name} has no such function: correct the name")
    with _reported(f"{function_name}() failed"):
        return function()


def _guarded(arrays: Iterable[Any]) -> Iterator[Any]:
    with _reported("failed while it made its arrays"):
        yield from arrays


@contextlib.contextmanager
def _prefixed(source: str) -> Iterator[None]:
    """Put the source's name before the text of errors."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(" ".join(f"{source}: {error}".splitlines())) from error


@contextlib.contextmanager
def _reported(problem: str) -> Iterator[None]:
    """Raise CalibrationError for any exception of foreign code, sys.exit() included."""
    try:
        yield
    except CalibrationError:
        raise
    except (Exception, SystemExit) as error:
        raise CalibrationError(f"{problem} ({_brief(error)})") from error


def _brief(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)
