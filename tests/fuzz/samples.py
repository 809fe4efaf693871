"""Hostile calibration inputs: bombs, pickles, absurd shapes, broken pictures, odd folders, odd options."""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image

from tests import networks
from tests.fuzz.case import Case
from tests.fuzz.models import coarse
from tests.fuzz.mutations import FLOATS, INTEGERS, TEXTS, choice, damaged

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "webp": "WEBP",
    "ppm": "PPM",
}
DTYPES = ("<f4", ">f4", "<f8", "<f2", "|u1", "<i8", "|O", "|S1000000", "<U9", "<c8", "|b1", "<M8[s]", "|V16")
BOMB = 200 << 20  # bytes, of nothing


def case(rng: np.random.Generator) -> Case:
    """Files that inputs are to be read from, and a command that reads them."""
    model = choice(rng, ("net.onnx", "any.onnx"))
    made = _arrays if rng.random() < 0.5 else _folder
    source, parts = made(rng)
    if rng.random() < 0.2:
        images = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
        source, parts = "good.npz:images", Case((), {"good.npz": npz(images=images)})
        options = _options(rng)
    else:
        options = choice(rng, ([], ["--input-size", "8"], ["--preset", "cifar10"], ["--samples", "10"]))
    command = choice(
        rng,
        (
            ["run", model, "-o", "out.onnx", "--macs", "60%", "--families", "nd-dp", "--calib", source],
            ["run", model, "-o", "out.onnx", "--macs", "60%", "--data-free", "--calib", source],
            ["eval", model, "--data", source + choice(rng, ("", ",labels", ",images"))],
            [
                "run",
                model,
                "-o",
                "out.onnx",
                "--max-drop",
                "50",
                "--families",
                "nd-dp",
                "--calib",
                "good.npy",
                "--labels",
                f"{source},labels",
            ],
        ),
    )
    good = io.BytesIO()
    np.save(good, np.round(8 * rng.standard_normal((12, 3, 8, 8), np.float32)) / 8)
    files = {model: _models()[model], "good.npy": good.getvalue(), **parts.files}
    if command[0] == "eval":
        options = [o for o in options if o != "--samples" and o != "10"]
    return Case((*command, *options), files, parts.links, parts.pipes, parts.sparse)


@functools.cache
def _models() -> dict[str, bytes]:
    return {
        "net.onnx": coarse(networks.classifier()).SerializeToString(),
        "any.onnx": coarse(networks.restorer()).SerializeToString(),
    }


def _options(rng: np.random.Generator) -> list[str]:
    """Numbers that make no sense, or some."""
    numbers = [str(choice(rng, (*INTEGERS, *FLOATS, *TEXTS[4:]))) for _ in range(3)]
    name = choice(rng, ("--input-size", "--mean", "--std", "--samples", "--preset", "--seed", "--exclude"))
    joined = "x".join(numbers[:2]) if name == "--input-size" else ",".join(numbers)
    return [name, choice(rng, (numbers[0], joined))]


# --- files of arrays


def _arrays(rng: np.random.Generator) -> tuple[str, Case]:
    images = np.round(8 * rng.standard_normal((12, 3, 8, 8))).astype(np.float32) / 8
    if rng.random() < 0.3:
        images.flat[int(rng.integers(images.size))] = choice(rng, FLOATS)
    labels = rng.integers(0, 10, 12)
    kind = int(rng.integers(9))
    if kind == 0:
        return "x.npy", Case((), {"x.npy": damaged(rng, npy(images))})
    if kind == 1:
        return "x.npz:images", Case((), {"x.npz": damaged(rng, npz(images=images, labels=labels))})
    if kind == 2:
        header = _header(rng, _shape(rng), choice(rng, DTYPES))
        return "x.npy", Case((), {"x.npy": header + rng.bytes(int(rng.integers(3000)))})
    if kind == 3:  # the same inside of an archive
        header = _header(rng, _shape(rng), choice(rng, DTYPES))
        parts = {"images.npy": header + rng.bytes(100), "labels.npy": npy(labels)}
        return "x.npz:images", Case((), {"x.npz": _zip(parts, zipfile.ZIP_DEFLATED)})
    if kind == 4:
        return "x.npz:images", Case((), {"x.npz": _bomb(int(rng.integers(3)))})
    if kind == 5:  # larger than any disk, and nothing in it
        shape = (10**5, 3, 8, 8) if rng.random() < 0.5 else (12, 3, 4000, 4000)
        header = _header(rng, shape, "<f4")
        size = len(header) + 4 * int(np.prod(shape))
        return "x.npy", Case((), {"x.npy": header}, sparse={"x.npy": size})
    if kind == 6:
        payload = pickle.dumps(_Pickled())
        content = _header(rng, (1,), "|O") + payload
        return choice(
            rng,
            (
                ("x.npy", Case((), {"x.npy": choice(rng, (content, payload))})),
                ("x.npz:images", Case((), {"x.npz": _zip({"images.npy": content}, zipfile.ZIP_STORED)})),
            ),
        )
    if kind == 7:
        names = [
            choice(rng, ("images.npy", "../out.npy", "/tmp/x.npy", "labels", "a/b.npy", " ", "é.npy"))
            for _ in "ab"
        ]
        parts = {name: npy(images) for name in names}
        return choice(rng, ("x.npz:images", "x.npz", "x.npz:../out")), Case((), {"x.npz": _zip(parts)})
    return choice(
        rng, ("link.npy", "pipe.npy", "folder.npy", "/dev/zero", "/dev/null", "/proc/self/mem.npy")
    ), Case(
        (),
        {"folder.npy/x": b""},
        {"link.npy": choice(rng, ("/dev/zero", "link.npy", "../secret"))},
        ("pipe.npy",),
    )


