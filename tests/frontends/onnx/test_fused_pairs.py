"""Separable pairs become fused operators, and the network computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from netdecouple import kernels
from netdecouple.frontends.onnx.fused import fuse_separable, is_fused
from netdecouple.runtimes.onnxruntime import open_session, run
from tests.networks import Builder, images_for

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")


def fused_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if is_fused(node)]


def check_same(model: onnx.ModelProto, fused: onnx.ModelProto) -> None:
    images = images_for(model)
    expected, found = (run(open_session(m), None, {"image": images}) for m in (model, fused))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)


def test_pairs_of_every_kind() -> None:
    """Plain, with a multiplier, behind a Gather that repeats channels, strided; with what follows them."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 8, 3, "stem"))
    x = b.node("Relu", b.conv(b.conv(x, 8, 8, 3, "plain.dw", group=8), 8, 8, 1, "plain.pw"))
    y = b.conv(b.conv(x, 8, 16, 3, "twice.dw", group=8), 16, 8, 1, "twice.pw")
    x = b.node("Relu", b.node("Add", y, x))
    channels = b.constant("channels", [0, 0, 3, 5, 5, 7], np.int64)
    x = b.node("Gather", x, channels, axis=1)
    x = b.conv(b.conv(x, 6, 6, 3, "few.dw", group=6, strides=[2, 2]), 6, 12, 1, "few.pw")
    b.classifier(b.node("Clip", x, b.constant("low", 0.0), b.constant("high", 6.0)), 12)
    model = b.model()
    fused = fuse_separable(model)
    assert [node.name.split("/")[0] for node in fused_nodes(fused)] == ["plain.pw", "twice.pw", "few.pw"]
    left = [node.op_type for node in fused.graph.node if not is_fused(node)]
    assert left == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    assert [e.key for e in fused.metadata_props] == [e.key for e in model.metadata_props]
    check_same(model, fused)


def test_what_is_no_pair_stays() -> None:
    """A depthwise result that something else reads too, a grouped pointwise one, a 3×3 behind it."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 8, 3, "stem"))
    shared = b.conv(x, 8, 8, 3, "shared", group=8)
    x = b.node("Add", b.conv(shared, 8, 8, 1, "reader"), shared)
    x = b.conv(b.conv(x, 8, 8, 3, "grouped.dw", group=8), 8, 8, 1, "grouped.pw", group=2)
    x = b.conv(b.conv(x, 8, 8, 3, "wide.dw", group=8), 8, 8, 3, "wide")
    b.classifier(x, 8)
    model = b.model()
    fused = fuse_separable(model)
    assert not fused_nodes(fused)
    assert [n.op_type for n in fused.graph.node] == [n.op_type for n in model.graph.node]
    check_same(model, fused)
