"""Time and memory of converting large networks (random weights). Prints a table.

python benchmarks/conversion.py                                   # VGG16 at 224 × 224, through ONNX
python benchmarks/conversion.py --network resnet50 --images 256   # torchvision's, through the PyTorch door
"""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16(seed: int = 0) -> onnx.ModelProto:
    """VGG16 (Simonyan and Zisserman 2015, configuration D) with He et al. (2015) weights."""
    rng = np.random.default_rng(seed)
    nodes, weights, x, n_i = [], [], "input", 3

    def constant(name: str, *shape: int) -> str:
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.01
        array = rng.standard_normal(shape, np.float32) * np.float32(scale)
        weights.append(numpy_helper.from_array(array, name))
        return name

    def node(operator: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    for stage, widths in enumerate(WIDTHS):
        for index, n_o in enumerate(widths):
            name = f"conv{stage + 1}_{index + 1}"
            inputs = [x, constant(f"{name}.weight", n_o, n_i, 3, 3), constant(f"{name}.bias", n_o)]
            x = node(
                "Relu", [node("Conv", inputs, name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])], f"{name}.relu"
            )
            n_i = n_o
        x = node("MaxPool", [x], f"pool{stage + 1}", kernel_shape=[2, 2], strides=[2, 2])
    x, width = node("Flatten", [x], "flatten"), 512 * 49
    for index, n_o in enumerate((4096, 4096, 1000)):
        name = f"fc{index + 6}"
        x = node(
            "Gemm", [x, constant(f"{name}.weight", n_o, width), constant(f"{name}.bias", n_o)], name, transB=1
        )
        x, width = (node("Relu", [x], f"{name}.relu") if index < 2 else x), n_o
    graph = helper.make_graph(
        nodes,
        "vgg16",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["N", 1000])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pictures(count: int, size: int = 224, seed: int = 0) -> np.ndarray:
    """Random images (n, 3, size, size) as smooth as natural ones: power falls with frequency squared."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    images = np.empty((count, 3, size, size), np.float32)
    for image in images:
        noise = np.fft.rfft2(rng.standard_normal((3, size, size)))
        image[...] = np.fft.irfft2(noise / frequency, s=(size, size))
        image /= image.std()
    return images


def convert_model(folder: Path, images: int, macs: str, families: str) -> int:
    """Convert VGG16 as an ONNX model, by the command line; return its exit code."""
    model, data, output = (folder / name for name in ("vgg16.onnx", "images.npy", "faster.onnx"))
    onnx.save_model(vgg16(), model)
    np.save(data, pictures(images))
    command = [sys.executable, "-m", "netdecouple", "run", str(model), "-o", str(output)]
    command += ["--calib", str(data), "--macs", macs, "--samples", str(images), "--families", families]
    return subprocess.run(command, check=False).returncode


def convert_module(
    name: str, images: int, macs: str, families: str, prepare: Callable[[], Any] | None = None
) -> None:
    """Convert one of torchvision's networks as a module; ``prepare`` is called first."""
    if prepare is not None:
        prepare()
    import torch
    from torchvision.models import get_model

    import netdecouple

    torch.manual_seed(0)
    if name == "ssd300":
        module = get_model("ssd300_vgg16", weights=None, weights_backbone=None)
        unit = torch.from_numpy(pictures(images, 300)) * 0.2 + 0.5
        calib: Any = [[image] for image in unit]
    else:
        module, calib = get_model(name, weights=None), torch.from_numpy(pictures(images))
    settings = netdecouple.Settings(families=(families,))
    new: Any = netdecouple.decouple(module, calib, macs=macs, settings=settings, samples=None)
    report = new.decoupling.report
    print(f"{report.macs_before / report.macs:.2f}× fewer MACs, {report.agreement}")


def main(
    network: Annotated[str, typer.Option(help="vgg16 (ONNX), ssd300, or a name of torchvision's.")] = "vgg16",
    images: Annotated[int, typer.Option(help="Calibration images.")] = 256,
    macs: Annotated[str, typer.Option(help="MACs that may stay.")] = "50%",
    families: Annotated[str, typer.Option(help="As in `netdecouple run`.")] = "all",
) -> None:
    """Convert the network in a process of its own and print its time and peak memory."""
    convert(network, images, macs, families)


def convert(
    network: str, images: int, macs: str, families: str, prepare: Callable[[], Any] | None = None
) -> None:
    """Do as `main`; ``prepare`` is called before torchvision is imported."""
    start = time.perf_counter()
    if network == "vgg16":
        with tempfile.TemporaryDirectory() as folder:
            code = convert_model(Path(folder), images, macs, families)
    else:
        arguments = (network, images, macs, families, prepare)
        process = multiprocessing.get_context("spawn").Process(target=convert_module, args=arguments)
        process.start()
        process.join()
        code = process.exitcode or 0
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 << 20)
    table = Table(title=f"{network}, random weights")
    for column in ("families", "images", "MACs", "exit code", "minutes", "peak GiB"):
        table.add_column(column, justify="right")
    table.add_row(families, str(images), macs, str(code), f"{seconds / 60:.1f}", f"{peak:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
