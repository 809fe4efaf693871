"""Filters that nobody reads go, with all that belongs to them; the network computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.frontends.onnx.emission import FORMS, emit
from netdecouple.frontends.onnx.fused import absorb, is_fused, lower
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.frontends.onnx.proto import up_to
from netdecouple.frontends.onnx.pruning import drop_unread_channels
from netdecouple.runtimes.onnxruntime import open_session, run
from tests import networks
from tests.kernels.cases import separable

built = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
Dropped = dict[str, tuple[int, int]]


class Net(networks.Builder):
    """Small networks whose layers read some channels only; the stem makes 8 from the image's 3."""

    def stem(self, n: int = 8, out: str = "stem") -> str:
        return self.conv("image", 3, n, 3, out)

    def picked(self, x: str, channels: Sequence[int], out: str = "y", n_o: int = 5, k: int = 3) -> str:
        """A convolution of some channels, as channel pruning leaves it."""
        indices = self.constant(f"{out}.channels", channels, np.int64)
        return self.conv(
            self.node("Gather", x, indices, out=f"{out}.gather", axis=1), len(channels), n_o, k, out
        )

    def per_channel(self, name: str, *shape: int) -> str:
        return self.constant(name, self.rng.standard_normal(shape))

    def fused(
        self, x: str, n_i: int, n_o: int, rows: Sequence[int], out: str, form: Any = "fused", groups: int = 1
    ) -> str:
        """A decoupled layer whose depthwise rows read these channels."""
        g = ConvGeometry(n_o, n_i, 3, 3, pads=(1, 1, 1, 1), groups=groups)
        layer = separable(g, np.array(rows).reshape(groups, -1), self.rng)
        nodes, initializers = emit(layer, out, x, out, form)
        self.nodes += nodes
        self.initializers += initializers
        return out

    def finished(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        model = self.model(opset=opset)
        del model.graph.output[:]
        for name in outputs or ("y",):
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        if any(is_fused(node) for node in self.nodes):
            model.opset_import.append(helper.make_opsetid("netdecouple", 1))
        return model


def seen_shapes(model: onnx.ModelProto, x: np.ndarray) -> dict[str, tuple[int, ...]]:
    """What a network knows: the shapes that convolutions, matrix products and sums read and write."""
    kinds = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "DecoupledConv")
    nodes = [node for node in model.graph.node if node.op_type in kinds]
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    tensors = {t for node in nodes for t in (*node.input, *node.output) if t} - {"image", *constants}
    values = run(open_session(up_to(model, tensors)), None, {"image": x}) if tensors else []
    return {t: v.shape for t, v in zip(tensors, values, strict=True)} | {"image": x.shape} | constants


def filters(model: onnx.ModelProto) -> dict[str, int]:
    """How many filters every convolution has, by its output."""
    weights = {"Conv": (1, 0), "ConvTranspose": (1, 1), "DecoupledConv": (2, 0)}  # input, axis of its outputs
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    return {
        node.output[0]: dims[node.input[index]][axis]
        for node in model.graph.node
        for index, axis in [weights.get(node.op_type, (0, 0))]
        if index and node.input[index] in dims
    }


def lost(before: onnx.ModelProto, after: onnx.ModelProto) -> Dropped:
    """How many filters are left, of how many, of every convolution that lost some."""
    left = filters(after)
    return {output: (left[output], n) for output, n in filters(before).items() if left[output] < n}


def pruned(model: onnx.ModelProto) -> Dropped:
    """Prune, compare the outputs with those before, and check that a second time changes nothing."""
    x = networks.images_for(model)
    shapes = seen_shapes(model, x)
    before = onnx.ModelProto.FromString(model.SerializeToString())
    drop_unread_channels(model, shapes)
    for count in (len(x), 1):
        expected, found = (run(open_session(m), None, {"image": x[:count]}) for m in (before, model))
        for a, b in zip(found, expected, strict=True):
            assert np.isfinite(b).all()
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
    once = model.SerializeToString(deterministic=True)
    drop_unread_channels(model, shapes)
    assert model.SerializeToString(deterministic=True) == once
    return lost(before, model)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def shape_of(model: onnx.ModelProto, name: str) -> tuple[int, ...]:
    return next(tuple(t.dims) for t in model.graph.initializer if t.name == name)


