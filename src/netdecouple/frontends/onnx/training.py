"""An ONNX network that PyTorch runs, so that its decoupled layers can be trained.

The graph between the layers is run by the PyTorch functions in `OPERATORS`, which have gradients. Any other
operator is run by the ONNX package's reference, without gradients: good for what computes shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.nn import functional

from netdecouple.convolution import Factorization
from netdecouple.errors import ModelError, first_line
from netdecouple.frontends.batches import squeezed
from netdecouple.frontends.onnx.proto import attributes_of, nodes_for
from netdecouple.frontends.torch.convolutions import Convolution, Factorized
from netdecouple.network import Array, Layer

if TYPE_CHECKING:
    from netdecouple.frontends.onnx.network import OnnxNetwork

Ints = Sequence[int]
NONE: Ints = ()


class OnnxTrainable:
    """An ONNX network with some layers as chains of stages, whose weights can be trained.

    Raises:
        ModelError: it is not float32, or an operator behind a changed layer has no gradients here.
    """

    def __init__(self, network: OnnxNetwork, factorizations: Mapping[str, Factorization]) -> None:
        self._network = network
        proto, places = network.model.proto, network.places
        self._parts = {
            name: Factorized.of(_convolution(places[name].layer), factorization)
            for name, factorization in factorizations.items()
        }
        self._replaced = {places[name].output: (places[name].input, name) for name in self._parts}
        self._outputs = network.output_names
        self._nodes, needed = nodes_for(proto.graph.node, self._outputs)
        self._attributes = [attributes_of(node) for node in self._nodes]
        self._references: dict[int, ReferenceEvaluator] = {}
        self._opsets = list(proto.opset_import)
        self._constants = {
            tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            for tensor in proto.graph.initializer
            if tensor.name in needed and tensor.data_type != onnx.TensorProto.STRING
        }
        if any(layer.weight.dtype != np.float32 for layer in network.layers):
            raise ModelError(f"{network.name}: only float32 networks can be refined; leave out refine=")

    @property
    def parameters(self) -> list[Tensor]:
        """The weights of all stages, and the biases."""
        return [parameter for part in self._parts.values() for parameter in part.parameters()]

    def factorizations(self) -> dict[str, Factorization]:
        """The changed layers with their weights as they are now."""
        return {name: part.factorization() for name, part in self._parts.items()}

    def augmented(self, images: Array, change: Callable[[Array], Array]) -> Array:
        """Return inputs of the same kind, with the pictures (n, c, h, w) changed."""
        changed = change(self._network.model.channels_first(images))
        return np.moveaxis(changed, 1, -1) if self._network.model.channels_last else changed

    def __call__(self, images: Array) -> list[Tensor]:
        """Run one batch of inputs, with gradients unless they are switched off."""
        x = self._network.padded(images, slice(0, len(images)))
        feeds = {name: torch.tensor(value) for name, value in self._network.model.feeds(x).items()}
        values: dict[str, Any] = {**self._constants, **feeds}
        for index, node in enumerate(self._nodes):
            place = self._replaced.get(node.output[0])
            if place is not None:
                values[node.output[0]] = self._parts[place[1]](values[place[0]])
                continue
            inputs = [values[name] if name else None for name in node.input]
            try:
                outputs = self._run(index, inputs)
            except Exception as error:
                raise ModelError(
                    f"{self._network.name}: it cannot be refined, as PyTorch cannot run its {node.op_type} "
                    f"{node.name!r} ({first_line(error)}); leave out refine="
                ) from error
            values.update(zip(node.output, outputs, strict=False))
        outputs = [values[name] for name in self._outputs]
        # a fixed batch was filled up
        outputs = [output[: len(images)] if self._network.model.batch else output for output in outputs]
        return [squeezed(output) for output in outputs]

    def _run(self, index: int, inputs: list[Any]) -> Sequence[Tensor]:
        node = self._nodes[index]
        operator = OPERATORS.get(node.op_type) if not node.domain else None
        if operator is not None:
            attributes = self._attributes[index]
            if node.op_type == "Split" and len(inputs) < 2:
                attributes = {"split": [], **attributes, "num_outputs": len(node.output)}
            outputs = operator(*inputs, **attributes)
            return outputs if isinstance(outputs, tuple) else (outputs,)
        if index not in self._references:
            self._references[index] = ReferenceEvaluator(_alone(node, self._opsets))
        feeds = {
            name: value.numpy(force=True) for name, value in zip(node.input, inputs, strict=True) if name
        }
        results = [torch.from_numpy(np.array(result)) for result in self._references[index].run(None, feeds)]
        if any(i is not None and i.requires_grad for i in inputs) and any(
            map(torch.is_floating_point, results)
        ):
            raise ValueError("the operator has no gradients here")
        return results


def _alone(node: onnx.NodeProto, opsets: Sequence[onnx.OperatorSetIdProto]) -> onnx.ModelProto:
    """A model of one node, with inputs and outputs of any type."""
    inputs = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    return helper.make_model(helper.make_graph([node], "node", inputs, outputs), opset_imports=opsets)


def _convolution(layer: Layer) -> Convolution:
    g = layer.geometry
    assert g is not None
    if layer.is_linear:
        return Convolution(n_o=g.n_o, n_i=g.n_i, kernel=())
    (top, left, bottom, right), kernel = g.pads, (g.kh, g.kw)
    return Convolution(
        n_o=g.n_o,
        n_i=g.n_i,
        kernel=kernel,
        strides=g.strides,
        before=(top, left),
        after=(bottom, right),
        dilations=g.dilations,
        groups=g.groups,
    )


def _padded(
    x: Tensor, kernel: Ints, strides: Ints, pads: Ints, dilations: Ints, auto_pad: bytes, value: float = 0.0
) -> Tensor:
    """Pad a map as a convolution or a pooling asks for."""
    rank = len(kernel)
    before, after = list(pads[:rank]) or [0] * rank, list(pads[rank:]) or [0] * rank
    if auto_pad in (b"SAME_UPPER", b"SAME_LOWER"):
        sizes = zip(x.shape[2:], kernel, strides or [1] * rank, dilations or [1] * rank, strict=True)
        total = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0) for n, k, s, d in sizes]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        before, after = (less, more) if auto_pad == b"SAME_UPPER" else (more, less)
    ends = [end for pair in zip(reversed(before), reversed(after), strict=True) for end in pair]
    return functional.pad(x, ends, value=value) if any(ends) else x


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints = NONE,
    pads: Ints = NONE,
    dilations: Ints = NONE,
    group: int = 1,
    kernel_shape: Ints = NONE,
    auto_pad: bytes = b"",
) -> Tensor:
    kernel, ones = weight.shape[2:], [1] * (weight.ndim - 2)
    x = _padded(x, kernel, strides, pads, dilations, auto_pad)
    zeros = [0] * len(ones)
    return torch.convolution(x, weight, bias, strides or ones, zeros, dilations or ones, False, zeros, group)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Ints = NONE,
    pads: Ints = NONE,
    dilations: Ints = NONE,
    group: int = 1,
    kernel_shape: Ints = NONE,
    output_padding: Ints = NONE,
) -> Tensor:
    rank = weight.ndim - 2
    ones, zeros = [1] * rank, [0] * rank
    y = torch.convolution(x, weight, None, strides or ones, zeros, dilations or ones, True, zeros, group)
    before, after, more = pads[:rank] or zeros, pads[rank:] or zeros, output_padding or zeros
    ends = [(-a, m - b) for a, b, m in zip(before, after, more, strict=True)]
    y = functional.pad(y, [end for pair in reversed(ends) for end in pair])
    return y if bias is None else y + bias.reshape(-1, *ones)


def _max_pool(
    x: Tensor,
    kernel_shape: Ints,
    strides: Ints = NONE,
    pads: Ints = NONE,
    dilations: Ints = NONE,
    ceil_mode: int = 0,
    auto_pad: bytes = b"",
    storage_order: int = 0,
) -> Tensor:
    rank = len(kernel_shape)
    x = _padded(x, kernel_shape, strides, pads, dilations, auto_pad, -math.inf)
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    y: Tensor = pool(x, kernel_shape, strides or [1] * rank, 0, dilations or [1] * rank, bool(ceil_mode))
    return y


def _average_pool(
    x: Tensor,
    kernel_shape: Ints,
    strides: Ints = NONE,
    pads: Ints = NONE,
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: bytes = b"",
) -> Tensor:
    rank = len(kernel_shape)
    pool: Any = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]

    def pooled(x: Tensor) -> Tensor:
        x = _padded(x, kernel_shape, strides, pads, NONE, auto_pad)
        y: Tensor = pool(x, kernel_shape, strides or [1] * rank, 0, bool(ceil_mode))
        return y

    y = pooled(x)
    return y if count_include_pad else y / pooled(torch.ones_like(x[:1, :1]))


def _global(reduce: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: reduce(x, dim=tuple(range(2, x.ndim)), keepdim=True)


def _reduced(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        axes_input: Tensor | None = None,
        axes: Ints = NONE,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        chosen = list(axes) if axes_input is None else axes_input.tolist()
        if not chosen and noop_with_empty_axes:
            return x
        return reduce(x, dim=tuple(chosen or range(x.ndim)), keepdim=bool(keepdims))

    return run


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return y if c is None else y + beta * c


def _clip(x: Tensor, low: Any = None, high: Any = None, min: Any = None, max: Any = None) -> Tensor:
    return x.clamp(min if low is None else low, max if high is None else high)


def _reshape(x: Tensor, shape: Tensor, allowzero: int = 0) -> Tensor:
    sizes = shape.tolist()
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


def _flatten(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(x: Tensor, perm: Ints = NONE) -> Tensor:
    return x.permute(tuple(perm or reversed(range(x.ndim))))


def _split(
    x: Tensor, sizes: Tensor | None = None, split: Ints = NONE, axis: int = 0, num_outputs: int = 0
) -> tuple[Tensor, ...]:
    chosen = list(split) if sizes is None else sizes.tolist()
    return x.split(chosen or -(-x.shape[axis] // num_outputs), axis)


def _slice(
    x: Tensor,
    first: Any = None,
    last: Any = None,
    along: Any = None,
    steps: Any = None,
    starts: Ints = NONE,
    ends: Ints = NONE,
    axes: Ints = NONE,
) -> Tensor:
    begins, stops = (list(a) if t is None else t.tolist() for t, a in ((first, starts), (last, ends)))
    chosen = list(axes or range(len(begins))) if along is None else along.tolist()
    where = [slice(None)] * x.ndim
    for axis, a, b, s in zip(
        chosen, begins, stops, [1] * len(begins) if steps is None else steps.tolist(), strict=True
    ):
        where[axis] = slice(a, b, s)
    return x[tuple(where)]


def _squeeze(x: Tensor, axes_input: Tensor | None = None, axes: Ints = NONE) -> Tensor:
    chosen = list(axes) if axes_input is None else axes_input.tolist()
    return x.squeeze(tuple(chosen)) if chosen else x.squeeze()


def _unsqueeze(x: Tensor, axes_input: Tensor | None = None, axes: Ints = NONE) -> Tensor:
    chosen = list(axes) if axes_input is None else axes_input.tolist()
    for axis in sorted(a % (x.ndim + len(chosen)) for a in chosen):
        x = x.unsqueeze(axis)
    return x


def _gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    return x[(*[slice(None)] * (axis % x.ndim), indices)]


def _pad(
    x: Tensor,
    amounts: Any = None,
    fill: Any = None,
    along: Any = None,
    pads: Ints = NONE,
    value: float = 0.0,
    mode: bytes = b"constant",
) -> Tensor:
    ends = list(pads) if amounts is None else amounts.tolist()
    axes = list(range(x.ndim)) if along is None else [a % x.ndim for a in along.tolist()]
    pairs = dict(zip(axes, zip(ends[: len(axes)], ends[len(axes) :], strict=True), strict=True))
    while pairs and not any(pairs.get(min(pairs), ())):  # PyTorch pads the last dimensions only
        del pairs[min(pairs)]
    if not pairs:
        return x
    flat = [e for axis in reversed(range(min(pairs), x.ndim)) for e in pairs.get(axis, (0, 0))]
    if mode == b"constant":
        return functional.pad(x, flat, value=value if fill is None else float(fill))
    return functional.pad(x, flat, mode={b"reflect": "reflect", b"edge": "replicate"}[mode])


def _resize(
    x: Tensor,
    *given: Any,
    mode: bytes = b"nearest",
    coordinate_transformation_mode: bytes = b"half_pixel",
    nearest_mode: bytes = b"",
    cubic_coeff_a: float = -0.75,
    **rest: Any,
) -> Tensor:
    roi_scales_sizes = given if len(given) > 1 else (None, *given)
    scales, sizes = (*roi_scales_sizes[1:], None)[:2]
    if sizes is not None and sizes.numel():
        size = sizes.tolist()[2:]
    else:
        factors = list(rest["scales"]) if scales is None else scales.tolist()
        size = [int(n * f) for n, f in zip(x.shape[2:], factors[2:], strict=True)]
    if mode == b"nearest":
        return functional.interpolate(x, size, mode="nearest")
    name = {b"linear": ("linear", "bilinear", "trilinear")[x.ndim - 3], b"cubic": "bicubic"}[mode]
    corners = coordinate_transformation_mode == b"align_corners"
    return functional.interpolate(x, size, mode=name, align_corners=corners)


def _depth_to_space(x: Tensor, blocksize: int, mode: bytes = b"DCR") -> Tensor:
    if mode == b"CRD":
        return functional.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    b, k = blocksize, c // blocksize**2
    return x.reshape(n, b, b, k, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, k, h * b, w * b)


def _space_to_depth(x: Tensor, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    return (
        x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)
    )


def _batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float = 1e-5, **rest: Any
) -> Tensor:
    return functional.batch_norm(x, mean, var, scale, bias, eps=epsilon)


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, **rest: Any
) -> Tensor:
    return functional.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _cast(x: Tensor, to: int, **rest: Any) -> Tensor:
    return x.to(torch.from_numpy(np.empty(0, helper.tensor_dtype_to_np_dtype(to))).dtype)


def _shape(x: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


# Every one takes a node's inputs, then its attributes by their names.
OPERATORS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "Div": _divide,
    "Dropout": lambda x, *rest, **attributes: x,
    "Elu": lambda x, alpha=1.0: functional.elu(x, alpha),
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist()))),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda x, approximate=b"none": functional.gelu(x, approximate=approximate.decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "InstanceNormalization": _instance_norm,
    "LRN": lambda x, size, alpha=1e-4, beta=0.75, bias=1.0: functional.local_response_norm(
        x, size, alpha, beta, bias
    ),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: functional.leaky_relu(x, alpha),
    "Log": torch.log,
    "LogSoftmax": lambda x, axis=-1: x.log_softmax(axis),
    "MatMul": torch.matmul,
    "Max": lambda *parts: torch.stack(torch.broadcast_tensors(*parts)).amax(0),
    "MaxPool": _max_pool,
    "Min": lambda *parts: torch.stack(torch.broadcast_tensors(*parts)).amin(0),
    "Mish": functional.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "PRelu": lambda x, slope: torch.where(x > 0, x, x * slope),
    "Pad": _pad,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "ReduceL2": _reduced(lambda x, dim, keepdim: x.square().sum(dim, keepdim).sqrt()),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": lambda x, **attributes: functional.selu(x),
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: x.softmax(axis),
    "Softplus": functional.softplus,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Sum": lambda *parts: sum(parts),
    "Tanh": torch.tanh,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
    "Where": torch.where,
}
