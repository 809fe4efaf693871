"""Calibration data: sources, the inputs read from them, and the errors for sources that do not fit."""

import os
import sys
import warnings
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from netdecouple.data.calibration import Samples, load, load_labelled
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import CalibrationError

NONE = Preprocessing()
RNG = np.random.default_rng(0)
FLOATS = RNG.normal(size=(10, 3, 4, 5)).astype(np.float32)  # (N, C, H, W)
PICTURES = RNG.integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)  # (N, H, W, C)
LABELLED = {"channels": 3, "size": (4, 5), "preprocessing": NONE}
LAST = {"channels_last": True}
DEFAULTS = {**LABELLED, "samples": None, "seed": 0}


def read(source, **changes) -> Samples:
    return load(source, **{**DEFAULTS, **changes})


def take(arrays, **changes) -> np.ndarray:
    return load(arrays, **{**DEFAULTS, **changes}).images


def scaled(pictures: np.ndarray) -> np.ndarray:
    """What preset none makes of (N, H, W, C)."""
    return pictures.transpose(0, 3, 1, 2) / np.float32(255)


def spoiled(value: float) -> np.ndarray:
    """FLOATS, as float64, with one value of sample 7 replaced."""
    array = FLOATS.astype(np.float64)
    array[7, 1, 2, 3] = value
    return array


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the ten PICTURES, losslessly, as 0.png to 9.png."""
    (tmp_path / "images").mkdir()
    for index, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(tmp_path / "images" / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the module calib_module into the current directory; it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    yield lambda code: (tmp_path / "calib_module.py").write_text("import numpy as np\n" + code)
    sys.modules.pop("calib_module", None)


def assert_error(found: str, *parts: str) -> None:
    assert "\n" not in found
    assert [part for part in parts if part not in found] == [], found


# --- folders of images


def test_a_folder_is_read_in_sorted_order(folder):
    samples = read(folder)
    np.testing.assert_array_equal(samples.images, scaled(PICTURES))
    assert (samples.images.dtype, samples.origin, samples.skipped) == (np.float32, str(folder), ())


def test_a_folder_is_searched_recursively_but_not_its_hidden_parts(folder):
    """Extensions are compared without case; other files do not count."""
    (folder / "a/b").mkdir(parents=True)
    (folder / ".cache").mkdir()
    for name in ("a/b/last.PNG", ".hidden.png", ".cache/thumbnail.png", "notes.txt"):
        Image.fromarray(PICTURES[3]).save(folder / name, format="PNG")
    np.testing.assert_array_equal(read(folder).images, scaled(PICTURES[[*range(10), 3]]))


def test_links_to_folders_are_followed_within_the_folder(folder, tmp_path):
    """Each picture counts once, whatever leads to it; links to other places are named."""
    for name in ("inside", ".store/deep", "../outside"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(PICTURES[3]).save(folder / name / "3.png")
    for link, target in {
        "again": "inside",
        "round": "..",
        "up": ".",
        "data": ".store",
        "deep": ".store/deep",
    }.items():
        (folder / link).symlink_to(target)
    samples = read(folder)
    np.testing.assert_array_equal(samples.images, scaled(PICTURES[[*range(10), 3, 3]]))
    assert samples.skipped == ("round",)
    (tmp_path / "name").symlink_to("images")
    assert len(read(tmp_path / "name").images) == 12
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "link").symlink_to("../outside")
    with pytest.raises(CalibrationError, match=rf"'link' in it is a link .*: give {tmp_path / 'outside'}"):
        read(tmp_path / "empty")


def test_a_subset_is_seeded_and_in_order(folder, tmp_path):
    """The same seed gives the same inputs, another one others; folders and arrays alike."""
    np.save(tmp_path / "pictures.npy", PICTURES)
    for source in (folder, tmp_path / "pictures.npy"):
        subset = read(source, samples=4).images
        chosen = [int(np.flatnonzero((scaled(PICTURES) == image).all((1, 2, 3)))[0]) for image in subset]
        assert len(chosen) == 4
        assert chosen == sorted(chosen) != [0, 1, 2, 3]
        np.testing.assert_array_equal(read(source, samples=4).images, subset)
        assert not np.array_equal(read(source, samples=4, seed=1).images, subset)
        assert len(read(source, samples=99).images) == 10
    np.testing.assert_array_equal(read(folder, samples=4).images, subset)


def test_unreadable_images_are_skipped_by_name(folder, monkeypatch):
    """Garbage, half a file, 16 bits, and more pixels than the limit allows; others take their place."""
    whole = (folder / "0.png").read_bytes()
    (folder / "deep").mkdir()
    (folder / "deep/garbage.jpg").write_bytes(b"no image")
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(folder / "sixteen.png")
    Image.new("RGB", (20, 15)).save(folder / "warned.png")
    Image.new("RGB", (100, 100)).save(folder / "bomb.png")
    monkeypatch.setenv("NETDECOUPLE_MAX_PIXELS", "200")
    samples = read(folder)
    names = ("bomb.png", "deep/garbage.jpg", "half.png", "sixteen.png", "warned.png")
    assert samples.skipped == names
    np.testing.assert_array_equal(samples.images, scaled(PICTURES))
    assert {len(read(folder, samples=9, seed=seed).images) for seed in range(5)} == {9}


def test_warnings_of_decoders_are_not_passed_on(folder):
    """Only the one about decompression bombs counts."""
    palette = Image.fromarray(PICTURES[0, :, :, 0]).convert("P")
    palette.save(folder / "palette.png", transparency=bytes(256))
    with warnings.catch_warnings(action="error"):
        assert read(folder).skipped == ()


def test_a_disguised_script_is_not_run(folder, monkeypatch):
    """Pillow would start Ghostscript for Encapsulated PostScript, whatever the extension."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\n%%EndComments\n"
    (folder / "script.png").write_bytes(script)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: Image.new("RGB", (5, 4)).im)
    assert read(folder).skipped == ("script.png",)