def test_a_chain_of_layers() -> None:
    """Filters, biases and statistics go; the gather becomes the identity and goes too."""
    b = Net()
    x = b.node("Relu", b.batch_norm(b.stem(), 8, "bn"))
    b.picked(x, [1, 2, 5])
    model = b.finished()
    assert pruned(model) == {"stem": (3, 8)}
    assert operators(model) == ["Conv", "BatchNormalization", "Relu", "Conv"]
    assert shape_of(model, "stem.weight") == (3, 3, 3, 3)
    assert shape_of(model, "bn.mean") == (3,)
    assert "y.channels" not in {t.name for t in model.graph.initializer}


def test_channels_in_another_order_are_renumbered() -> None:
    """A gather that also sorts, counts from the end or repeats stays."""
    b = Net()
    b.picked(b.stem(), [7, -7, 3, 7])
    model = b.finished()
    assert pruned(model) == {"stem": (3, 8)}
    indices = next(t for t in model.graph.initializer if t.name == "y.channels")
    assert numpy_helper.to_array(indices).tolist() == [2, 0, 1, 2]


def test_weights_that_are_zero_read_nothing() -> None:
    """A convolution loses the columns that are zero for all filters that are read themselves."""
    b = Net()
    x = b.conv(b.stem(), 8, 6, 3, "middle")
    b.picked(x, [0, 1, 3])
    model = b.finished()
    weight = next(t for t in model.graph.initializer if t.name == "middle.weight")
    array = numpy_helper.to_array(weight).copy()
    array[:4, 2:6] = 0  # read by filters 4 and 5 only, which nobody reads; 2 by filter 2 only
    array[2, 2] = 1
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    assert pruned(model) == {"stem": (4, 8), "middle": (3, 6)}
    assert shape_of(model, "middle.weight") == (3, 4, 3, 3)


def test_the_image_keeps_its_channels() -> None:
    """Whoever calls the network gives them all, read or not."""
    b = Net()
    x = b.node("Relu", b.picked("image", [2, 0], "first"))
    b.node("Add", x, b.conv("image", 3, 5, 3, "second"), out="y")
    weight = b.initializers[-2]
    array = numpy_helper.to_array(weight).copy()
    array[:, 1] = 0
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    assert pruned(b.finished()) == {}


def test_gathers_of_gathers() -> None:
    """Both go."""
    b = Net()
    x = b.node("Gather", b.stem(), b.constant("outer", [1, 4, 6, 7], np.int64), axis=1)
    b.picked(x, [0, 2])
    model = b.finished()
    assert pruned(model) == {"stem": (2, 8)}
    assert operators(model) == ["Conv", "Conv"]


def test_gathers_of_features_need_all() -> None:
    """Which channels these belong to depends on the size of the maps."""
    b = Net()
    x = b.node("Gather", b.node("Flatten", b.stem()), b.constant("c", [0, 70], np.int64), axis=1)
    b.node("MatMul", x, b.weight("w", 2, 10), out="y")
    assert pruned(b.finished()) == {}


def test_nodes_with_more_than_one_output_need_all() -> None:
    """The places of maxima count through all channels."""
    b = Net()
    pool = helper.make_node("MaxPool", [b.stem()], ["pooled", "places"], kernel_shape=[2, 2])
    b.nodes.append(pool)
    b.picked("pooled", [3, 5])
    b.node("Cast", "places", to=TensorProto.FLOAT, out="z")
    assert pruned(b.finished("y", "z")) == {}


def test_one_channel_at_least_stays() -> None:
    """Where all weights are zero, the first filter is kept, all the way."""
    b = Net()
    x = b.node("Relu", b.conv(b.node("Relu", b.stem()), 8, 6, 3, "middle"))
    b.node("Conv", x, b.constant("zero", np.zeros((4, 6, 3, 3))), b.bias("bias", 4), out="y")
    assert pruned(b.finished()) == {"middle": (1, 6)}
    b = Net()
    b.picked(b.stem(), [5, 6])
    weight = next(t for t in b.initializers if t.name == "y.weight")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((5, 2, 3, 3), np.float32), weight.name))
    assert pruned(b.finished()) == {"stem": (1, 8)}


