"""Small ONNX networks with seeded random weights, one function each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 8


class Builder:
    """A graph in the making; every method adds a node and returns its output."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, array: Any, dtype: Any = np.float32) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(
        self, operator: str, *inputs: str, out: str = "", name: str | None = None, **options: Any
    ) -> str:
        out = out or f"{operator.lower()}{len(self.nodes)}"
        label = out if name is None else name
        self.nodes.append(helper.make_node(operator, inputs, [out], name=label, **options))
        return out

    def weight(self, name: str, *shape: int, dtype: Any = np.float32) -> str:
        """He-scaled weights (n_o, n_i / groups, …)."""
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return self.constant(name, self.rng.standard_normal(shape) * scale, dtype)

    def bias(self, name: str, n: int) -> str:
        return self.constant(name, 0.1 * self.rng.standard_normal(n))

    def conv(self, x: str, n_i: int, n_o: int, k: int | tuple[int, int], out: str, **options: Any) -> str:
        """A convolution with bias, "same" pads unless told otherwise, named like its output."""
        kh, kw = (k, k) if isinstance(k, int) else k
        if "auto_pad" not in options:
            options.setdefault("pads", [kh // 2, kw // 2, kh // 2, kw // 2])
        weight = self.weight(f"{out}.weight", n_o, n_i // options.get("group", 1), kh, kw)
        return self.node("Conv", x, weight, self.bias(f"{out}.bias", n_o), out=out, **options)

    def batch_norm(self, x: str, n: int, out: str) -> str:
        """A BatchNorm whose statistics are far from those of a fresh one."""
        u = self.rng.uniform
        parts = {
            "scale": u(0.5, 1.5, n),
            "shift": u(-0.3, 0.3, n),
            "mean": u(-0.3, 0.3, n),
            "var": u(0.5, 2, n),
        }
        names = [self.constant(f"{out}.{part}", array) for part, array in parts.items()]
        return self.node("BatchNormalization", x, *names, out=out)

    def classifier(self, x: str, n: int, classes: int = 10) -> str:
        pooled = self.node("GlobalAveragePool", x)
        flat = self.node("Flatten", pooled)
        weight = self.weight("fc.weight", classes, n)
        return self.node("Gemm", flat, weight, self.bias("fc.bias", classes), out="logits", transB=1)

    def model(
        self,
        outputs: Sequence[tuple[str, Sequence[Any]]] = (("logits", ("N", 10)),),
        shape: Sequence[Any] = ("N", 3, SIZE, SIZE),
        opset: int = 17,
        ir_version: int = 8,
        kind: int = TensorProto.FLOAT,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info("image", kind, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs],
            self.initializers,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=ir_version,
            producer_name="tests",
        )
        helper.set_model_props(model, {"classes": "ten", "licence": "none"})
        return model


def classifier(opset: int = 17, seed: int = 0, batch: Any = "N", ir_version: int = 8) -> onnx.ModelProto:
    """conv-BN-ReLU three times, the second at stride 2; (N, 3, 8, 8) → (N, 10)."""
    b = Builder(seed)
    x = "image"
    for index, (n_i, n_o, stride) in enumerate([(3, 12, 1), (12, 16, 2), (16, 16, 1)], 1):
        x = b.conv(x, n_i, n_o, 3, f"conv{index}", strides=[stride, stride])
        x = b.node("Relu", b.batch_norm(x, n_o, f"bn{index}"), out=f"relu{index}")
    b.classifier(x, 16)
    return b.model([("logits", (batch, 10))], (batch, 3, SIZE, SIZE), opset, ir_version)


def residual() -> onnx.ModelProto:
    """A ResNet: two blocks with identity shortcuts and, between them, one with a projection."""
    b = Builder(1)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "stem"))
    for index, (n_i, n_o) in enumerate([(8, 8), (8, 12), (12, 12)], 1):
        stride = n_o // n_i + (n_o % n_i > 0)
        short = x if n_i == n_o else b.conv(x, n_i, n_o, 1, f"b{index}.short", strides=[stride] * 2)
        y = b.node("Relu", b.conv(x, n_i, n_o, 3, f"b{index}.first", strides=[stride] * 2))
        y = b.conv(y, n_o, n_o, 3, f"b{index}.second")
        x = b.node("Relu", b.node("Add", y, short, out=f"b{index}.sum"), out=f"b{index}.out")
    b.classifier(x, 12)
    return b.model()


def perceptron(batch: Any = "N") -> onnx.ModelProto:
    """A convolution, and a head of every kind of matrix product; (N, 3, 8, 8) → (N, 10)."""
    b = Builder(10)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "conv", strides=[2, 2]))
    x = b.node("Gemm", b.node("Flatten", x), b.weight("fc1.weight", 128, 48), out="fc1")
    x = b.node("Relu", x)
    x = b.node("MatMul", x, b.weight("fc2.weight", 48, 40), out="fc2")
    x = b.node("Relu", x)
    short = b.node("Gemm", x, b.weight("fc3.weight", 40, 40), b.bias("fc3.bias", 40), out="fc3", transB=1)
    x = b.node("Relu", b.node("Add", x, short))
    b.node("Gemm", x, b.weight("fc4.weight", 40, 10), b.constant("fc4.bias", 0.3), out="logits")
    return b.model([("logits", (batch, 10))], (batch, 3, SIZE, SIZE))