def test_a_very_long_picture_is_unreadable(folder, monkeypatch):
    """Enlarging its shorter side first would take more pixels than the limit allows."""
    Image.new("RGB", (1, 190)).save(folder / "long.png")
    monkeypatch.setenv("NETDECOUPLE_MAX_PIXELS", "200")
    assert read(folder, preprocessing=Preprocessing(resize=4, size=(4, 5))).skipped == ("long.png",)


def test_orientation_and_colour_follow_file_and_network(tmp_path):
    """EXIF 6 means turned a quarter; transparency is dropped, palettes resolved, grey where one channel."""
    grey = np.arange(0, 200, 10, dtype=np.uint8).reshape(4, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, mode in (("a.png", "L"), ("b.png", "RGBA"), ("c.png", "P")):
        Image.fromarray(grey).convert(mode).save(tmp_path / name, exif=exif)
    upright = np.rot90(grey, -1)[None] / np.float32(255)
    for channels in (1, 3):
        expected = np.broadcast_to(upright, (3, channels, 5, 4))
        np.testing.assert_array_equal(read(tmp_path, channels=channels, size=(5, 4)).images, expected)


@pytest.mark.parametrize(
    ("prepare", "changes", "parts"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], {}, ["no images", ".jpg"]),
        (lambda f: [p.write_bytes(b"x\ny") for p in f.iterdir()], {}, ["none of 10", ".png (Unidentified"]),
        (lambda f: Image.new("RGB", (6, 4)).save(f / "x.png"), {"size": None}, ["(4, 5, 3) and (4, 6, 3)"]),
        (lambda f: None, {"channels": 4}, ["images: pictures have 1 or 3 channels, not 4", "give arrays"]),
        (lambda f: None, {"preprocessing": Preprocessing(mean=(0.1, 0.2))}, ["images: mean has 2 values"]),
        (lambda f: None, {"samples": 0}, ["0 samples", "at least 1"]),
    ],
)
def test_a_folder_is_refused(folder, prepare, changes, parts):
    """Nothing to read, nothing readable, or nothing that fits the network."""
    prepare(folder)
    with pytest.raises(CalibrationError) as error:
        read(folder, **changes)
    assert_error(str(error.value), f"{folder}: ", *parts)