def residual(left: Sequence[int], right: Sequence[int]) -> onnx.ModelProto:
    b = Net()
    x = b.node("Relu", b.stem())
    y = b.conv(x, 8, 8, 3, "branch")
    x = b.node("Relu", b.node("Add", y, x), out="sum")
    b.node("Add", b.picked(x, left, "left"), b.picked(x, right, "right"), out="y")
    return b.finished()


def test_a_sum_loses_what_none_of_its_operands_needs() -> None:
    """The branch reads all channels of the stem, so that all stay there, and in the branch they must too."""
    assert pruned(residual([0, 1, 2], [1, 2, 6])) == {}


def test_branches_that_agree() -> None:
    """Every reader of the shortcut leaves out the same channels: all layers that are summed lose them."""
    b = Net()
    x = b.node("Relu", b.stem())
    for name in ("one", "two"):
        x = b.node("Relu", b.node("Add", b.picked(x, [0, 2, 3, 7], name, n_o=8), x))
    b.picked(x, [2, 5, 7])
    model = b.finished()
    assert pruned(model) == {"stem": (5, 8), "one": (5, 8), "two": (5, 8)}


@pytest.mark.parametrize(
    "other",
    [
        lambda b, x: b.node("Tile", b.conv("image", 3, 1, 3, "one"), b.constant("t", [1, 8, 1, 1], int)),
        lambda b, x: b.conv(x, 8, 8, 3, "grouped", group=2),
        lambda b, x: b.node("LRN", b.conv(x, 8, 8, 3, "lrn.input"), size=3),
        lambda b, x: b.node("Softmax", b.conv(x, 8, 8, 3, "softmax.input"), axis=1),
    ],
    ids=["unknown", "grouped", "neighbours", "all channels"],
)
def test_a_sum_with_what_cannot_lose_channels(other: Callable[[Net, str], str]) -> None:
    """Operators that mix channels."""
    b = Net()
    x = b.stem()
    b.picked(b.node("Add", x, other(b, x)), [1, 4])
    assert pruned(b.finished()) == {}


def test_a_sum_with_the_image() -> None:
    """A global shortcut."""
    b = Net()
    b.picked(b.node("Add", b.stem(3), "image"), [1])
    assert pruned(b.finished()) == {}


def test_a_concatenation_is_split() -> None:
    """Each part loses its own."""
    b = Net()
    x = b.node("Relu", b.stem())
    parts = b.node("Concat", b.conv(x, 8, 4, 3, "a"), b.conv(x, 8, 6, 3, "b"), x, axis=-3)
    b.picked(b.node("Relu", parts), [0, 3, 5, 10, 11, 12, 13, 14, 15, 16, 17])
    assert pruned(b.finished()) == {"a": (2, 4), "b": (1, 6)}


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_layer_in_the_middle(multiplier: int) -> None:
    """It keeps all filters of the channels that it keeps."""
    b = Net()
    x = b.node("Relu", b.stem())
    x = b.conv(x, 8, 8 * multiplier, 3, "depthwise", group=8)
    b.picked(x, [4 * multiplier, 4 * multiplier + 1, 7 * multiplier])
    model = b.finished()
    kept = 3 if multiplier == 1 else 2
    assert pruned(model) == {"stem": (kept, 8), "depthwise": (kept * multiplier, 8 * multiplier)}


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "MaxPool"])
@pytest.mark.parametrize("head", ["Flatten", "Reshape", "Reshape 0"])
@pytest.mark.parametrize("product", ["Gemm", "Gemm transposed", "MatMul"])
def test_features_of_channels_that_are_not_read(pool: str, head: str, product: str) -> None:
    """A whole block of a matrix's rows must be zero; with the channel it goes."""
    b = Net()
    options: dict[str, Any] = {} if pool.startswith("Global") else {"kernel_shape": [4, 4], "strides": [4, 4]}
    x = b.node(pool, b.node("Relu", b.stem()), **options)
    pixels = 1 if pool.startswith("Global") else 4
    if head == "Flatten":
        x = b.node("Flatten", x)
    else:
        shape = [0, -1] if head == "Reshape 0" else [-1, 8 * pixels]
        x = b.node("Reshape", x, b.constant("shape", shape, np.int64))
    weight = b.rng.standard_normal((8, pixels, 10))
    weight[[1, 2, 6]] = 0
    weight[4, 1:] = 0
    weight = weight.reshape(-1, 10)
    if product == "Gemm":
        b.node("Gemm", x, b.constant("w", weight.T), b.bias("bias", 10), out="y", transB=1)
    else:
        b.node(product.split()[0], x, b.constant("w", weight), out="y")
    model = b.finished()
    assert pruned(model) == {"stem": (5, 8)}
    assert sorted(shape_of(model, "w")) == sorted((5 * pixels, 10))


