"""Make the demo network and its images: ``python benchmarks/train_digits.py`` (needs ``netdecouple[train]``).

The images are handwritten digits of scikit-learn, each drawn at a random place, size and angle on a grey
background among fragments of other digits. The network is a small VGG, trained on freshly drawn images
and written with its batch normalisations as they are. One thread and fixed seeds; about five minutes.
"""

import argparse
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SIZE = 32  # height and width of an image
TEST = 500  # digits kept for the test, two images each
CALIB = 512  # calibration images, one each of as many training digits
EPOCHS, BATCH = 100, 64
LAYERS = (32, "pool", 64, 64, 64, "pool", 96, 96)  # 3x3 convolutions by their output channels


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits as (N, 1, 32, 32) in 0..1: training digits and labels, test digits and labels."""
    pixels, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        pixels.reshape(-1, 1, 8, 8) / 16, labels, test_size=TEST, random_state=0, stratify=labels
    )

    def enlarge(x: np.ndarray) -> Tensor:
        return F.interpolate(torch.tensor(x, dtype=torch.float32), size=SIZE, mode="bicubic").clamp(0, 1)

    return enlarge(train), torch.tensor(train_labels), enlarge(test), torch.tensor(test_labels)


def draw(chosen: Tensor, pool: Tensor, rng: torch.Generator) -> Tensor:
    """One cluttered image per chosen digit, as whole grey levels 0..255; the clutter comes from the pool."""
    n = len(chosen)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=rng)

    def warp(x: Tensor, scale: Tensor, reach: Tensor) -> Tensor:
        angle, shear = uniform(-0.3, 0.3), uniform(-0.15, 0.15)
        cos, sin = angle.cos() / scale, angle.sin() / scale
        shift = uniform(-1, 1, 2) * reach[:, None]
        linear = torch.stack([cos, shear - sin, sin, cos], 1).view(n, 2, 2)
        theta = torch.cat([linear, -linear @ shift[:, :, None]], 2)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)

    coarse = uniform(0, 0.45, 1, 5, 5)
    image = F.interpolate(coarse, size=SIZE, mode="bilinear")
    axis = torch.arange(SIZE)
    for _ in range(4):
        other = pool[torch.randint(len(pool), (n,), generator=rng)]
        centre = uniform(0, SIZE, 2, 1)
        near = (axis - centre).abs() < 4
        window = near[:, 0, :, None] & near[:, 1, None, :]
        fragment = warp(other, uniform(0.5, 0.9), torch.full((n,), 0.4)) * window[:, None]
        image = torch.maximum(image, fragment * uniform(0.3, 0.85, 1, 1, 1))
    scale = uniform(0.5, 0.85)
    ink = warp(chosen, scale, 1 - scale)
    image = image + ink * (uniform(0.55, 1, 1, 1, 1) - image)
    image = image + 0.04 * torch.randn(image.shape, generator=rng)
    return (image * 16).round().clamp(0, 15) * 17  # sixteen levels, so that the file stays small


def network() -> nn.Sequential:
    """The network, with PyTorch's usual initial weights."""
    features, channels = nn.Sequential(), 1
    for layer in LAYERS:
        if isinstance(layer, int):
            conv = nn.Conv2d(channels, layer, 3, padding=1, bias=False)
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)  # faster
            features.append(conv)
            features.append(nn.BatchNorm2d(layer))
            features.append(nn.ReLU())
            channels = layer
        else:
            features.append(nn.MaxPool2d(2))
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(channels, 10)}
    return nn.Sequential(OrderedDict(features=features, **head))


def fit(net: nn.Sequential, pool: Tensor, labels: Tensor) -> None:
    """Train on images drawn anew in every epoch."""
    rng = torch.Generator().manual_seed(1)
    steps = len(pool) // BATCH
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=EPOCHS * steps)
    net.train()
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for batch in torch.randperm(len(pool), generator=rng)[: steps * BATCH].view(steps, BATCH).unbind():
            loss = F.cross_entropy(net(draw(pool[batch], pool, rng) / 255), labels[batch])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
            total += loss.item()
        if epoch % 10 == 0:
            print(f"epoch {epoch}/{EPOCHS}: loss {total / steps:.3f}", flush=True)


def export(net: nn.Sequential, path: Path) -> None:
    """Write the network as ONNX, batch normalisations not folded."""
    torch.onnx.export(
        net.eval(),
        (torch.zeros(2, 1, SIZE, SIZE),),
        path,
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo network and draw its images.")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the two files")
    out: Path = parser.parse_args().out
    start = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, train_labels, test, test_labels = digits()

    net = network()
    fit(net, train, train_labels)
    export(net, out / "digits.onnx")

    rng = torch.Generator().manual_seed(2)
    calib, images = draw(train[:CALIB], train, rng), draw(test.repeat(2, 1, 1, 1), test, rng)
    labels = test_labels.repeat(2).numpy().astype(np.int64)
    np.savez_compressed(
        out / "digits.npz",
        calib=calib.permute(0, 2, 3, 1).numpy().astype(np.uint8),
        images=images.permute(0, 2, 3, 1).numpy().astype(np.uint8),
        labels=labels,
    )

    session = ort.InferenceSession(out / "digits.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": (images / 255).numpy()})
    accuracy = np.mean(np.argmax(logits, 1) == labels)
    print(f"accuracy {accuracy:.2%} on {len(images)} images; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