def test_a_folder_that_cannot_be_listed_is_refused(folder, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(CalibrationError, match=r"cannot be listed .*Permission denied"):
        read(folder)


# --- files of arrays


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "f8"])
def test_float_arrays_are_taken_as_they_are(tmp_path, dtype):
    """NCHW, any float type, no preprocessing."""
    np.save(tmp_path / "a.npy", FLOATS.astype(dtype))
    images = read(tmp_path / "a.npy", preprocessing=Preprocessing.preset("imagenet")).images
    np.testing.assert_array_equal(images, FLOATS.astype(dtype).astype(np.float32))
    assert images.dtype == np.float32


def test_uint8_arrays_are_pictures(tmp_path):
    """NHWC, or NHW for one channel; resized to the network where they differ."""
    np.save(tmp_path / "colour.npy", PICTURES)
    np.save(tmp_path / "grey.npy", PICTURES[..., 0])
    np.testing.assert_array_equal(read(tmp_path / "colour.npy").images, scaled(PICTURES))
    np.testing.assert_array_equal(read(tmp_path / "grey.npy", channels=1).images, scaled(PICTURES[..., :1]))
    resized = Image.fromarray(PICTURES[0, :, :, 0]).resize((3, 2), Image.Resampling.BILINEAR)
    images = read(tmp_path / "grey.npy", channels=1, size=(2, 3)).images
    np.testing.assert_array_equal(images[0, 0], np.asarray(resized) / np.float32(255))


def test_grey_pictures_become_three_channels(folder, tmp_path):
    """Of an array as of a folder."""
    grey = PICTURES[..., :1]
    for index, picture in enumerate(grey[..., 0]):
        Image.fromarray(picture).save(folder / f"{index}.png")
    expected = scaled(grey.repeat(3, axis=3))
    for source in (folder, grey, grey[..., 0], list(grey)):
        np.testing.assert_array_equal(read(source).images if source is folder else take(source), expected)


def test_one_picture_of_a_list_has_its_channels_last():
    np.testing.assert_array_equal(take(list(PICTURES)), scaled(PICTURES))


@pytest.mark.parametrize("size", [(4, 5), (2, 3), None])
def test_channels_may_be_last(folder, size):
    """Pictures of every source, and float arrays, in the order and the size that the network asks for."""
    changes = {**LAST, "size": size}
    expected = take(PICTURES, size=size).transpose(0, 2, 3, 1)
    for images in (read(folder, **changes).images, take(PICTURES, **changes), take(expected, **changes)):
        np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(take(list(expected), **changes), expected)


@pytest.mark.parametrize("name", ["C:\\x.npz", "a:b.NPZ", "a.npz:b.npz", "plain.npz"])
def test_a_key_follows_the_last_existing_name(tmp_path, monkeypatch, name):
    """Drive letters and colons in names are no keys; the only array, or the only 4-D one, needs none."""
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        np.savez(file, images=FLOATS, **{"k:1": FLOATS[:2]}, labels=np.arange(3), objects=np.array([None]))
    np.testing.assert_array_equal(read(f"{name}:images").images, FLOATS)
    np.testing.assert_array_equal(read(f"{name}:k:1").images, FLOATS[:2])
    with open(name, "wb") as file:
        np.savez(file, labels=np.arange(3), objects=np.array([None]), images=FLOATS)
    np.testing.assert_array_equal(read(name).images, FLOATS)
    with open(name, "wb") as file:
        np.savez(file, FLOATS[0])
    np.testing.assert_array_equal(read(name).images, FLOATS[:1])