class _Pickled:
    def __reduce__(self) -> object:
        return (open, ("../pickled", "w"))


def npy(array: np.ndarray) -> bytes:
    """What numpy.save writes."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    """What numpy.savez writes."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _shape(rng: np.random.Generator) -> tuple[object, ...]:
    shapes = (
        (12, 3, 8, 8),
        (10**5, 3, 10**3, 10**3),
        (2**62,),
        (-1, 3, 8, 8),
        (0, 3, 8, 8),
        (2**31,) * 4,
        (),
        (12, 3, 8),
    )
    shape: tuple[object, ...] = choice(
        rng, (*shapes, (1,) * 70, (12, 3.5, 8, 8), ("12",), (12, 8, 8, 3), (True,) * 4)
    )
    return shape


def _header(rng: np.random.Generator, shape: tuple[object, ...], dtype: str) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': {bool(rng.integers(2))}, 'shape': {shape!r}, }}"
    if rng.random() < 0.1:
        text = choice(rng, ("(" * 5000, "{" + "'a': 1, " * 9999 + "}", "9" * 5000, "-" * 5000 + "1", ""))
    version = choice(rng, (1, 1, 1, 2, 3, 9))
    size = struct.pack("<H", min(len(text), 65535)) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


def _zip(parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


@functools.cache
def _bomb(kind: int) -> bytes:
    """Little that becomes much when it is unpacked."""
    shape = ((BOMB // 768, 3, 8, 8), (12, 3, BOMB // 36 // 8, 8), (BOMB // 4,))[kind]
    header = _header(np.random.default_rng(1), shape, "<f4")
    content = header + bytes(4 * int(np.prod(shape)))
    return _zip({"images.npy": content, "labels.npy": npy(np.arange(12))}, zipfile.ZIP_BZIP2)


# --- folders of pictures


def _folder(rng: np.random.Generator) -> tuple[str, Case]:
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    pipes: tuple[str, ...] = ()
    for index in range(12):
        ending, content = _picture(rng)
        if rng.random() < 0.4:
            content = damaged(rng, content)
        files[f"images/{index}.{ending}"] = content
    match int(rng.integers(7)):
        case 0:
            links = {"images/up.png": "../../secret", "images/loop": "..", "images/self.png": "self.png"}
        case 1:
            pipes = ("images/pipe.png",)
        case 2:
            links = {
                "images/zero.png": "/dev/zero",
                "images/tty.png": "/dev/tty",
                "images/mem.png": "/proc/self/mem",
            }
        case 3:
            files["images/" + "d/" * 60 + "deep.png"] = _picture(rng)[1]
        case 4:
            files["images/folder.png/x.png"] = _picture(rng)[1]
        case 5:
            files = {name: content for name, content in files.items() if rng.random() < 0.2}
            files["images/\udce9.png" if rng.random() < 0 else "images/\u202e[bold]\n.png"] = _picture(rng)[1]
        case _:
            pass
    return "images", Case((), files, links, pipes)


def _picture(rng: np.random.Generator) -> tuple[str, bytes]:
    kind = rng.random()
    if kind < 0.5:
        ending = choice(rng, FORMATS)
        file = io.BytesIO()
        mode = choice(rng, ("RGB", "L", "P", "1", "I;16", "RGBA", "LA", "CMYK", "F"))
        size = choice(rng, ((9, 11), (8, 8), (1, 1), (1, 3000), (3000, 1)))
        try:
            Image.new(mode, size).save(file, FORMATS[ending])
        except (OSError, KeyError, ValueError):
            Image.new("RGB", size).save(file, FORMATS[ending])
        return ending, file.getvalue()
    size = choice(
        rng, ((10**5, 10**5), (2**31 - 1, 1), (2**31, 2**31), (0, 0), (3000, 3000), (10**6, 3), (1500, 1500))
    )
    if kind < 0.75:
        return "png", png(*size)
    if kind < 0.85:
        return "ppm", f"P{choice(rng, '123456')} {size[0]} {size[1]} 255\n".encode() + rng.bytes(500)
    if kind < 0.95:
        height = choice(rng, (1, -1)) * min(size[1], 2**31 - 1)
        head = struct.pack(
            "<IiiHHIIiiII", 40, min(size[0], 2**31 - 1), height, 1, choice(rng, (1, 8, 24)), 0, 0, 0, 0, 0, 0
        )
        return "bmp", b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head + rng.bytes(500)
    return choice(rng, ("png", "jpg", "txt")), rng.bytes(int(rng.integers(300)))


@functools.cache
def png(width: int, height: int) -> bytes:
    """A black picture of one bit a pixel; of the largest, no more than the beginning."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = bytes((width // 8 + 2) * height) if width * height < 10**7 else bytes(10**5)
    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, 1, 0, 0, 0, 0)
    data = zlib.compress(rows, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