def test_a_flattened_list_is_not_taken_for_features() -> None:
    """Boxes of four numbers for the whole batch."""
    b = Net()
    x = b.node("Reshape", b.stem(), b.constant("shape", [-1, 8], np.int64))
    weight = b.rng.standard_normal((8, 10))
    weight[3] = 0
    b.node("MatMul", x, b.constant("w", weight), out="y")
    assert pruned(b.finished()) == {}


@pytest.mark.parametrize(
    "between",
    [
        lambda b, x: b.node("PRelu", x, b.per_channel("c", 8, 1, 1)),
        lambda b, x: b.node("PRelu", x, b.per_channel("c", 1)),
        lambda b, x: b.node("PRelu", x, b.per_channel("c", 1, 1, 1)),
        lambda b, x: b.node("Mul", x, b.per_channel("c", 1, 8, 1, 1)),
        lambda b, x: b.node("Add", b.per_channel("c", 8, 1, 1), x),
        lambda b, x: b.node("Sub", x, b.per_channel("c", 1, 8, 8, 8)),
        lambda b, x: b.node("Div", x, b.per_channel("c", 8)),  # along the width
        lambda b, x: b.node("Mul", x, b.constant("c", 2.0)),
        lambda b, x: b.node("InstanceNormalization", x, b.per_channel("s", 8), b.per_channel("t", 8)),
        lambda b, x: b.node("Mul", x, b.node("Sigmoid", x)),
        lambda b, x: b.node("Mul", x, b.node("GlobalMaxPool", x)),
        lambda b, x: b.node("Mul", x, b.node("ReduceMean", x, axes=[2, -1])),
        lambda b, x: b.node("Add", x, b.node("ReduceMax", x, axes=[0])),
        lambda b, x: b.node("Mul", x, b.conv("image", 3, 1, 3, "map")),
        lambda b, x: b.node("Clip", x, b.constant("low", -1.0), b.constant("high", 0.5)),
        lambda b, x: b.node("AveragePool", x, kernel_shape=[3, 3]),
        lambda b, x: b.node("Dropout", x),
        lambda b, x: b.node("Cast", b.node("Cast", x, to=TensorProto.DOUBLE), to=TensorProto.FLOAT),
        lambda b, x: b.node("Pad", x, b.constant("p", [0, 0, 1, 2, 0, 0, 0, 1], np.int64), mode="reflect"),
        lambda b, x: b.node("Resize", x, "", b.constant("scales", [1, 1, 2, 2]), mode="nearest"),
        lambda b, x: b.node(
            "Slice",
            x,
            *(b.constant(f"c{v}", [v, v], np.int64) for v in (1, 7)),
            b.constant("a", [2, -1], int),
        ),
        lambda b, x: b.node("Max", x, b.conv("image", 3, 8, 1, "other"), b.constant("c", 0.1)),
    ],
)
def test_what_happens_channel_by_channel(between: Callable[[Net, str], str]) -> None:
    """Channels go on both sides, and their constants with them."""
    b = Net()
    b.picked(between(b, b.stem()), [0, 5])
    model = b.finished()
    dropped = pruned(model)
    assert dropped.pop("other", (2, 8)) == (2, 8)
    assert dropped == {"stem": (2, 8)}
    assert "Gather" not in operators(model)


