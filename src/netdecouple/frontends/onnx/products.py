"""The MACs of every ONNX operator that multiplies matrices, whether its layer can be decoupled or not.

Every function takes a node, and the shapes of its inputs and outputs; () stands for one that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import onnx

from netdecouple.frontends.onnx.proto import Constants, attributes_of
from netdecouple.kernels import DOMAIN, OPERATOR

Shape = tuple[int, ...]
Count = Callable[[onnx.NodeProto, Sequence[Shape], Sequence[Shape]], int]
OPTIMIZED = "made by ONNX Runtime's optimizer; give the model as it was before"
QUANTIZED = "quantized; decouple the float model, and quantize the result"
COMPUTED = "a product of two computed tensors"


class Product(NamedTuple):
    """How an operator's MACs are counted, and why it is kept."""

    macs: Count
    reason: str


def product_of(node: onnx.NodeProto) -> Product | None:
    """Return how a node's MACs are counted; None if it has none, or is an operator that is not known."""
    if node.domain in _DOMAINS:
        product = _PRODUCTS.get(node.op_type)
    else:
        product = _FUSED if (node.domain, node.op_type) == (DOMAIN, OPERATOR) else None
    if product is not None and node.domain == _BLOCKED:
        return product._replace(reason=OPTIMIZED)
    return product


def has_unknown_weights(node: onnx.NodeProto, constants: Constants) -> bool:
    """Whether an operator that is not known reads a constant of two axes or more, as weights are."""
    return not is_known(node) and any(len(constants[t].dims) > 1 for t in node.input if t in constants)


def is_known(node: onnx.NodeProto) -> bool:
    """Whether a node's MACs are counted, or it is a standard operator that has none."""
    return node.domain == "" or product_of(node) is not None


def is_convolution(node: onnx.NodeProto) -> bool:
    return node.op_type == OPERATOR or ("Conv" in node.op_type and product_of(node) is not None)


def _convolution(weight: int = 1) -> Count:
    """Every output reads the weights of one filter; ``weight`` is that input's place."""
    return lambda node, inputs, outputs: math.prod(outputs[0]) * math.prod(inputs[weight][1:])


def _transposed(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _matmul(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    is_turned = attributes_of(node).get("transA", 0)
    return math.prod(outputs[0]) * inputs[0][-2 if is_turned else -1]


def _recurrent(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    x, *weights = inputs[:3]
    return math.prod(x[:2]) * sum(map(math.prod, weights))


def _einsum(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Multiply the sizes of all axes, as if it were one nest of loops; axes of an ellipsis by themselves."""
    sizes: dict[str, int] = {}
    terms = attributes_of(node)["equation"].decode().replace(" ", "").split("->")[0].split(",")
    for term, shape in zip(terms, inputs, strict=True):
        before, dots, after = term.partition("...")
        rest = len(shape) - len(before) - len(after) if dots else 0
        labels = [*before, *(f"...{rest - i}" for i in range(rest)), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values()) * (len(terms) - 1)


def _attention(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Two products with as many keys as there are, after that with the weights if it has its own."""
    x, other, *_ = *inputs, ()
    if (node.domain, node.op_type) == ("com.microsoft", "Attention"):
        return math.prod(x[:-1]) * math.prod(other) + 2 * math.prod(outputs[0]) * x[1]
    keys = other[-2] if other else x[1]  # queries, keys and values may be one tensor
    return 2 * math.prod(outputs[0]) * keys


def _fused(node: onnx.NodeProto, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    images, _, *size = outputs[0]
    return images * math.prod(size) * sum(map(math.prod, inputs[1:3]))


_BLOCKED = "com.microsoft.nchwc"
_DOMAINS = ("", "com.microsoft", _BLOCKED)
_FUSED = Product(_fused, "already decoupled")
_PRODUCTS = {
    "Attention": Product(_attention, "attention"),
    "Conv": Product(_convolution(), ""),
    "ConvInteger": Product(_convolution(), QUANTIZED),
    "ConvTranspose": Product(_transposed, "transposed convolution"),
    "DeformConv": Product(_convolution(), "deformable convolution"),
    "DynamicQuantizeLSTM": Product(_recurrent, QUANTIZED),
    "DynamicQuantizeMatMul": Product(_matmul, QUANTIZED),
    "Einsum": Product(_einsum, "einsum"),
    "FusedConv": Product(_convolution(), OPTIMIZED),
    "FusedGemm": Product(_matmul, OPTIMIZED),
    "FusedMatMul": Product(_matmul, OPTIMIZED),
    "GRU": Product(_recurrent, "recurrent layer"),
    "Gemm": Product(_matmul, COMPUTED),
    "LSTM": Product(_recurrent, "recurrent layer"),
    "MatMul": Product(_matmul, COMPUTED),
    "MatMulInteger": Product(_matmul, QUANTIZED),
    "MatMulIntegerToFloat": Product(_matmul, QUANTIZED),
    "MatMulNBits": Product(_matmul, QUANTIZED),
    "MultiHeadAttention": Product(_attention, "attention"),
    "NhwcFusedConv": Product(_convolution(), OPTIMIZED),
    "QGemm": Product(_matmul, QUANTIZED),
    "QLinearConv": Product(_convolution(3), QUANTIZED),
    "QLinearMatMul": Product(_matmul, QUANTIZED),
    "RNN": Product(_recurrent, "recurrent layer"),
}