@pytest.mark.parametrize(
    ("array", "changes", "parts"),
    [
        (FLOATS.transpose(0, 2, 3, 1), {}, ["float32 (10, 4, 5, 3)", "(N, 3, 4, 5)"]),
        (FLOATS, {"channels": 1}, ["(10, 3, 4, 5)", "(N, 1, 4, 5)"]),
        (FLOATS, {"size": (8, 8)}, ["(10, 3, 4, 5)", "(N, 3, 8, 8)"]),
        (FLOATS[0, 0], {"size": None}, ["(4, 5)", "(N, 3, H, W)"]),
        (FLOATS[:0], {}, ["(0, 3, 4, 5)", "not empty"]),
        (PICTURES.transpose(0, 3, 1, 2), {}, ["uint8 (10, 3, 4, 5)", "(N, H, W, 3)"]),
        (PICTURES[..., :2], {}, ["uint8 (10, 4, 5, 2)", "(N, H, W, 3)"]),
        (PICTURES.astype(np.int64), {}, ["int64 (10, 4, 5, 3)", "uint8 (N, H, W, 3)", "float (N, 3, 4, 5)"]),
        (FLOATS, LAST, ["(10, 3, 4, 5)", "(N, 4, 5, 3)"]),
        (FLOATS, {**LAST, "size": None}, ["(10, 3, 4, 5)", "(N, H, W, 3)"]),
        (PICTURES.astype(np.int64), LAST, ["uint8 (N, H, W, 3)", "float (N, 4, 5, 3)"]),
        (spoiled(np.nan), {}, ["sample 7", "NaN"]),
        (spoiled(1e300), {}, ["sample 7", "infinite"]),
        (np.array([{}]), {}, ["cannot be read", "without objects"]),
    ],
)
def test_an_array_is_refused(tmp_path, array, changes, parts):
    """The error shows what was found and what the network expects; objects are never unpickled."""
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CalibrationError) as error:
        read(tmp_path / "a.npy", **changes)
    assert_error(str(error.value), "a.npy: ", *parts)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    """The file would create another one if it were unpickled."""
    (tmp_path / "evil.npy").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode())
    with pytest.raises(CalibrationError, match=r"evil.npy: cannot be read"):
        read(tmp_path / "evil.npy")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("two.npz", ["first, second, note"]),
        ("two.npz:third", ["first, second, note"]),
        ("two.npz:note", ["cannot be read", "objects"]),
        ("one.npy:first", ["without a name", "':first'"]),
        ("broken.npz", ["cannot be read"]),
        ("text.txt", ["not supported", "FILE.npy"]),
        ("missing.npy", ["not found"]),
        ("missing.npz:key", ["not found"]),
        ("sub:missing.png", ["not found"]),
        ("C:\\missing", ["not found"]),
        ("missing", ["not found", "a folder of images", "MODULE:FUNCTION"]),
        ("", ["not found"]),
        ("two\nlines", ["not found"]),
    ],
)
def test_a_source_is_refused(tmp_path, monkeypatch, source, parts):
    """The error names the source and lists what there is, or what could be given."""
    monkeypatch.chdir(tmp_path)
    np.savez("two.npz", first=FLOATS, second=FLOATS, note=np.array([{}]))
    np.save("one.npy", FLOATS)
    Path("broken.npz").write_bytes(b"PK\x03\x04 no archive")
    Path("text.txt").touch()
    with pytest.raises(CalibrationError) as error:
        read(source)
    assert_error(str(error.value), f"{source}: ".replace("\n", " "), *parts)


# --- functions and arrays


@pytest.mark.parametrize(
    "body",
    [
        "return X",
        "return list(X)",
        "return [X[:7], X[7:]]",
        "yield X[:9]; yield X[9]",
    ],
)
def test_a_function_gives_arrays(module, body):
    """One array, a list or a generator, of batches or of single samples."""
    module(f"X = np.arange(600, dtype=float).reshape(10, 3, 4, 5)\ndef inputs():\n    {body}")
    path = list(sys.path)
    expected = np.arange(600, dtype=np.float32).reshape(10, 3, 4, 5)
    np.testing.assert_array_equal(read("calib_module:inputs").images, expected)
    assert sys.path == path


def test_a_module_may_tidy_the_search_path(module):
    """The current directory is taken off it afterwards, unless that is done already."""
    module("import sys\nsys.path.pop(0)\ndef inputs(): return np.ones((3, 4, 5))")
    assert len(read("calib_module:inputs").images) == 1