@pytest.mark.parametrize(
    "between",
    [
        lambda b, x: b.node("Transpose", x, perm=[0, 1, 3, 2]),
        lambda b, x: b.node("DepthToSpace", b.conv(x, 8, 32, 1, "wide"), blocksize=2),
        lambda b, x: b.node("Mul", x, b.node("ReduceMean", x, axes=[1])),
        lambda b, x: b.node(
            "Slice", x, *(b.constant(f"c{v}", [v], np.int64) for v in (0, 6)), b.constant("a", [1], int)
        ),
        lambda b, x: b.node("Pad", x, b.constant("p", [0, 1, 0, 0, 0, 0, 0, 0], np.int64), mode="edge"),
        lambda b, x: b.node(
            "Squeeze", b.node("Add", b.per_channel("c", 1, 1, 8, 1, 1), x), b.constant("a", [0], np.int64)
        ),
        lambda b, x: b.node(
            "Mul", x, b.node("Cast", b.node("ReduceMin", b.node("Shape", x), keepdims=0), to=1)
        ),
        lambda b, x: b.node(
            "Unsqueeze", b.node("ReduceMax", x, axes=[0], keepdims=0), b.constant("a", [0], np.int64)
        ),
        lambda b, x: b.node("ConvTranspose", x, b.weight("w", 8, 1, 1, 1), group=8),
    ],
)
def test_what_is_not_understood_needs_all(between: Callable[[Net, str], str]) -> None:
    """Nothing goes."""
    b = Net()
    b.picked(between(b, b.stem()), [0, 5])
    assert pruned(b.finished()) == {}


def test_channels_that_padding_adds_go() -> None:
    """The shortcuts of some residual networks: every second pixel, and zeros for the new channels."""
    b = Net()
    x = b.node("Relu", b.stem())
    steps = [b.constant(f"c{i}", [v, v], np.int64) for i, v in enumerate((0, 8, 2))]
    short = b.node("Slice", x, steps[0], steps[1], b.constant("axes", [2, 3], np.int64), steps[2])
    short = b.node("Pad", short, b.constant("pads", [0, 4, 0, 0, 0, 4, 0, 0], np.int64))
    y = b.conv(x, 8, 16, 3, "branch", strides=[2, 2])
    b.picked(b.node("Add", y, short), [0, 3, *range(4, 12), 15])
    model = b.finished()
    assert pruned(model) == {"branch": (11, 16)}
    pads = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "pads")
    assert pads.tolist() == [0, 2, 0, 0, 0, 1, 0, 0]


def test_pads_that_are_an_attribute() -> None:
    """As before opset 11."""
    b = Net()
    b.picked(b.node("Pad", b.stem(), pads=[0, 1, 0, 0, 0, 1, 0, 0]), [0, 2, 3])
    assert pruned(b.finished(opset=10)) == {"stem": (2, 8)}


def test_constants_that_several_nodes_read_are_copied() -> None:
    """Two convolutions and a sum share weights; one of them loses filters."""
    b = Net()
    weight, bias = b.weight("weight", 8, 3, 3, 3), b.bias("bias", 8)
    first, second = (
        b.node("Conv", "image", weight, bias, out=out, pads=[1] * 4) for out in ("first", "second")
    )
    shift = b.per_channel("shift", 8, 1, 1)
    first, second = b.node("Add", first, shift), b.node("Mul", second, shift)
    y = b.node("Add", b.picked(first, [1, 4], "left"), b.conv(second, 8, 5, 3, "right"))
    b.node("Add", y, b.node("ReduceMean", bias, keepdims=0), out="y")
    model = b.finished()
    assert pruned(model) == {"first": (2, 8)}
    assert shape_of(model, "weight") == (8, 3, 3, 3)
    assert shape_of(model, "weight.kept1") == (2, 3, 3, 3)