def columns(operator: str, in_turns: bool, batch: Any = "N") -> onnx.ModelProto:
    """Fully connected layers that read every column of a map; (N, 3, 8, 8) → (N, 8, 10).

    Its columns are rows (N, 8, 16), or (8, N, 16) where the images take turns; without the first axis for a
    Gemm, which has two.
    """
    b = Builder(11)
    x = b.node("Relu", b.conv("image", 3, 16, 3, "conv"))
    columns = b.node("ReduceMean", x, axes=[2], keepdims=0, out="columns")  # (N, 16, 8)
    rows = b.node("Transpose", columns, perm=[2, 0, 1] if in_turns else [0, 2, 1])
    weight = b.constant("read.weight", b.rng.standard_normal((16, 3)) @ b.rng.standard_normal((3, 24)))
    if operator == "Gemm":
        flat = b.node("Reshape", rows, b.constant("flat", [-1, 16], np.int64))
        read = b.node(operator, flat, weight, b.bias("read.bias", 24), out="read")
        shape = [SIZE, -1, 24] if in_turns else [-1, SIZE, 24]
        read = b.node("Reshape", read, b.constant("lines", shape, np.int64))
    else:
        read = b.node(operator, rows, weight, out="read")
    letters = b.node("MatMul", b.node("Relu", read), b.weight("letters.weight", 24, 10), out="letters")
    b.node("Transpose", letters, perm=[1, 0, 2] if in_turns else [0, 1, 2], out="lines_read")
    return b.model([("lines_read", (batch, SIZE, 10))], (batch, 3, SIZE, SIZE))


def additions() -> onnx.ModelProto:
    """Additions that are no residual branches: a gate (N, C, 1, 1), a map (1, C, H, W), the layer itself."""
    b = Builder(2)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "stem"), out="stem.out")
    gate = b.conv(b.node("GlobalAveragePool", x), 8, 8, 1, "gate.conv")
    x = b.node("Relu", b.node("Add", b.conv(x, 8, 8, 3, "gated"), gate))
    # computed from x, so that it cannot be folded, but the same for all images
    plane = b.node("ReduceMax", x, axes=[0], keepdims=1, out="plane")
    x = b.node("Relu", b.node("Add", plane, b.conv(x, 8, 8, 3, "mapped")))
    y = b.conv(x, 8, 8, 3, "doubled")
    x = b.node("Relu", b.node("Add", y, y))
    early = b.conv(x, 8, 8, 3, "early")  # its sum needs `late`, which is not known before it
    late = b.conv(x, 8, 8, 3, "late")
    x = b.node("Relu", b.node("Add", early, late))
    constant = b.constant("constant", b.rng.standard_normal((1, 8, SIZE, SIZE)))
    x = b.node("Add", b.node("Relu", b.conv(x, 8, 8, 3, "shifted")), constant)
    shared = b.conv(x, 8, 8, 3, "read.twice")
    both = b.node("Add", shared, x)
    x = b.node("Mul", both, shared)
    b.classifier(x, 8)
    return b.model(opset=17)


