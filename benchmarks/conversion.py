"""Time and memory of converting a VGG16-shaped network at 224 × 224 (random weights). Prints a table.

python benchmarks/conversion.py            # 256 images, half the MACs
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

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


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Random images (n, 3, 224, 224) as smooth as natural ones: power falls with frequency squared."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(224)[:, None], np.fft.rfftfreq(224)[None])
    frequency[0, 0] = np.inf
    images = np.empty((count, 3, 224, 224), np.float32)
    for image in images:
        noise = np.fft.rfft2(rng.standard_normal((3, 224, 224)))
        image[...] = np.fft.irfft2(noise / frequency, s=(224, 224))
        image /= image.std()
    return images


def main(
    images: Annotated[int, typer.Option(help="Calibration images.")] = 256,
    macs: Annotated[str, typer.Option(help="MACs that may stay.")] = "50%",
    families: Annotated[str, typer.Option(help="As in `netdecouple run`.")] = "all",
) -> None:
    """Convert the network in a process of its own and print its time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        model, data, output = (Path(folder) / name for name in ("vgg16.onnx", "images.npy", "faster.onnx"))
        onnx.save_model(vgg16(), model)
        np.save(data, pictures(images))
        command = [
            sys.executable,
            "-m",
            "netdecouple",
            "run",
            str(model),
            "-o",
            str(output),
            "--calib",
            str(data),
        ]
        start = time.perf_counter()
        command += ["--macs", macs, "--samples", str(images), "--families", families]
        done = subprocess.run(command, check=False)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 << 20)
        table = Table(title="VGG16-shaped network, 224 × 224, random weights")
        for column in ("families", "images", "MACs", "exit code", "minutes", "peak GiB", "file MB"):
            table.add_column(column, justify="right")
        size = f"{output.stat().st_size / 1e6:.0f}" if output.exists() else "–"
        table.add_row(
            families, str(images), macs, str(done.returncode), f"{seconds / 60:.1f}", f"{peak:.1f}", size
        )
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