def test_one_reader_of_all_channels_is_enough() -> None:
    """Two readers that leave out others; then one more."""
    b = Net()
    x = b.node("Relu", b.stem())
    b.picked(x, [0, 1, 2], "y")
    b.picked(x, [2, 5], "z")
    assert pruned(b.finished("y", "z")) == {"stem": (4, 8)}
    b.conv(x, 8, 5, 3, "all")
    assert pruned(b.finished("y", "z", "all")) == {}


def test_outputs_of_the_network_keep_all_channels() -> None:
    """Those of the layer itself, and of what is picked; the gather's name is kept."""
    b = Net()
    b.picked(b.stem(), [0, 1])
    assert pruned(b.finished("y", "stem")) == {}
    model = b.finished("y", "y.gather")
    assert pruned(model) == {"stem": (2, 8)}
    assert "Gather" in operators(model)


def test_subgraphs_read_all_channels() -> None:
    """What an If reads stays as it is."""
    model = networks.with_if()
    b = Net()
    x = b.picked("early", [0, 1], "seen", n_o=8)
    model.graph.node.extend(b.nodes)
    model.graph.initializer.extend(b.initializers)
    model.graph.output.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, None))
    assert pruned(model) == {}


def test_a_gather_that_a_subgraph_reads_keeps_its_name() -> None:
    """It is the identity then."""
    b = Net()
    b.picked(b.stem(), [0, 1])
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["y.gather"], ["inner"])], "branch", [], [value])
    bright = b.node("Greater", b.node("ReduceMean", "image", keepdims=0), b.constant("zero", 0.0))
    b.node("If", bright, out="z", then_branch=branch, else_branch=branch)
    model = b.finished("y", "z")
    assert pruned(model) == {"stem": (2, 8)}
    assert operators(model).count("Gather") == 1


def test_shapes_that_are_no_longer_true_go() -> None:
    """The others stay."""
    b = Net()
    x = b.node("Relu", b.stem(), out="relu")
    b.picked(b.conv(x, 8, 6, 3, "middle"), [0, 2])
    model = b.finished()
    for name, n in (("stem", 8), ("relu", 8), ("middle", 6), ("y.gather", 2)):
        model.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n, None, None])
        )
    assert pruned(model) == {"middle": (2, 6)}
    assert [value.name for value in model.graph.value_info] == ["stem", "relu"]


def test_transposed_convolutions() -> None:
    """Their weights lie the other way round."""
    b = Net()
    b.node("ConvTranspose", b.stem(), b.weight("up.weight", 8, 6, 2, 2), out="up", strides=[2, 2])
    b.picked("up", [0, 5], "z")
    b.node("ConvTranspose", "z", b.weight("y.weight", 5, 2, 2, 2), out="y")
    model = b.finished()
    weight = next(t for t in model.graph.initializer if t.name == "up.weight")
    array = numpy_helper.to_array(weight).copy()
    array[3] = 0
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    assert pruned(model) == {"stem": (7, 8), "up": (2, 6)}


@pytest.mark.parametrize("form", [f for f in FORMS if f != "fused" or kernels.available()])
def test_decoupled_layers_with_channels_of_rank_0(form: Any) -> None:
    """Filters of the layer before go; those of a decoupled layer too, and then what only they read."""
    b = Net()
    x = b.node("Relu", b.stem())
    x = b.node("Relu", b.fused(x, 8, 6, [6, 1, 1, 4, 6, 6], "middle", form))
    b.fused(x, 6, 4, [5, 0, 0, 3], "y", form)
    model = b.finished()
    dropped = pruned(model)
    assert dropped["stem"] == (3, 8)
    assert dropped["middle"] == (3, 6)
    for node in model.graph.node:
        if is_fused(node):
            values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            assert values["in_channels"] == 3
            assert values["channels"] == ([2, 0, 0, 1, 2, 2] if "middle" in node.name else [2, 0, 0, 1])