def kinds() -> onnx.ModelProto:
    """Every kind of convolution in a row; (N, 3, 12, 12) → (N, 10)."""
    b = Builder(3)
    rows: list[tuple[str, int, int, Any, dict[str, Any]]] = [
        ("grouped", 3, 8, 3, {}),
        ("halves", 8, 12, 3, {"group": 2}),
        ("depthwise", 12, 12, 3, {"group": 12}),
        ("pointwise", 12, 8, 1, {}),
        ("dilated", 8, 8, 3, {"dilations": [2, 1], "pads": [2, 1, 2, 1]}),
        ("lopsided", 8, 10, 3, {"pads": [0, 1, 2, 1]}),
        ("five", 10, 8, 5, {}),
        ("flat", 8, 8, (1, 3), {}),
        ("tall", 8, 8, (3, 1), {"strides": [1, 1]}),
        ("upper", 8, 8, 3, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("lower", 8, 8, (2, 4), {"auto_pad": "SAME_LOWER"}),
        ("strided", 8, 12, 3, {"strides": [1, 2]}),
        ("valid", 12, 8, 3, {"auto_pad": "VALID"}),
    ]
    x = "image"
    for name, n_i, n_o, k, options in rows:
        x = b.conv(x, n_i, n_o, k, name, **options)
        x = b.node("LeakyRelu", x)
    b.classifier(x, 8)
    return b.model(shape=("N", 3, 12, 12))


def restorer() -> onnx.ModelProto:
    """Fully convolutional, any height and width, two 4-D outputs, a global skip and a transposed conv."""
    b = Builder(4)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "head"))
    x = b.node("Relu", b.conv(x, 8, 8, 3, "body", auto_pad="SAME_UPPER"))
    b.node("Add", b.conv(x, 8, 3, 3, "tail"), "image", out="restored")
    weight = b.weight("up.weight", 8, 1, 2, 2)
    b.node("ConvTranspose", x, weight, out="mask", strides=[2, 2])
    return b.model(
        [("restored", ("N", 3, "H", "W")), ("mask", ("N", 1, "H2", "W2"))], ("N", 3, "H", "W"), opset=13
    )


def without_names() -> onnx.ModelProto:
    """The classifier, as exporters write it that give nodes no names."""
    model = classifier()
    for node in model.graph.node:
        node.name = ""
    return model


def shared_weight() -> onnx.ModelProto:
    """Two convolutions that read one initializer."""
    b = Builder(5)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "stem"))
    weight = b.weight("shared.weight", 8, 8, 3, 3)
    for name in ("one", "two"):
        x = b.node("Relu", b.node("Conv", x, weight, out=name, pads=[1, 1, 1, 1]))
    b.classifier(x, 8)
    return b.model()


def constant_node() -> onnx.ModelProto:
    """The classifier with the second convolution's weight in a Constant node."""
    model = classifier()
    tensor = next(t for t in model.graph.initializer if t.name == "conv2.weight")
    node = helper.make_node("Constant", [], [tensor.name], name="stored", value=tensor)
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, node)
    return model


def computed_weight() -> onnx.ModelProto:
    """A convolution whose weight depends on the image, between two ordinary ones."""
    b = Builder(6)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "before"))
    base = b.weight("base", 8, 8, 3, 3)
    scale = b.node("ReduceMean", "image", keepdims=0)
    weight = b.node("Mul", base, scale)
    x = b.node("Conv", x, weight, out="computed", pads=[1, 1, 1, 1])
    x = b.node("Relu", b.conv(b.node("Relu", x), 8, 8, 3, "after"))
    b.classifier(x, 8)
    return b.model()


def with_if() -> onnx.ModelProto:
    """An If whose branches read tensors of the graph around them: one early, one just made."""
    b = Builder(7)
    early = b.node("Relu", b.conv("image", 3, 8, 3, "first"), out="early")
    x = b.node("Relu", b.conv(early, 8, 8, 3, "second"), out="recent")
    x = b.node("Relu", b.conv(x, 8, 8, 3, "third"), out="last")
    b.constant("half", 0.5)
    then = helper.make_graph(
        [helper.make_node("Add", ["early", "recent"], ["then_out"])],
        "then",
        [],
        [helper.make_tensor_value_info("then_out", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Mul", ["last", "half"], ["else_out"])],
        "else",
        [],
        [helper.make_tensor_value_info("else_out", TensorProto.FLOAT, None)],
    )
    mean = b.node("ReduceMean", "image", keepdims=0)
    bright = b.node("Greater", mean, b.constant("zero", 0.0))
    chosen = b.node("If", bright, out="chosen", then_branch=then, else_branch=other)
    x = b.node("Relu", b.conv(b.node("Add", chosen, x), 8, 8, 3, "fourth"))
    b.classifier(x, 8)
    return b.model()


def half_precision() -> onnx.ModelProto:
    """float32 in and out, but the middle convolution computes in float16."""
    b = Builder(8)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "before"))
    x = b.node("Cast", x, to=TensorProto.FLOAT16)
    weight = b.weight("half.weight", 8, 8, 3, 3, dtype=np.float16)
    x = b.node("Conv", x, weight, out="half", pads=[1, 1, 1, 1])
    x = b.node("Cast", x, to=TensorProto.FLOAT)
    x = b.node("Relu", b.conv(x, 8, 8, 3, "after"))
    b.classifier(x, 8)
    return b.model()


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in float16, inputs and outputs included."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def reader() -> onnx.ModelProto:
    """A CTC reader: eight steps of probabilities of six classes; (N, 3, 8, 32) → (N, 8, 6)."""
    b = Builder(14)
    x = b.node("Relu", b.conv("image", 3, 12, 3, "first", strides=[2, 2]))
    x = b.node("Relu", b.conv(x, 12, 16, 3, "second", strides=[2, 2]))
    x = b.conv(x, 16, 6, 3, "third")
    rows = b.node("Transpose", b.node("ReduceMean", x, axes=[2], keepdims=0), perm=[0, 2, 1])
    b.node("Softmax", b.node("Mul", rows, b.constant("sharp", 4.0)), out="steps", axis=2)
    return b.model([("steps", ("N", 8, 6))], ("N", 3, 8, 32))


