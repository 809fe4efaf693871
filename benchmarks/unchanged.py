"""Whether two versions of netdecouple make the same networks: record each, then compare the records.

    python benchmarks/unchanged.py record before.json --source ../before/src
    python benchmarks/unchanged.py record after.json
    python benchmarks/unchanged.py compare before.json after.json

Every run is a call of the command line or of the public Python functions, in a process of its own, so that
nothing inside the package has to stay as it is. A record holds every plan, and the SHA-256 of the weights,
operators and connections of every network that was written. Records are comparable on one machine: another
processor rounds differently. Runs of pretrained networks need ../shared; all others run without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("NETDECOUPLE_SHARED") or ROOT.parent / "shared")
DIGITS = ROOT / "src" / "netdecouple" / "demo"
CIFAR = f"{SHARED}/data/cifar10.npz:calib"
FACTORIES = '''
import numpy as np, torch
from torch import nn

torch.manual_seed(0)

class Detector(nn.Module):
    """Boxes and scores of two scales, random but fixed weights, scores with a wide spread."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        widths = (3, 16, 32, 48, 64)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(widths, widths[1:])
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 12, 3, padding=1) for width in widths[3:])
        for part in self.parameters():
            part.data = torch.randn(part.shape, generator=generator) * 0.1

    def forward(self, x):
        maps = []
        for stage in self.body:
            x = stage(x)
            maps.append(x)
        found = [head(m).permute(0, 2, 3, 1).flatten(1, 2) for head, m in zip(self.heads, maps[2:])]
        return torch.cat(found, dim=1)

def detector():
    return Detector().eval()

def resnet20():
    return _resnet(3, "SHARED/models/resnet20.pt")

def pictures():
    return np.random.default_rng(0).standard_normal((24, 3, 64, 64)).astype(np.float32)

class Block(nn.Module):
    def __init__(self, n_i, n_o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_i, n_o, 3, stride, 1, bias=False), nn.BatchNorm2d(n_o)
        self.conv2, self.bn2 = nn.Conv2d(n_o, n_o, 3, 1, 1, bias=False), nn.BatchNorm2d(n_o)
        self.extra = n_o - n_i

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return torch.relu(x + y)

class ResNet(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for index, (n_i, n_o) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            first = Block(n_i, n_o, 1 if n_i == n_o else 2)
            stage = nn.Sequential(first, *(Block(n_o, n_o, 1) for _ in range(blocks - 1)))
            setattr(self, f"layer{index}", stage)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))

def _resnet(blocks, path):
    module = ResNet(blocks)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()