@built
def test_what_a_fused_operator_has_taken_over() -> None:
    """The residual and the slopes lose channels together with it."""
    b = Net()
    x = b.node("PRelu", b.stem(), b.per_channel("stem.slope", 8, 1, 1))
    y = b.fused(x, 8, 8, [0, 1, 2, 0, 1, 2], "layer")
    x = b.node("PRelu", b.node("Add", y, x), b.per_channel("slope", 8, 1, 1), out="taken")
    b.picked(b.node("Relu", x, out="relu"), [1, 2, 6])
    model = b.finished()
    absorb(model.graph, seen_shapes(model, networks.images_for(model)))
    assert operators(model) == ["Conv", "PRelu", "DecoupledConv", "Gather", "Conv"]
    assert pruned(model) == {"stem": (4, 8), "relu": (4, 8)}


@built
def test_a_fused_operator_keeps_one_row_at_least() -> None:
    """Even if it adds nothing: what it reads is there for others."""
    b = Net()
    x = b.node("Relu", b.stem())
    y = b.fused(x, 8, 4, [3, 3], "y")
    tensor = next(t for t in b.initializers if t.name == "y/fused.pointwise")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros((4, 2, 1, 1), np.float32), tensor.name))
    b.picked(x, [5, 6], "z")
    assert pruned(b.finished(y, "z")) == {"stem": (2, 8)}


@built
def test_fused_operators_with_groups_need_all() -> None:
    """Groups must stay of one size."""
    b = Net()
    x = b.fused(b.stem(), 8, 8, [0, 1, 4, 5], "grouped", groups=2)
    b.picked(x, [1, 2])
    assert pruned(b.finished()) == {}


def random_model(seed: int) -> onnx.ModelProto:
    """Layers of all kinds after each other and side by side, which read some channels of each other."""
    b = Net(seed)
    rng = np.random.default_rng([7, seed])
    tensors = [(b.stem(), 8)]  # and how many channels they have

    def some(n: int) -> list[int]:
        chosen = rng.choice(n, rng.integers(1, n + 1), replace=bool(rng.integers(2)))
        return (np.sort(chosen) if rng.integers(2) else chosen).tolist()

    def add(kind: int, name: str) -> tuple[str, int]:
        x, n = tensors[rng.integers(max(len(tensors) - 3, 0), len(tensors))]
        same = [t for t, m in tensors if m == n]
        if kind == 0:
            return b.picked(x, some(n), name, n_o=8), 8
        if kind == 1:
            n_o = int(rng.choice([4, 8]))
            b.conv(x, n, n_o, int(rng.choice([1, 3])), name)
            weight = b.initializers[-2]
            array = numpy_helper.to_array(weight).copy()
            array[:, some(n)] *= rng.integers(2)
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
            return name, n_o
        if kind == 2:
            return b.node("Relu", b.node(str(rng.choice(["Add", "Mul", "Sub"])), x, str(rng.choice(same)))), n
        if kind == 3 and n < 20:
            return b.node("Concat", x, tensors[0][0], axis=1), n + 8
        if kind == 4:
            return b.conv(x, n, n, 3, name, group=n), n
        if kind == 5:
            return b.node("PRelu", b.batch_norm(x, n, name), b.per_channel(f"{name}.slope", n, 1, 1)), n
        if kind == 6:
            gate = b.conv(b.node("GlobalAveragePool", x), n, n, 1, name)
            return b.node("Mul", x, b.node("Sigmoid", gate)), n
        if kind == 7:
            pads = b.constant(f"{name}.pads", [0, 1, 0, 0, 0, 2, 0, 0], np.int64)
            return b.node("Pad", x, pads), n + 3
        if kind == 8:
            form = "fused" if kernels.available() else "parallel"
            return b.fused(x, n, 8, some(n), name, form), 8
        return b.fused(x, n, 8, some(n), name, "parallel"), 8

    for index, kind in enumerate(rng.integers(10, size=rng.integers(5, 14))):
        tensors += [add(int(kind), f"layer{index}")]
    outputs = []
    for index, (x, n) in enumerate(tensors[-2:]):
        x = b.node("BatchNormalization", b.picked(x, some(n), f"last{index}", n_o=6), *norm(b, index))
        x = b.node("Flatten", b.node("GlobalAveragePool", b.node("Relu", x)))
        outputs.append(b.node("Gemm", x, b.weight(f"fc{index}", 6, 10), out=f"out{index}"))
    return b.finished(*outputs)


