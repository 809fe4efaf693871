"""Which networks can be decoupled: every torchvision family and many of timm's, by running. Prints a table.

Random weights, small inputs. Each network is decoupled from its weights alone at the middle of what is
reachable; looked at is that the outputs keep their structure, that full rank computes the same, that the
saved folder makes the same network again, and that what ONNX Runtime makes of the exported one agrees.

    python benchmarks/coverage.py                          # everything, hours on one core
    python benchmarks/coverage.py --only resnet18 --only ssd300_vgg16
    python benchmarks/coverage.py --print --markdown docs/coverage.md

Results are kept in docs/coverage.json; a run that was cut off goes on where it was.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from torch import nn

import netdecouple
from netdecouple import Settings
from netdecouple.api import decouple
from netdecouple.convolution import Factorization
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method
from netdecouple.frontends.torch.network import TorchNetwork
from netdecouple.frontends.torch.samples import collect
from netdecouple.frontends.torch.trace import tensors
from netdecouple.network import Layer

LIMIT = 600  # seconds per network
SAMPLES = 10

# one of every family, and those of the paper and of its authors' own list
CLASSIFIERS = (
    *("alexnet", "vgg16", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    *("densenet121", "googlenet", "inception_v3", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small"),
    *("mnasnet0_5", "shufflenet_v2_x0_5", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf"),
    *("regnet_x_400mf", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t"),
)
DETECTORS = (
    *("ssd300_vgg16", "ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet50_fpn"),
    *("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn", "retinanet_resnet50_fpn"),
    *("retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"),
)
SEGMENTERS = (
    *("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet_v3_large",
)
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "swin3d_t")
TIMM = (
    *("resnet10t", "resnet18", "resnet26d", "resnetv2_50", "resnetaa50", "seresnet50", "ecaresnet26t"),
    *("skresnet18", "res2net50_26w_4s", "resnest14d", "resnext50_32x4d", "xception65", "xception41"),
    *("densenet121", "dpn48b", "dla34", "hrnet_w18_small", "vgg11_bn", "vovnet39a", "selecsls42b"),
    *("cspresnet50", "cspdarknet53", "darknet53", "dm_nfnet_f0", "nf_regnet_b0", "regnety_002", "rexnet_100"),
    *("efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv3_small_100", "mixnet_s"),
    *("mobilenetv2_100", "ghostnet_100", "repvgg_a0", "convnext_atto", "inception_v3", "inception_resnet_v2"),
    *("fbnetc_100", "hardcorenas_a", "lcnet_050", "tinynet_e", "edgenext_xx_small", "inception_next_tiny"),
)


@dataclass(frozen=True)
class Outcome:
    """What came of one network."""

    name: str
    kind: str
    verdict: str  # "works", "partly" or "not"
    why: str
    layers: int = 0
    changed: int = 0
    ratio: float = 0.0  # times fewer MACs
    seconds: float = 0.0


def built(name: str) -> tuple[nn.Module, list[Any]]:
    """A network with random weights, and samples for it."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    kind, _, key = name.partition(":")
    if kind == "timm":
        import timm

        module = timm.create_model(key, pretrained=False)
        least = 96 if key in ("inception_v3", "inception_resnet_v2") else 64
        size = max(least, (module.pretrained_cfg or {}).get("min_input_size", (3, 64, 64))[-1])
        if module.pretrained_cfg.get("fixed_input_size"):
            size = module.pretrained_cfg["input_size"][-1]
        return module.eval(), [torch.randn(SAMPLES, 3, size, size)]
    options: dict[str, Any] = {"weights": None}
    if kind in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if kind == "detection" and not key.startswith("ssd"):
        options |= {"min_size": 128, "max_size": 128}  # it would make every picture 800 pixels high
    if "rcnn" in key:
        # pictures this small hold fewer things than the usual thousand proposals and hundred detections
        options |= {"rpn_post_nms_top_n_test": 50, "box_detections_per_img": 10}
    if kind == "classification" and key in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    path = {"classification": key, "video": f"video.{key}"}.get(kind, key)
    module = get_model(path.rpartition(".")[2], **options).eval()
    if kind == "detection":
        return module, [[torch.rand(3, 96, 96)] for _ in range(SAMPLES)]
    if kind == "video":
        frames, side = (16, 224) if key in ("mvit_v1_b", "s3d") else (8, 64)
        return module, [torch.randn(SAMPLES, 3, frames, side, side)]
    side = {"inception_v3": 96, "vit_b_16": 224, "maxvit_t": 224}.get(key, 64)
    return module, [torch.randn(SAMPLES, 3, side, side)]


