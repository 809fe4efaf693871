"""Hostile ONNX models: damaged files, impossible graphs, weights that lie where they should not."""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests import networks
from tests.fuzz.case import Case
from tests.fuzz.mutations import change, choice, damaged

HUGE = 10**5
COMMANDS = (
    ("decouple-proto",),
    ("check-layers",),
    ("inspect", "model.onnx", "--input-size", "10"),
    ("inspect", "model.onnx", "--input-size", "10", "--html", "out.html"),
    ("bench", "model.onnx", "--seconds", "0", "--layers", "--report", "out.json"),
    ("lower", "model.onnx", "-o", "out.onnx"),
    ("run", "model.onnx", "-o", "out.onnx", "--macs", "60%", "--families", "nd-dp", "--calib", "images.npy"),
    (
        "run",
        "model.onnx",
        "-o",
        "out.onnx",
        "--params",
        "90%",
        "--families",
        "sd,cd,cp",
        "--calib",
        "images.npy",
    ),
    ("run", "model.onnx", "-o", "out.onnx", "--macs", "60%", "--data-free", "--input-size", "10"),
    ("run", "model.onnx", "-o", "out.onnx", "--method", "nd-dp:T=2", "--data-free", "--input-size", "10"),
    ("eval", "model.onnx", "--data", "data.npz:images,labels"),
)


def case(rng: np.random.Generator) -> Case:
    """A hostile model, and a command that reads it."""
    command = choice(rng, COMMANDS)
    kind = rng.random()
    name = choice(rng, base())
    model = onnx.ModelProto.FromString(base()[name])
    files = {}
    if "images.npy" in command or "eval" in command:
        files = _images(model)
    links: dict[str, str] = {}
    if kind < 0.2:
        files["model.onnx"] = damaged(rng, base()[name])
    elif kind < 0.35:
        more, links = _external(rng, model)
        files |= more
    else:
        if kind < 0.5:
            _make_large(rng, model)
        for _ in range(int(rng.integers(1, 4))):
            change(rng, model)
        try:
            files["model.onnx"] = model.SerializeToString()
        except Exception:  # text that is no UTF-8
            files["model.onnx"] = damaged(rng, base()[name])
    return Case(tuple(command), files, links)


@functools.cache
def base() -> dict[str, bytes]:
    """Small models that are as they should be, by name."""
    made = {name: make() for name, make in networks.ALL.items()}
    made["detector"] = networks.detector()
    made["expanding"] = _expanding()
    made["halved"] = networks.halved(networks.residual())
    return {name: coarse(model).SerializeToString() for name, model in made.items()}


def coarse(model: onnx.ModelProto) -> onnx.ModelProto:
    """Round weights, so that cases that are kept take little room."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind == "f" and array.size > 1:
            rounded = np.round(32 * array) / 32 + (0.03125 * (array.ndim == 1))
            tensor.CopyFrom(numpy_helper.from_array(rounded.astype(array.dtype), tensor.name))
    return model


def _expanding() -> onnx.ModelProto:
    """Shapes that are computed: what a number in the file says can become any size."""
    b = networks.Builder(11)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "first"))
    shape = b.constant("shape", [1, 8, 8, 8], np.int64)
    x = b.node("Add", x, b.node("ConstantOfShape", shape))
    repeats = b.constant("repeats", [1, 1, 1, 1], np.int64)
    x = b.node("Tile", b.conv(x, 8, 8, 3, "second"), repeats)
    x = b.node("Resize", x, "", b.constant("scales", [1, 1, 2, 2]))
    x = b.node("Pad", x, b.constant("pads", [0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    x = b.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.node("Relu", b.conv(x, 8, 8, 3, "third"))
    b.classifier(x, 8)
    return b.model()


def _images(model: onnx.ModelProto) -> dict[str, bytes]:
    images = np.round(8 * networks.images_for(model, 12)) / 8
    single, both = io.BytesIO(), io.BytesIO()
    np.save(single, images)
    np.savez(both, images=images, labels=np.arange(12) % 10)
    return {"images.npy": single.getvalue(), "data.npz": both.getvalue()}


def _make_large(rng: np.random.Generator, model: onnx.ModelProto) -> None:
    """Let one number say something large."""
    tensors = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64]
    match int(rng.integers(5)):
        case 0 if tensors:
            tensor = choice(rng, tensors)
            values = numpy_helper.to_array(tensor).copy()
            values.flat[int(rng.integers(values.size))] = choice(rng, (HUGE, 10 * HUGE, 2**31, -1, 2**62))
            if rng.random() < 0.5:
                values[...] = HUGE
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        case 1:
            dims = model.graph.input[0].type.tensor_type.shape.dim
            for dim in dims[int(rng.integers(len(dims))) :]:
                dim.dim_value = HUGE
        case 2:
            node = choice(rng, [n for n in model.graph.node if n.op_type == "Conv"])
            kept = [a for a in node.attribute if a.name != "pads"]
            del node.attribute[:]
            node.attribute.extend(kept)
            size = choice(rng, (HUGE, 10**4, 2**31, -1, -HUGE))
            node.attribute.append(helper.make_attribute("pads", [size] * 4))
        case 3:
            node = choice(rng, [n for n in model.graph.node if n.op_type == "Conv"])
            name = choice(rng, ("strides", "dilations", "group", "kernel_shape"))
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)
            size = choice(rng, (HUGE, 2**31, 0, -1, -HUGE, 2**62))
            node.attribute.append(helper.make_attribute(name, size if name == "group" else [size, size]))
        case _:
            tensor = choice(rng, model.graph.initializer)
            tensor.dims[:] = [HUGE] * len(tensor.dims)


def _external(rng: np.random.Generator, model: onnx.ModelProto) -> tuple[dict[str, bytes], dict[str, str]]:
    """Weights in a second file, or in one that they may not lie in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="w", size_threshold=0)
        stored = onnx.load(path, load_external_data=False)
        weights = (Path(folder) / "w").read_bytes()
    tensors = [t for t in stored.graph.initializer if t.external_data]
    places = (
        "../secret",
        "/etc/passwd",
        "link",
        "folder/../../secret",
        "w/../w",
        "",
        ".",
        "folder",
        "W",
        "linked/w",
    )
    links = {"link": "../secret", "linked": "."}
    for tensor in tensors if rng.random() < 0.3 else [choice(rng, tensors)]:
        entries = {entry.key: entry for entry in tensor.external_data}
        match int(rng.integers(5)):
            case 0:
                entries["location"].value = choice(rng, places)
            case 1 if "offset" in entries:
                entries["offset"].value = str(choice(rng, (-1, 10**12, "x", "", 2**64, len(weights), 1.5)))
            case 2 if "length" in entries:
                entries["length"].value = str(choice(rng, (-1, 0, 10**12, "x", "", 2**64, 1)))
            case 3:
                tensor.dims[:] = [HUGE] * len(tensor.dims)
            case _:
                change(rng, tensor)
    weights = weights if rng.random() < 0.7 else weights[: int(rng.integers(len(weights)))]
    return {"model.onnx": stored.SerializeToString(), "w": weights}, links
