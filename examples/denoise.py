"""Images in, images out: ``python examples/denoise.py`` (needs ``netdecouple[torch]``).

The script trains a small denoiser of DnCNN's shape on the images that come with the package, decouples it,
and compares both in dB. Decoupling works as for a classifier: outputs that are not class scores are compared
by relative error, and no clean image is needed. Half a minute on one core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import netdecouple

SIGMA = 30 / 255  # of the noise


class Denoiser(nn.Module):
    """Predicts the noise and subtracts it."""

    def __init__(self, depth: int = 5, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image - self.noise(image)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return clean images (N, 1, 32, 32) in 0..1: for training, and for the test."""
    with np.load(Path(netdecouple.__file__).parent / "demo" / "digits.npz") as data:
        train, test = (torch.from_numpy(data[key]).permute(0, 3, 1, 2) / 255 for key in ("calib", "images"))
    return train, test[:200]


def noisy(clean: torch.Tensor) -> torch.Tensor:
    return clean + SIGMA * torch.randn_like(clean)


def train(net: nn.Module, clean: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = clean[torch.randint(len(clean), (16,))]
        optimizer.zero_grad()
        functional.mse_loss(net(noisy(batch)), batch).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def psnr(clean: torch.Tensor, restored: torch.Tensor) -> float:
    """Mean over images, in dB."""
    error = (clean - restored.clamp(0, 1)).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a denoiser, decouple it, compare in dB.")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--macs", default="2x")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clean, test = images()
    net = Denoiser()
    train(net, clean, given.steps)

    faster = netdecouple.decouple(net, noisy(clean[:300]), macs=given.macs)
    report = faster.decoupling.report
    inputs = noisy(test)
    with torch.no_grad():
        before, after = net(inputs), faster(inputs)
    print(f"noisy       {psnr(test, inputs):.2f} dB")
    print(f"denoised    {psnr(test, before):.2f} dB")
    print(f"decoupled   {psnr(test, after):.2f} dB with {report.macs_before / report.macs:.2f}× fewer MACs")
    print(f"relative error of its outputs on held-out images: {report.agreement.divergence:.1e}")


if __name__ == "__main__":
    main()