def looked_at(name: str) -> Outcome:
    """Decouple one network and look at everything that has to hold."""
    kind, _, key = name.partition(":")
    start = time.perf_counter()
    module, calib = built(name)
    problems = []
    network = TorchNetwork(module, collect(calib, module, None, None))
    total = sum(layer.macs for layer in network.layers)
    least = sum(_least(layer) for layer in network.layers)
    settings = Settings(data_free=True, families=("nd-dp",))
    new = decouple(module, calib, macs=0.5 * (1 + least / total), settings=settings, samples=None)
    report = new.decoupling.report
    changed = [row.name for row in report.layers if row.family != "kept"]
    args, kwargs = network.placed(collect(calib, module, None, None)[:1])
    with torch.no_grad():
        before, after = module(*args, **kwargs), new.eval()(*args, **kwargs)
        if _structure(before) != _structure(after):
            problems.append("its outputs changed their structure")
        full = network.build({name: exact(network.torch_layers[name].layer) for name in changed}).eval()
        worst = max(map(_difference, tensors(before), tensors(full(*args, **kwargs))), default=0.0)
        if not worst < 1e-3:
            problems.append(f"full rank differs by {worst:.0e}")
    problems += _reloaded(name, new, args, kwargs)
    if kind != "detection":  # torchvision's own tracing of detectors is another matter
        problems += _exported(new, module, args)
    seconds = time.perf_counter() - start
    ratio = report.macs_before / report.macs
    verdict = "partly" if problems else "works"
    return Outcome(key, kind, verdict, "; ".join(problems), len(report.layers), len(changed), ratio, seconds)


def _least(layer: Layer) -> int:
    """The least MACs that ND in its DP form can bring a layer to."""
    if layer.geometry is None or layer.reason or layer.upsamples or layer.geometry.is_pointwise:
        return layer.macs
    structure = method("nd-dp").structure(layer.geometry, (Step(1),))
    return min(layer.macs, round(structure.macs(*layer.size) * layer.maps))


def exact(layer: Layer) -> Factorization:
    """A layer at full rank."""
    assert layer.geometry is not None
    problem = Problem.data_free(layer.geometry, layer.weight, layer.bias)
    (family,) = method("cd" if layer.geometry.is_pointwise else "nd-dp", True, rounds=0).families
    return family.fit(problem, family.exact(layer.geometry)).astype(np.float32)


def _reloaded(name: str, new: nn.Module, args: Any, kwargs: Any) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        netdecouple.save(new, Path(folder) / "saved")
        again = netdecouple.load(built(name)[0], Path(folder) / "saved")
        pairs = zip(tensors(new(*args, **kwargs)), tensors(again.eval()(*args, **kwargs)), strict=True)
        return [] if all(_difference(a, b) < 1e-5 for a, b in pairs) else ["the reloaded network differs"]


def _exported(new: nn.Module, original: nn.Module, args: Any) -> list[str]:
    """What is wrong with the exported network, unless the original cannot be exported either."""
    found, why = _through_onnx(new, args)
    if found is None:
        return [f"ONNX: {why}"] if _through_onnx(original, args)[0] is not None else []
    with torch.no_grad():
        pairs = zip(tensors(new(*args)), map(torch.from_numpy, found), strict=False)
        worst = max(_difference(a, b) for a, b in pairs)
    return [] if worst < 1e-3 else [f"ONNX Runtime differs by {worst:.0e}"]


def _through_onnx(module: nn.Module, args: Any) -> tuple[list[np.ndarray] | None, str]:
    """The outputs in ONNX Runtime by the first of PyTorch's exporters that can, or why neither can."""
    why = ""
    for dynamo in (False, True):
        noise = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), contextlib.redirect_stdout(noise):
            path = Path(folder) / "new.onnx"
            try:
                torch.onnx.export(module, args, str(path), dynamo=dynamo)
                session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
                return session.run(None, {session.get_inputs()[0].name: args[0].numpy()}), ""
            except Exception as error:
                why = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:100]}"
    return None, why


