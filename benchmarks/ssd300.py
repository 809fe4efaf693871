"""SSD300 on VGG16 through both front doors: its detections at full rank and decoupled. Prints a table.

torchvision's network with random weights, scaled so that it detects something; random smooth pictures. A
detection is found again if one of the same label overlaps it by half or more.

    python benchmarks/ssd300.py --images 32 --families nd-dp
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import netdecouple
from conversion import pictures
from coverage import exact
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.torch.network import TorchNetwork
from netdecouple.frontends.torch.samples import collect
from netdecouple.planning.divergence import relative_error

SPREAD = 2.0  # standard deviation of the logits, with which softmax does not saturate
Detections = dict[str, np.ndarray]  # boxes (n, 4), scores and labels (n,), and the heads' own outputs


class Picture(nn.Module):
    """SSD300 of one picture (1, 3, 300, 300), with what its heads say besides its detections."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        said = {}
        hook = self.detector.head.register_forward_hook(lambda m, args, output: said.update(output))
        found = self.detector([x[0]])[0]
        hook.remove()
        detected = (found[key] for key in ("boxes", "scores", "labels"))
        return (*detected, said["cls_logits"], said["bbox_regression"])


def network() -> Picture:
    """The network, its classifying heads scaled so that some classes stand out, and no scores are alike."""
    from torchvision.models.detection import ssd300_vgg16

    torch.manual_seed(0)
    detector = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21).eval()
    picture = torch.from_numpy(pictures(1, 300, seed=1) * 0.2 + 0.5)
    heads = [m for m in detector.head.classification_head.modules() if isinstance(m, nn.Conv2d)]
    hooks = [head.register_forward_hook(_scaled) for head in heads]
    with torch.no_grad():
        detector(list(picture))
    for hook in hooks:
        hook.remove()
    return Picture(detector).eval()


def _scaled(head: nn.Conv2d, args: object, logits: torch.Tensor) -> torch.Tensor:
    factor = SPREAD / logits.std()
    head.weight *= factor
    return logits * factor


def row(name: str, before: list[Detections], after: list[Detections]) -> list[str]:
    """Compare the detections of some pictures."""
    found = total = 0
    scores, overlaps = [], []
    for a, b in zip(before, after, strict=True):
        for box, score, label in zip(a["boxes"], a["scores"], a["labels"], strict=True):
            total += 1
            same = b["labels"] == label
            overlap = _overlap(box, b["boxes"][same])
            if overlap.size and overlap.max() >= 0.5:
                best = overlap.argmax()
                found += 1
                overlaps.append(overlap[best])
                scores.append(abs(b["scores"][same][best] - score))
    heads = [
        np.concatenate([d[key] for d in side]) for key in ("logits", "offsets") for side in (before, after)
    ]
    return [
        name,
        f"{relative_error(heads[0], heads[1]):.1e}",
        f"{relative_error(heads[2], heads[3]):.1e}",
        f"{total / len(before):.0f}",
        f"{100 * found / max(total, 1):.1f} %",
        f"{np.mean(scores) if scores else float('nan'):.1e}",
        f"{np.mean(overlaps) if overlaps else float('nan'):.3f}",
    ]


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.maximum(high - low, 0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return shared / np.maximum((box[2:] - box[:2]).prod() + areas - shared, 1e-12)


def by_module(module: nn.Module, pictures: np.ndarray) -> list[Detections]:
    with torch.no_grad():
        return [_named([t.numpy() for t in module(torch.from_numpy(p[None]))]) for p in pictures]


def by_model(model: onnx.ModelProto, pictures: np.ndarray) -> list[Detections]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [_named(session.run(None, {name: p[None]})) for p in pictures]


def _named(outputs: list[np.ndarray]) -> Detections:
    return dict(zip(("boxes", "scores", "labels", "logits", "offsets"), outputs, strict=True))


def main(
    images: Annotated[int, typer.Option(help="Calibration images.")] = 64,
    macs: Annotated[str, typer.Option(help="MACs that may stay.")] = "50%",
    families: Annotated[str, typer.Option(help="As in `netdecouple run`.")] = "all",
) -> None:
    """Print the table."""
    run(images, macs, families)


def run(images: int, macs: str, families: str) -> None:
    """Do as `main`."""
    console = Console(width=140)
    module = network()
    calib = pictures(images + 4, 300) * 0.2 + 0.5
    calib, shown = calib[:images], calib[images:]
    settings = netdecouple.Settings(families=tuple(families.split(",")))
    table = Table(title=f"SSD300-VGG16, {images} calibration images, {families}; {len(shown)} new pictures")
    for column in (
        *("network", "class scores, relative error", "box offsets, relative error"),
        *("detections", "found again", "score off by", "overlap"),
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    before = by_module(module, shown)

    opened = TorchNetwork(module, collect(calib[:2], module, None, None))
    full = opened.build({name: exact(layer) for name, layer in opened.layer.items() if not layer.reason})
    table.add_row(*row("PyTorch, full rank", before, by_module(full.eval(), shown)))
    start = time.perf_counter()
    new: Any = netdecouple.decouple(module, calib, macs=macs, settings=settings)
    report = new.decoupling.report
    ratio, minutes = report.macs_before / report.macs, (time.perf_counter() - start) / 60
    table.add_row(*row(f"PyTorch, {ratio:.2f}× fewer MACs, {minutes:.0f} min", before, by_module(new, shown)))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ssd300.onnx"
        torch.onnx.export(module, torch.from_numpy(calib[:1]), str(path), dynamo=False, opset_version=17)
        proto = onnx.load(path)
    model = OnnxNetwork(read_model(proto), calib[:2])
    before = by_model(proto, shown)
    layers = {layer.name: exact(layer) for layer in model.layers if not layer.reason}
    table.add_row(*row("ONNX, full rank", before, by_model(model.build(layers), shown)))
    start = time.perf_counter()
    result = netdecouple.decouple(proto, calib, macs=macs, settings=settings)
    ratio = result.report.macs_before / result.report.macs
    minutes = (time.perf_counter() - start) / 60
    after = by_model(result.model, shown)
    table.add_row(*row(f"ONNX, {ratio:.2f}× fewer MACs, {minutes:.0f} min", before, after))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
