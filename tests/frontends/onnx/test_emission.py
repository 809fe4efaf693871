"""Factorizations as ONNX nodes, held against their own NumPy arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from netdecouple import kernels
from netdecouple.convolution import ConvGeometry, ConvStage, Factorization
from netdecouple.errors import ModelError
from netdecouple.families.chain import method, methods
from netdecouple.frontends.onnx.emission import FORMS, Form, emit
from netdecouple.kernels import DOMAIN
from netdecouple.runtimes.onnxruntime import open_session, run
from tests.families.base import data_free_problem
from tests.families.test_chain import steps_of
from tests.strategies import geometries, images

METHODS = (*methods(["all"]), "cd+nd-pd")
WRITTEN = [form for form in FORMS if form != "fused" or kernels.available()]


def computed(factorization: Factorization, form: Form, x: np.ndarray, name: str = "layer") -> np.ndarray:
    """Run the emitted nodes in ONNX Runtime."""
    nodes, initializers = emit(factorization, name, "x", "y", form)
    graph = helper.make_graph(
        nodes,
        "stages",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", factorization.geometry.n_i, "H", "W"))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", factorization.geometry.n_o, "A", "B"))],
        initializers,
    )
    opsets = [helper.make_opsetid("", 11)]
    if any(node.domain == DOMAIN for node in nodes):
        opsets.append(helper.make_opsetid(DOMAIN, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return run(open_session(model), None, {"x": x})[0]


def depthwise_pointwise(g: ConvGeometry, ranks: list[int], seed: int, bias: bool = True) -> Factorization:
    """Random stages with so many terms per channel."""
    rng = np.random.default_rng(seed)
    terms = sum(ranks)
    depthwise = ConvGeometry(terms, terms, g.kh, g.kw, g.strides, g.pads, g.dilations, terms)
    pointwise = ConvGeometry(g.n_o, terms, 1, 1, groups=g.groups)
    stages = (
        ConvStage(
            depthwise,
            rng.standard_normal(depthwise.weight_shape, np.float32),
            np.repeat(np.arange(g.n_i), ranks),
        ),
        ConvStage(pointwise, rng.standard_normal(pointwise.weight_shape, np.float32)),
    )
    return Factorization(g, stages, rng.standard_normal(g.n_o, np.float32) if bias else None)


@st.composite
def factorizations(draw: st.DrawFn) -> Factorization:
    """DP stages of any geometry; ranks differ per channel, 0 included, but sum up alike in every group."""
    groups = draw(st.integers(1, 3))
    n = draw(st.integers(1, 4))
    small = st.integers(1, 2)
    g = ConvGeometry(
        groups * draw(st.integers(1, 3)),
        groups * n,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        (draw(small), draw(small)),
        tuple(draw(st.integers(0, 2)) for _ in range(4)),  # type: ignore[arg-type]
        (draw(small), draw(small)),
        groups,
    )
    own = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any))
    ranks = [rank for _ in range(groups) for rank in draw(st.permutations(own))]
    return depthwise_pointwise(g, ranks, draw(st.integers(0, 99)), draw(st.booleans()))


@given(factorizations(), st.sampled_from(WRITTEN), st.integers(7, 9), st.integers(7, 9))
@settings(max_examples=120, deadline=None)
def test_emitted_nodes_compute_the_factorization(factorization: Factorization, form: Form, h: int, w: int):
    """In every form, for any geometry, and ranks that differ per channel or are 0."""
    x = np.random.default_rng(0).standard_normal((2, factorization.geometry.n_i, h, w)).astype(np.float32)
    expected = factorization(x)
    np.testing.assert_allclose(
        computed(factorization, form, x), expected, atol=1e-5 * max(1.0, np.abs(expected).max())
    )


GEOMETRY = ConvGeometry(4, 3, 3, 3, pads=(1, 1, 1, 1))


def operators(form: Form, ranks: list[int], g: ConvGeometry = GEOMETRY) -> list[str]:
    return [n.op_type for n in emit(depthwise_pointwise(g, ranks, 0), "layer", "x", "y", form)[0]]


def test_equal_ranks_need_no_gather():
    """Two terms for all channels: two depthwise convolutions, joined, and one pointwise."""
    assert operators("parallel", [2, 2, 2]) == ["Conv", "Conv", "Concat", "Conv"]


def test_rank_one_needs_no_concat():
    """One depthwise convolution and one pointwise."""
    assert operators("parallel", [1, 1, 1]) == ["Conv", "Conv"]


def test_uneven_ranks_gather_the_channels_that_need_more():
    """The second term exists for some channels only."""
    assert operators("parallel", [2, 1, 2]) == ["Conv", "Gather", "Conv", "Concat", "Conv"]
    assert operators("parallel", [0, 1, 2]) == ["Gather", "Conv", "Gather", "Conv", "Concat", "Conv"]


def test_the_gather_form_is_literal():
    """One Gather that repeats channels, one depthwise convolution, one pointwise."""
    assert operators("gather", [2, 0, 3]) == ["Gather", "Conv", "Conv"]


def test_the_fused_form_is_one_node():
    """Whatever the ranks and the groups."""
    assert operators("fused", [2, 0, 3]) == ["DecoupledConv"]
    assert operators("fused", [2, 1, 1, 2], ConvGeometry(4, 4, 3, 3, groups=2)) == ["DecoupledConv"]


def test_groups_are_written_literally():
    """A grouped pointwise stage reads the channels of its group in a row, so they are not interleaved."""
    grouped = ConvGeometry(4, 4, 3, 3, groups=2)
    assert operators("parallel", [2, 1, 1, 2], grouped) == ["Gather", "Conv", "Conv"]


@pytest.mark.parametrize("form", WRITTEN)
def test_everything_is_named_after_the_layer(form: Form):
    """So that two layers never collide, and a profile can be read."""
    nodes, initializers = emit(depthwise_pointwise(GEOMETRY, [2, 0, 1], 0), "block/conv", "x", "y", form)
    names = [n.name for n in nodes] + [t.name for t in initializers]
    names += [t for n in nodes for t in n.output if t != "y"]
    assert all(name.startswith("block/conv/") for name in names)
    assert len({n.name for n in nodes}) == len(nodes)
    assert nodes[-1].output[0] == "y"


@pytest.mark.parametrize("form", WRITTEN)
def test_other_chains_are_written_too(form: Form):
    """A pointwise, a spatial and a grouped stage in a row, with no depthwise among them."""
    rng = np.random.default_rng(0)
    shapes = [
        ConvGeometry(6, 4, 1, 1),
        ConvGeometry(6, 6, 3, 1, pads=(1, 0, 1, 0), strides=(2, 1)),
        ConvGeometry(4, 6, 1, 3, pads=(0, 1, 0, 1), groups=2),
    ]
    stages = tuple(ConvStage(g, rng.standard_normal(g.weight_shape, np.float32)) for g in shapes)
    whole = ConvGeometry(4, 4, 3, 3, (2, 1), (1, 1, 1, 1))
    factorization = Factorization(whole, stages, rng.standard_normal(4, np.float32))
    x = rng.standard_normal((2, 4, 7, 6), np.float32)
    np.testing.assert_allclose(computed(factorization, form, x), factorization(x), atol=1e-4)


def fitted(name: str, g: ConvGeometry, seed: int, share: float) -> Factorization:
    """What a method makes of a random kernel, with a bias."""
    return method(name, rounds=0).fit(data_free_problem(g, seed), steps_of(name, g, share))[0]


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("name", METHODS)
def test_every_combination_of_families_is_written(name: str, form: Form):
    """Any kernel, strides, pads, dilations and groups, at any size, with a bias."""

    @given(geometries(max_kernel=4), st.integers(0, 99), st.floats(0.2, 1))
    @settings(max_examples=8, deadline=None)
    def check(g: ConvGeometry, seed: int, share: float) -> None:
        factorization = fitted(name, g, seed, share).astype(np.float32)
        x = images(g, seed).astype(np.float32)
        expected = factorization(x)
        np.testing.assert_allclose(
            computed(factorization, form, x), expected, atol=1e-5 * max(1.0, np.abs(expected).max())
        )

    check()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nd-dp", ["DecoupledConv"]),
        ("sd+nd-dp", ["DecoupledConv", "DecoupledConv"]),
        ("cp+nd-dp", ["DecoupledConv"]),
        ("cd+nd-dp", ["DecoupledConv", "Conv"]),
        ("cd+sd+cp+nd-dp", ["DecoupledConv", "DecoupledConv", "Conv"]),
        ("nd-pd", ["Conv", "Conv"]),
        ("sd", ["Conv", "Conv"]),
        ("cd", ["Conv", "Conv"]),
        ("cp", ["Gather", "Conv"]),
    ],
)
def test_every_depthwise_stage_is_fused_with_the_pointwise_one_behind_it(name: str, expected: list[str]):
    """Wherever in a chain the two stand; nothing else is fused."""
    nodes, _ = emit(fitted(name, ConvGeometry(12, 10, 3, 3), 0, 0.4), "layer", "x", "y", "fused")
    assert [node.op_type for node in nodes] == expected
    assert len({node.name for node in nodes}) == len(nodes)


def products(rank: int, bias: bool = True) -> Factorization:
    """Two stages of a fully connected layer, 12 → 9."""
    rng = np.random.default_rng(0)
    geometries = (ConvGeometry(rank, 12, 1, 1), ConvGeometry(9, rank, 1, 1))
    stages = tuple(ConvStage(g, rng.standard_normal(g.weight_shape, np.float32)) for g in geometries)
    return Factorization(
        ConvGeometry(9, 12, 1, 1), stages, rng.standard_normal(9, np.float32) if bias else None
    )


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_fully_connected_layers_stay_matrix_products(operator: str, bias: bool, opset: int):
    """One per stage, on rows as they come, in every form; old operator sets have them too."""
    factorization = products(4, bias)
    shape = (5, 12) if operator == "Gemm" else (5, 2, 12)
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    operators = ["MatMul", operator, "Add"] if operator == "MatMul" and bias else ["MatMul", operator]
    for form in FORMS:
        nodes, initializers = emit(factorization, "fc", "x", "y", form, operator)
        assert [node.op_type for node in nodes] == operators
        assert all(t.name.startswith("fc/") for t in (*nodes, *initializers))
        graph = helper.make_graph(
            nodes,
            "products",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (*shape[:-1], 9))],
            initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        expected = factorization(x.reshape(-1, 12, 1, 1)).reshape(*shape[:-1], 9)
        np.testing.assert_allclose(run(open_session(model), None, {"x": x})[0], expected, atol=1e-4)


def test_weights_are_written_in_the_layers_type_or_not_at_all():
    """What float16 cannot hold is refused with the layer's name."""
    g = ConvGeometry(4, 3, 3, 3)
    factorization = Factorization(g, (ConvStage(g, np.full(g.weight_shape, 7e4, np.float32)),))
    single = emit(factorization, "layer", "x", "y")[1]
    assert {t.data_type for t in single} == {TensorProto.FLOAT}
    with pytest.raises(ModelError, match=r"layer 'layer': its conv0\.weight is too large for float16"):
        emit(factorization, "layer", "x", "y", dtype=np.dtype(np.float16))