def norm(b: Net, index: int) -> list[str]:
    return [b.constant(f"norm{index}.{part}", b.rng.uniform(0.5, 1, 6)) for part in range(4)]


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed: int) -> None:
    """Chains and branches of whatever there is."""
    pruned(random_model(seed))


def test_most_random_networks_lose_filters() -> None:
    """Or else the test above would say little."""
    dropped = []
    for seed in range(40):
        model = random_model(seed)
        drop_unread_channels(model, {})
        dropped.append(lost(random_model(seed), model))
    assert sum(map(bool, dropped)) >= 30
    assert sum(before - kept for each in dropped for kept, before in each.values()) >= 500


def test_small_networks_lose_nothing(model: onnx.ModelProto) -> None:
    """Every channel is read there, but where a map has no use."""
    before = model.SerializeToString()
    assert pruned(model) == {}
    assert model.SerializeToString() == before


@pytest.mark.parametrize("form", [f for f in FORMS if f != "fused" or kernels.available()])
def test_networks_are_pruned_when_they_are_written(form: Any) -> None:
    """The last step before fallback functions are made, which then fit."""
    model, images = networks.classifier(), networks.images_for(networks.classifier())
    network = OnnxNetwork(read_model(model), images)
    rng = np.random.default_rng(0)
    chosen = {}
    for layer in network.layers[1:3]:
        g = layer.geometry
        assert g is not None
        chosen[layer.name] = separable(g, np.arange(0, g.n_i, 2).repeat(2)[None], rng)
    written = network.build(chosen, dict.fromkeys(chosen, form))
    left = filters(written)
    outputs = [network.places[la.name].output for la in network.layers]
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    assert left[outputs[0]] == 6
    assert left.get(outputs[1], left.get(relus[1])) == 8
    kernels_of = {name: (f.dense().astype(np.float32), f.bias) for name, f in chosen.items()}
    expected = network.run(images, kernels_of)
    for proto in (written, lower(written)):
        (found,) = network.run_built(proto, images)
        np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())


def pick(weight: np.ndarray, bias: np.ndarray, g: ConvGeometry, channels: np.ndarray) -> Factorization:
    """A convolution of some channels only."""
    part = ConvGeometry(g.n_o, len(channels), g.kh, g.kw, g.strides, g.pads, g.dilations)
    return Factorization(g, (ConvStage(part, weight[:, channels], channels),), bias)


@pytest.mark.shared
def test_resnet20(shared: Path) -> None:
    """A third of the channels is left out everywhere, so that all stages lose them, shortcuts and all.

    These pad the channels of one stage to be the middle ones of the next.
    """
    model = onnx.load(shared / "models" / "resnet20.onnx")
    left_out = {16: np.arange(16) % 3 == 0}
    for n in (16, 32):
        side = np.arange(n // 2) % 3 == 0
        left_out[2 * n] = np.concatenate([side, left_out[n], side])
    head = next(t for t in model.graph.initializer if t.name == "linear.weight")
    head.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(head) * ~left_out[64], head.name))
    x = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    network = OnnxNetwork(read_model(model), x)
    chosen = {}
    for layer in network.layers:
        g = layer.geometry
        if g is not None and g.n_i > 3:
            chosen[layer.name] = pick(layer.weight, layer.bias, g, np.flatnonzero(~left_out[g.n_i]))
    zeroed = {name: (f.dense().astype(np.float32), f.bias) for name, f in chosen.items()}
    expected = network.run(x, zeroed)
    written = network.build(chosen)
    dropped = lost(network.model.proto, written)
    (found,) = network.run_built(written, x)
    np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-6 * np.abs(expected[0]).max())
    assert len(dropped) == 19
    assert set(dropped.values()) == {(np.count_nonzero(~gone), n) for n, gone in left_out.items()}
    assert "Gather" not in operators(written)
    once = written.SerializeToString(deterministic=True)
    drop_unread_channels(written, {})
    assert written.SerializeToString(deterministic=True) == once