'''
PYTHON = """
import netdecouple, numpy as np, torch, factories
from netdecouple import Settings
pictures = torch.from_numpy(factories.pictures())
module = factories.detector()
new = netdecouple.decouple(module, pictures, macs=0.5, settings=Settings(families=("nd", "sd")))
netdecouple.save(new, "module")
swept = netdecouple.sweep(module, pictures, (0.7, 0.5), settings=Settings(families=("nd",)), output="swept")
again = netdecouple.apply_plan(module, new.decoupling.plan, pictures)
netdecouple.save(again, "again")
"""


@dataclass(frozen=True)
class Run:
    """One run: how the command line is called, and what it has to have first."""

    name: str
    arguments: tuple[str, ...] = ()
    python: str = ""  # a script instead
    shared: bool = True
    killed_after: int = 0  # files in the work folder, after which the run is ended, and started again


def runs() -> list[Run]:
    """Every run, quick ones first."""
    digits, images = str(DIGITS / "digits.onnx"), f"{DIGITS / 'digits.npz'}:calib"
    labelled = f"{DIGITS / 'digits.npz'}:images,labels"
    demo = ("run", digits, "-o", "new.onnx", "--calib", images, "--samples", "200")
    resnet, more = (f"{SHARED}/models/resnet{depth}.onnx" for depth in (20, 56))
    small = ("run", resnet, "-o", "new.onnx", "--calib", CIFAR, "--samples", "200")
    torch_options = ("--calib", "factories:pictures", "--macs", "50%")
    detector = ("run", "factories:detector", *torch_options)
    dncnn = ("run", f"{SHARED}/models/dncnn25.onnx", "-o", "new.onnx", "--samples", "24", "--macs", "50%")
    vgg = ("run", f"{SHARED}/models/vgg16_cifar10.onnx", "-o", "new.onnx", "--calib", CIFAR)
    deep = ("run", more, "-o", "new.onnx", "--calib", CIFAR, "--samples", "100", "--macs", "50%")
    module = ("run", "factories:resnet20", "-o", "new", "--calib", CIFAR, "--preset", "cifar10")
    return [
        Run("digits, MACs", (*demo, "--macs", "2x"), shared=False),
        Run("digits, fused", (*demo, "--macs", "2x", "--families", "nd", "--emit", "fused"), shared=False),
        Run("digits, rule", (*demo, "--method", "nd-dp:T=4"), shared=False),
        Run("digits, rule of shares", (*demo, "--method", "cd+nd:40%"), shared=False),
        Run(
            "digits, accuracy",
            (*demo, "--max-drop", "1", "--labels", labelled, "--families", "nd"),
            shared=False,
        ),
        Run(
            "digits, sweep",
            ("sweep", digits, "--calib", images, "--samples", "200", "--macs", "70%,50%", "-o", "networks"),
            shared=False,
        ),
        Run(
            "digits, work resumed",
            (*demo, "--macs", "2x", "--work", "work", "--shards", "2"),
            shared=False,
            killed_after=6,
        ),
        Run("digits, workers", (*demo, "--macs", "2x", "--workers", "2", "--shards", "3"), shared=False),
        Run("digits, published", (*demo, "--macs", "60%", "--data-free", "--uniform-rank"), shared=False),
        Run("module, Python", python=PYTHON, shared=False),
        Run("detector, PyTorch", (*detector, "-o", "new"), shared=False),
        Run("detector, to ONNX", (*detector, "-o", "new.onnx"), shared=False),
        Run("ResNet-20, MACs", (*small, "--macs", "50%")),
        Run("ResNet-20, parameters", (*small, "--params", "50%", "--families", "nd,cd")),
        Run("ResNet-20, data-free", (*small, "--macs", "60%", "--data-free")),
        Run("ResNet-20, PyTorch", (*module, "--samples", "100", "--macs", "50%")),
        Run("DnCNN", (*dncnn, "--calib", f"{SHARED}/data/denoise.npz:calib", "--families", "nd,sd")),
        Run("ResNet-56", (*deep, "--families", "nd")),
        Run("VGG16", (*vgg, "--samples", "100", "--macs", "30%", "--families", "sd,cd")),
    ]


def record(run: Run, source: Path, folder: Path) -> dict[str, Any]:
    """Make a run in an empty folder, and tell what came of it."""
    (folder / "factories.py").write_text(FACTORIES.replace("SHARED", str(SHARED)))
    environment = os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    if run.python:
        command = [sys.executable, "-c", run.python]
    else:
        written = () if run.arguments[0] == "sweep" else ("--plan-out", "plan.json")
        command = [sys.executable, "-m", "netdecouple", *run.arguments, *written, "--quiet"]
    begin = time.monotonic()
    if run.killed_after:
        _kill_midway(command, folder, environment, run.killed_after)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    networks = {str(p.relative_to(folder)): network_hash(p) for p in sorted(folder.rglob("*.onnx"))}
    networks |= {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*.safetensors"))
    }
    plan = json.loads((folder / "plan.json").read_text()) if (folder / "plan.json").exists() else None
    return {"seconds": round(time.monotonic() - begin, 1), "networks": networks, "plan": plan}


def _kill_midway(command: list[str], folder: Path, environment: dict[str, str], files: int) -> None:
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(folder.glob("work/*.npz"))) < files:
        time.sleep(0.02)
    process.kill()
    process.wait()


def network_hash(path: Path) -> str:
    """Hash of an ONNX file without its metadata, which holds the plan and the version."""
    proto = onnx.load(path)
    del proto.metadata_props[:]
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


PREDICTIONS = ("predicted_error", "predicted_loss")


def without_predictions(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """A plan's choices: everything but predictions and the format's version."""
    if plan is None:
        return None
    rows = [{k: v for k, v in row.items() if k not in PREDICTIONS} for row in plan["layers"]]
    return {k: v for k, v in plan.items() if k != "version"} | {"layers": rows}


def same(equal: bool) -> str:
    return "same" if equal else "DIFFERENT"


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print a line per run; return how many differ."""
    print(f"{'run':<28}{'networks':<12}{'choices':<12}{'predictions':<14}seconds")
    differing = 0
    for name in before:
        one, two = before[name], after.get(name, {"error": "not run"})
        if "error" in one or "error" in two:
            print(f"{name:<28}{(two.get('error') or one.get('error') or '')[-300:]}")
            differing += 1
            continue
        networks = one["networks"] == two["networks"] and bool(one["networks"])
        choices = without_predictions(one["plan"]) == without_predictions(two["plan"])
        differing += not (networks and choices)
        predictions = one["plan"] == two["plan"]
        print(
            f"{name:<28}{same(networks):<12}{same(choices):<12}{same(predictions):<14}"
            f"{one['seconds']} → {two['seconds']}"
        )
    return differing


def main() -> None:
    """Record the runs of one version, or compare two records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("output", type=Path)
    recording.add_argument("--source", type=Path, default=ROOT / "src", help="the package's parent folder")
    recording.add_argument("--only", default="", help="runs whose name holds this")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        before, after = (json.loads(p.read_text()) for p in (options.before, options.after))
        sys.exit(min(compare(before, after), 1))
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    for run in runs():
        if options.only not in run.name or (run.shared and not SHARED.is_dir()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            known[run.name] = record(run, options.source.resolve(), Path(folder))
        print(run.name, known[run.name].get("seconds") or known[run.name]["error"], flush=True)
        options.output.write_text(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
