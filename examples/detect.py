"""A detector: ``python examples/detect.py`` (needs ``netdecouple[torch]``).

Like torchvision's detectors, it takes a list of images of any size and returns a list of dictionaries with
any number of boxes. Modules are not traced: netdecouple finds the layers by running the module. The script
trains a small network to find rectangles in noise, decouples it, and compares the boxes. Fifteen seconds on
one core.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional

import netdecouple

CELL = 8  # pixels per cell of the grid that boxes are predicted on
SCORE = 0.5  # boxes below are left out


class Detector(nn.Module):
    """Predicts, for every cell, the score that an object's centre is in it, and the object's edges."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_i, n_o, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(n_i, n_o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_o), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(64, 5, 3, padding=1)

    def maps(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores before the sigmoid (n, h, w), and left, top, right, bottom (n, h, w, 4) in pixels."""
        out = self.head(self.features(batch)).permute(0, 2, 3, 1)
        rows, columns = (torch.arange(n) * CELL + CELL / 2 for n in out.shape[1:3])
        middle = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        sides = CELL * functional.softplus(out[..., 1:])
        return out[..., 0], torch.cat([middle - sides[..., :2], middle + sides[..., 2:]], dim=-1)

    def forward(self, pictures: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        detections = []
        for picture in pictures:
            logits, boxes = (part[0] for part in self.maps(picture[None]))
            scores = logits.sigmoid()
            peak = functional.max_pool2d(scores[None], 3, 1, padding=1)[0] == scores  # one box per object
            selected = peak & (scores > SCORE)
            order = scores[selected].argsort(descending=True)
            detections.append({"boxes": boxes[selected][order], "scores": scores[selected][order]})
        return detections


def scene(size: tuple[int, int] = (64, 64)) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a picture (1, h, w) of one to three rectangles in noise; return it and their boxes (m, 4)."""
    picture = 0.15 * torch.randn(1, *size)
    boxes = []
    for _ in range(int(torch.randint(1, 4, ()))):
        w, h = torch.randint(10, 25, (2,)).tolist()
        left, top = (int(torch.randint(0, room, ())) for room in (size[1] - w, size[0] - h))
        picture[:, top : top + h, left : left + w] += 0.4 + 0.5 * torch.rand(())
        boxes.append([left, top, left + w, top + h])
    return picture, torch.tensor(boxes, dtype=torch.float32)


def train(net: Detector, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        pictures, boxes = zip(*(scene() for _ in range(16)), strict=True)
        logits, predicted = net.maps(torch.stack(pictures))
        target, loss = torch.zeros_like(logits), torch.zeros(())
        for index, objects in enumerate(boxes):
            for box in objects:
                column, row = ((box[:2] + box[2:]) / 2 / CELL).int().tolist()
                target[index, row, column] = 1
                loss = loss + functional.smooth_l1_loss(predicted[index, row, column], box)
        loss = loss / 16 + 10 * functional.binary_cross_entropy_with_logits(
            logits, target, pos_weight=torch.tensor(5.0)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()


def overlaps(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Compute the intersection over union of boxes (n, 4) and others (m, 4): (n, m)."""
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def recall(detections: list[dict[str, torch.Tensor]], truth: list[torch.Tensor]) -> float:
    """Return the share of the objects that a box overlaps by more than half."""
    hits = [(overlaps(t, d["boxes"]) > 0.5).any(1) for t, d in zip(truth, detections, strict=True)]
    return torch.cat(hits).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a detector, decouple it, compare its boxes.")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--macs", default="2x")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Detector()
    train(net, given.steps)

    calib = [[scene()[0]] for _ in range(100)]  # every batch is what forward takes: a list of pictures
    faster = netdecouple.decouple(net, calib, macs=given.macs)
    report = faster.decoupling.report

    pictures, truth = map(list, zip(*(scene((64, 96)) for _ in range(100)), strict=True))
    with torch.no_grad():
        before, after = net(pictures), faster(pictures)
    print(f"{report.macs_before / report.macs:.2f}× fewer MACs, {sum(map(len, truth))} objects")
    print(f"original    finds {recall(before, truth):.1%}")
    print(f"decoupled   finds {recall(after, truth):.1%}")
    for name, detection in (("original", before[0]), ("decoupled", after[0])):
        for box, score in zip(
            detection["boxes"].round().int().tolist(), detection["scores"].tolist(), strict=True
        ):
            print(f"{name:<11} {score:.2f} at {box}")


if __name__ == "__main__":
    main()