def side_inputs() -> onnx.ModelProto:
    """Beside the images it takes the scales of a resampling, and a gain that has a default value."""
    b = Builder(12)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "first"))
    x = b.node("Relu", b.conv(b.node("Mul", x, b.constant("gain", 1.5)), 8, 16, 3, "second"))
    x = b.node("Resize", b.node("Relu", b.conv(x, 16, 16, 3, "third")), "", "scales", mode="nearest")
    b.classifier(x, 16)
    model = b.model()
    model.graph.input.insert(0, helper.make_tensor_value_info("scales", TensorProto.FLOAT, (4,)))
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, ()))
    return model


def with_custom_operator(operator: onnx.NodeProto, weights: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
    """Two convolutions, and between them an operator of another domain on 8 channels."""
    b = Builder(13)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "first"))
    operator.input[0] = x
    b.nodes.append(operator)
    b.initializers += weights
    b.classifier(b.node("Relu", b.conv(operator.output[0], 8, 16, 3, "second")), 16)
    model = b.model()
    model.opset_import.append(helper.make_opsetid(operator.domain, 1))
    return model


def channels_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network for images (N, H, W, C), as Keras models are exported."""
    for node in model.graph.node:
        node.input[:] = ["image/turned" if name == "image" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Transpose", ["image"], ["image/turned"], perm=[0, 3, 1, 2]))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims.insert(3, dims.pop(1))
    return model


def of_rows(model: onnx.ModelProto, size: int | str) -> onnx.ModelProto:
    """The same network for images of 3 × 8 × 8 as rows of numbers (N, 192), as sounds are."""
    for node in model.graph.node:
        node.input[:] = ["image/maps" if name == "image" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.int64([-1, 3, 8, 8]), "maps"))
    model.graph.node.insert(0, helper.make_node("Reshape", ["image", "maps"], ["image/maps"]))
    rows = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", size])
    model.graph.input[0].CopyFrom(rows)
    return model


def old_style() -> onnx.ModelProto:
    """IR version 3: every initializer is listed among the inputs too."""
    model = classifier(opset=11, ir_version=3)
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
    return model


def detector() -> onnx.ModelProto:
    """Two outputs: boxes in one list for the whole batch, and a scalar that has no batch at all."""
    b = Builder(9)
    x = b.node("Relu", b.conv("image", 3, 8, 3, "first"))
    x = b.conv(x, 8, 4, 3, "second")
    b.node("Reshape", x, b.constant("shape", [-1, 4], np.int64), out="boxes")
    b.node("ReduceMax", x, keepdims=0, out="best")
    return b.model([("boxes", ("M", 4)), ("best", ())])


ALL = {
    make.__name__: make
    for make in (
        classifier,
        residual,
        perceptron,
        additions,
        kinds,
        restorer,
        without_names,
        shared_weight,
        constant_node,
        computed_weight,
        with_if,
        half_precision,
        old_style,
    )
}


def images_for(model: onnx.ModelProto, count: int = 6, seed: int = 0) -> np.ndarray:
    """Inputs (count, C, H, W) that a model takes; 10 × 14 where it takes any size."""
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    shape = (count, dims[1] or 3, dims[2] or 10, dims[3] or 14)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