def _structure(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.dtype, output.ndim
    if isinstance(output, dict):
        return {key: _structure(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return type(output).__name__, [_structure(value) for value in output]
    return type(output).__name__


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative to the larger tensor's root mean square."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    a, b = one.double(), other.double()
    return float((a - b).square().mean().sqrt() / a.square().mean().sqrt().clamp(min=1e-12))


def _in_process(name: str, connection: Any, prepare: Callable[[], None] | None) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kind, _, key = name.partition(":")
    try:
        if prepare is not None:
            prepare()
        outcome = looked_at(name)
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:160]}"
        outcome = Outcome(key, kind, "not", why)
    connection.send(outcome)


def outcomes(names: list[str], prepare: Callable[[], None] | None = None) -> Iterator[Outcome]:
    """Look at networks one by one, each in a process of its own: what one does cannot harm the next."""
    context = multiprocessing.get_context("spawn")
    for name in names:
        kind, _, key = name.partition(":")
        mine, theirs = context.Pipe()
        process = context.Process(target=_in_process, args=(name, theirs, prepare))
        process.start()
        theirs.close()
        try:
            yield mine.recv() if mine.poll(LIMIT) else Outcome(key, kind, "not", f"took over {LIMIT} seconds")
        except EOFError:
            yield Outcome(key, kind, "not", f"its process ended with {process.exitcode}")
        finally:
            process.kill()
            process.join()


def markdown(found: list[Outcome]) -> str:
    """The table, and how many work."""
    lines = ["| network | | verdict | layers changed | fewer MACs |", "|---|---|---|---|---|"]
    for o in found:
        numbers = f"{o.changed} of {o.layers} | {o.ratio:.2f}×" if o.layers else "|"
        lines.append(f"| {o.name} | {o.kind} | {o.verdict}{f': {o.why}' if o.why else ''} | {numbers} |")
    lines.append("")
    for title, kinds in (("torchvision", {o.kind for o in found} - {"timm"}), ("timm", {"timm"})):
        own = [o for o in found if o.kind in kinds]
        works = sum(o.verdict == "works" for o in own)
        if own:
            lines.append(f"{title}: {works} of {len(own)} work ({100 * works / len(own):.0f} %).")
    return "\n".join(lines) + "\n"


def every() -> list[str]:
    groups = (
        ("classification", CLASSIFIERS),
        ("detection", DETECTORS),
        ("segmentation", SEGMENTERS),
        ("video", VIDEO),
        ("timm", TIMM),
    )
    return [f"{kind}:{name}" for kind, names in groups for name in names]


def main(
    only: Annotated[list[str] | None, typer.Option(help="Names; all if there are none.")] = None,
    store: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("docs/coverage.json"),
    only_print: Annotated[
        bool, typer.Option("--print", help="Print what is known, and run nothing.")
    ] = False,
    document: Annotated[Path | None, typer.Option("--markdown", help="Write the table there.")] = None,
) -> None:
    """Fill the table, and print it."""
    run(only, store, only_print, document)


def run(
    only: list[str] | None,
    store: Path,
    only_print: bool = False,
    document: Path | None = None,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Do as `main`; ``prepare`` is called first in every process."""
    console = Console(width=150)
    store.parent.mkdir(parents=True, exist_ok=True)
    lines = store.read_text().splitlines() if store.exists() else []
    found = {(o.kind, o.name): o for o in (Outcome(**json.loads(line)) for line in lines)}
    wanted = [n for n in every() if not only or n in only or n.partition(":")[2] in only]
    missing = [n for n in wanted if only or tuple(n.split(":", 1)) not in found]
    for outcome in outcomes([] if only_print else missing, prepare):
        found[outcome.kind, outcome.name] = outcome
        with store.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        console.log(
            f"{outcome.kind} {outcome.name}: {outcome.verdict} {outcome.why} "
            f"{outcome.changed}/{outcome.layers} {outcome.ratio:.2f}× {outcome.seconds:.0f} s"
        )
    order = {name: i for i, name in enumerate(every())}
    table = markdown(sorted(found.values(), key=lambda o: order.get(f"{o.kind}:{o.name}", len(order))))
    console.print(table)
    if document is not None:
        document.write_text(table)


if __name__ == "__main__":
    typer.run(main)