def test_an_existing_path_is_not_a_function(module, folder):
    module("def inputs(): raise RuntimeError")
    folder.rename("calib_module:inputs")
    assert len(read("calib_module:inputs").images) == 10


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("syntax error", ["cannot import calib_module", "SyntaxError"]),
        ("raise SystemExit(3)", ["cannot import calib_module", "SystemExit"]),
        ("inputs = 1", ["no such function"]),
        ("def inputs(): return 1 / 0", ["inputs() failed", "ZeroDivisionError: division by zero"]),
        ("def inputs(): raise ValueError('two\\nlines')", ["inputs() failed", "two lines"]),
        ("def inputs():\n  yield np.ones((3, 4, 5))\n  raise OSError('gone')", ["OSError: gone"]),
        ("def inputs(): return None", ["NoneType", "iterable of arrays"]),
        ("def inputs(): return iter(())", ["no samples"]),
        ("def inputs(): yield np.ones((3, 4, 5)), 1", ["found tuple"]),
        ("def inputs(): yield np.ones((3, 4, 6))", ["(3, 4, 6)", "(N, 3, 4, 5)"]),
        ("class inputs:\n  def __array__(self, *_): raise OSError('gone')", ["NumPy array", "gone"]),
    ],
)
def test_a_function_is_refused(module, code, parts):
    """The error names what the user's code raised, in one line."""
    module(code)
    with pytest.raises(CalibrationError) as error:
        read("calib_module:inputs")
    assert_error(str(error.value), "calib_module:inputs: ", *parts)


def test_a_module_that_is_missing_is_named():
    with pytest.raises(CalibrationError, match=r"cannot import no_such\.module .*ModuleNotFoundError"):
        read("no_such.module:inputs")


def test_of_a_generator_the_first_samples_are_taken():
    """It may be endless; of an array or a list, the subset is random."""
    np.testing.assert_array_equal(take(repeat(FLOATS[:4]), samples=6), FLOATS[[0, 1, 2, 3, 0, 1]])
    np.testing.assert_array_equal(take(list(FLOATS), samples=6), take(FLOATS, samples=6))
    assert not np.array_equal(take(FLOATS, samples=6), FLOATS[:6])


def test_samples_do_not_share_memory_with_the_arrays():
    assert not np.shares_memory(take(FLOATS), FLOATS)
    assert not np.shares_memory(take([FLOATS]), FLOATS)


def test_arrays_of_different_sizes_are_refused():
    """Also where the network would take either."""
    with pytest.raises(CalibrationError, match=r"arrays: .*\(3, 4, 4\) and \(3, 4, 5\)"):
        take([FLOATS, FLOATS[..., :4]], size=None)


# --- labels


def test_labels_stay_with_their_images(tmp_path):
    np.savez(tmp_path / "d.npz", x=FLOATS, y=np.arange(10, dtype=np.uint8))
    images, labels = load_labelled(f"{tmp_path}/d.npz:x,y", **LABELLED)
    np.testing.assert_array_equal(images, FLOATS)
    np.testing.assert_array_equal(labels, np.arange(10))
    assert labels.dtype == np.int64
    np.savez(tmp_path / "d.npz", x=PICTURES, y=np.arange(10))
    images, _ = load_labelled(f"{tmp_path}/d.npz:x,y", **LABELLED, **LAST)
    np.testing.assert_array_equal(images, PICTURES / np.float32(255))


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("d.npz", ["labels are missing", "FILE.npz:IMAGES,LABELS"]),
        ("d.npz:x", ["labels are missing"]),
        ("no.npz:x,y", ["not found"]),
        ("d.npz:x,z", ["x, short, floats, square"]),
        ("d.npz:x,short", ["int64 (9,)", "expected 10 integers"]),
        ("d.npz:x,floats", ["float64 (10,)", "expected 10 integers"]),
        ("d.npz:x,square", ["int64 (10, 1)", "expected 10 integers"]),
    ],
)
def test_labels_are_refused(tmp_path, monkeypatch, source, parts):
    """They are one integer per image."""
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", x=FLOATS, short=np.arange(9), floats=np.ones(10), square=np.ones((10, 1), np.int64))
    with pytest.raises(CalibrationError) as error:
        load_labelled(source, **LABELLED)
    assert_error(str(error.value), f"{source}: ", *parts)


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_any_subset_is_a_selection_without_repeats(samples, seed):
    """Of the asked-for length, in the order of the source."""
    values = np.arange(10, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 4, 5), np.float32)
    order = take(values, samples=samples, seed=seed)[:, 0, 0, 0].tolist()
    assert len(order) == min(samples, 10)
    assert order == sorted(set(order))
