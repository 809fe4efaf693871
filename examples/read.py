"""A reader of text (OCR): ``python examples/read.py`` (needs what the next line installs).

    pip install --no-deps rapidocr-onnxruntime

The script takes the reader of PP-OCRv4 from the package rapidocr-onnxruntime. It draws lines like those on
receipts, decouples the reader with some of them, and has others read by both networks. Nothing says what the
lines for calibration mean. The reader consists of depthwise and 1×1 convolutions, of which little can be
spared. Four minutes on one core.
"""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

import netdecouple
from netdecouple import kernels

HEIGHT, WIDTH = 48, 320  # of a line, in pixels
GOODS = "Apples Bread Butter Carrots Cheese Coffee Grapes Honey Lemons Milk Olives Pasta Rice Soap Tea Water"
WORDS = "Amount Bill Card Cash Change Customer Date Invoice Number Order Paid Receipt Refund Table Tax Total"
SHOWN = 8  # lines in the picture


def packages_model() -> Path:
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("there is no package rapidocr_onnxruntime: see the first lines of read.py")
    return Path(spec.submodule_search_locations[0]) / "models" / "ch_PP-OCRv4_rec_infer.onnx"


def text(rng: np.random.Generator) -> str:
    """Make up a line of a receipt."""
    goods, word = rng.choice(GOODS.split()), rng.choice(WORDS.split())
    kinds = (
        f"{rng.integers(2, 20)} x {goods} {rng.uniform(0.5, 99):.2f}",
        f"{word} {rng.uniform(1, 999):.2f} EUR",
        f"{word}: {rng.integers(1, 29):02}/{rng.integers(1, 13):02}/20{rng.integers(10, 27)}",
        f"{word} {rng.choice(WORDS.split())} {rng.integers(100, 9999)}",
    )
    return str(rng.choice(kinds))


def line(words: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a line of text, of random size, colours and noise: uint8 (H, W, 3)."""
    light, dark = int(rng.integers(180, 240)), int(rng.integers(0, 90))
    paper, ink = (tuple(grey + int(tint) for tint in rng.integers(0, 16, 3)) for grey in (light, dark))
    image = Image.new("RGB", (WIDTH, HEIGHT), paper)
    at = rng.uniform(3, 12), HEIGHT / 2 + rng.uniform(-4, 4)
    font = ImageFont.load_default(rng.uniform(22, 28))
    ImageDraw.Draw(image).text(at, words, ink, font, anchor="lm")
    noise = rng.normal(0, rng.uniform(0, 15), (HEIGHT, WIDTH, 3))
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def prepared(lines: np.ndarray) -> np.ndarray:
    """Turn lines into the reader's inputs: blue before red, -1…1, (N, 3, H, W)."""
    return np.ascontiguousarray(lines[..., ::-1].transpose(0, 3, 1, 2), np.float32) / 127.5 - 1


def read(model: Path, lines: np.ndarray) -> list[str]:
    """Read with ONNX Runtime: the best letter at every place, without repetitions and blanks."""
    options = onnxruntime.SessionOptions()
    if kernels.available():
        kernels.register(options)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    letters = ["", *session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
    texts = []
    for one in prepared(lines):
        best = session.run(None, {name: one[None]})[0][0].argmax(axis=-1)
        changed = best[np.diff(best, prepend=-1) != 0]
        texts.append("".join(letters[i] for i in changed if i != 0).strip())
    return texts


def drawn(lines: np.ndarray, before: list[str], after: list[str]) -> Image.Image:
    """Show lines, and beside each what was read; red where it differs."""
    row, column, head = HEIGHT + 8, WIDTH - 40, 32
    page = Image.new("RGB", (WIDTH + 16 + 2 * column, head + row * len(lines)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(18)
    for left, title in ((0, "line"), (WIDTH + 16, "original"), (WIDTH + 16 + column, "decoupled")):
        draw.text((left + 2, 5), title, "grey", font)
    for index, (pixels, *texts) in enumerate(zip(lines, before, after, strict=True)):
        top = head + row * index
        page.paste(Image.fromarray(pixels), (0, top))
        for left, words in zip((WIDTH + 16, WIDTH + 16 + column), texts, strict=True):
            ink = "black" if texts[0] == texts[1] else "red"
            draw.text((left, top + HEIGHT / 2), words, ink, font, anchor="lm")
    return page


def unspaced(words: str) -> str:
    return words.replace(" ", "")


def main() -> None:
    parser = argparse.ArgumentParser(description="Decouple a reader of text, and compare what both read.")
    parser.add_argument("--model", type=Path, help="a reader of PP-OCR; its file contains its letters")
    parser.add_argument("--macs", default="85%", help="multiply-adds that may stay")
    parser.add_argument("--inputs", type=int, default=160, help="lines to calibrate with")
    parser.add_argument("--test", type=int, default=200, help="other lines")
    parser.add_argument("--out", type=Path, default=Path("out/read"))
    given = parser.parse_args()
    model = given.model or packages_model()
    rng = np.random.default_rng(0)
    calib = np.stack([line(text(rng), rng) for _ in range(given.inputs)])
    texts = [text(rng) for _ in range(given.test)]
    lines = np.stack([line(words, rng) for words in texts])

    result = netdecouple.decouple(model, prepared(calib), macs=given.macs, emit="fused")
    given.out.mkdir(parents=True, exist_ok=True)
    faster = given.out / "faster.onnx"
    result.save(faster)

    before, after = read(model, lines), read(faster, lines)
    report = result.report
    old, new = (row.timing.median for row in netdecouple.bench([model, faster]).models)
    print(f"{report.macs_before / report.macs:.2f}× fewer MACs, {old:.1f} → {new:.1f} ms")
    alike = np.mean([one == other for one, other in zip(before, after, strict=True)])
    print(f"{alike:.1%} of {given.test} lines that took no part are read alike")
    for title, read_texts in (("original", before), ("decoupled", after)):
        right = [unspaced(one) == unspaced(words) for one, words in zip(read_texts, texts, strict=True)]
        print(f"{title:<11} {np.mean(right):.1%} right, without spaces")
    drawn(lines[:SHOWN], before[:SHOWN], after[:SHOWN]).save(given.out / "lines.png")
    print(f"written to {given.out}: faster.onnx, lines.png")


if __name__ == "__main__":
    main()
