"""Which node of an optimised network belongs to which layer."""

from __future__ import annotations

from netdecouple.runtimes.layers import (
    REORDER,
    REST,
    TOTAL,
    Owners,
    by_layer,
    node_name,
    original_layers,
    with_names,
)
from tests import networks
from tests.networks import Builder


def test_original_layers_leave_stages_out():
    """Whichever of the networks comes first; names with slashes of their own are no stages."""
    names = [
        "a/depthwise0.0",
        "a/pointwise1",
        "b",
        "a",
        "b",
        "/block/block.1/conv",
        "/block/block.1/conv/pointwise1",
    ]
    assert original_layers(names) == ("b", "a", "/block/block.1/conv")


def owners() -> Owners:
    """One decoupled layer, one with BatchNorm and ReLU, one that is added to something."""
    b = Builder()
    x = b.node("Gather", "image", b.constant("i", [0, 1]), out="g", name="one/depthwise0.0.gather")
    x = b.node("Conv", x, b.weight("w", 2, 1, 3, 3), out="one/depthwise0.0_output", name="one/depthwise0.0")
    x = b.node("Conv", x, b.weight("v", 8, 2, 1, 1), out="t", name="one/pointwise1")
    x = b.node("Relu", x, out="t.relu", name="relu")
    x = b.node("Relu", b.batch_norm(b.conv(x, 8, 8, 3, "two"), 8, "two.bn"), out="two.relu")
    x = b.node("Add", b.conv(x, 8, 8, 3, "three"), x, out="sum")
    x = b.node("Relu", x, out="sum.relu")
    b.classifier(x, 8)
    return Owners.of(b.model().graph, ["one", "two", "three", "logits"])


def test_nodes_that_keep_their_names():
    """Also those that the optimiser hangs below a node of the layer's name."""
    found = owners()
    for name, layer in (
        ("one/depthwise0.0", "one"),
        ("one/depthwise0.0.gather", "one"),
        ("one/pointwise1", "one"),
        ("two", "two"),
        ("logits", "logits"),
        ("logits/MatMulAddFusion", "logits"),
    ):
        assert found.find(name, "Conv") == layer


def test_nodes_of_the_blocked_layout():
    """They have the names of what they write: the layer's tensor or that of what was fused into it."""
    found = owners()
    for name, layer in (
        ("one/depthwise0.0_output_nchwc", "one"),
        ("t_nchwc", "one"),
        ("t.relu_nchwc", "one"),
        ("two.bn_nchwc", "two"),
        ("two.relu_nchwc_token_12", "two"),
        ("three_nchwc", "three"),
    ):
        assert found.find(name, "Conv") == layer


def test_nodes_of_no_layer():
    """An activation that was not fused, an addition, a change of layout, anything unknown."""
    found = owners()
    for name, operator in (("relu", "Relu"), ("sum", "Add"), ("sum.relu_nchwc", "Relu"), ("what", "What")):
        assert found.find(name, operator) == REST
    assert found.find("ReorderInput_token_3", "ReorderInput") == REORDER


def test_by_layer_sums_everything():
    """No time gets lost."""
    times = {
        ("one/depthwise0.0", "Conv"): 1.0,
        ("t_nchwc", "Conv"): 2.0,
        ("three", "Conv"): 4.0,
        ("ReorderOutput", "ReorderOutput"): 8.0,
        ("sum", "Add"): 16.0,
        ("flatten", "Flatten"): 32.0,
    }
    assert by_layer(times, owners()) == {"one": 3, "three": 4, REORDER: 8, REST: 48, TOTAL: 63}


def test_with_names_leaves_the_model_alone():
    """The copy's nodes are called by what they write."""
    model = networks.without_names()
    named = with_names(model)
    assert not any(node.name for node in model.graph.node)
    assert [node.name for node in named.graph.node] == [node_name(node) for node in model.graph.node]
    assert named.graph.node[0].name == "Conv:conv1"


def test_nodes_that_stand_in_the_place_of_a_fused_operator():
    """As ONNX Runtime names them after the function that they come from."""
    b = Builder()
    for name in ("one", "two"):
        b.node("DecoupledConv", "image", out=f"{name}.relu", name=f"{name}/fused", domain="netdecouple")
        b.nodes[-1].overload = name
    found = Owners.of(b.model().graph, ["one", "two/fused"])
    for name, layer in (
        ("_inlfunc_DecoupledConv_one/depthwise0.0", "one"),
        ("_inlfunc_DecoupledConv_token_12_one/add_input_nchwc", "one"),
        ("one.relu_nchwc", "one"),
        ("_inlfunc_DecoupledConv_token_12_two/pointwise1", "two/fused"),
        ("_inlfunc_DecoupledConv_three/pointwise1", REST),
    ):
        assert found.find(name, "Conv") == layer
