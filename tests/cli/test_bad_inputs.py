"""Whatever is wrong: one line that names the cause and the remedy, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from netdecouple.errors import ModelError, first_line
from tests import networks
from tests.kernels.test_onnxruntime import chain
from tests.networks import Builder

LOWER = ["lower", "net.onnx", "-o", "out.onnx"]
RUN = ["run", "net.onnx", "-o", "out.onnx", "--macs", "2x", "--calib", "data.npz:images"]


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.is_fifo()
    }


@pytest.fixture
def refused(netdecouple, folder: Path) -> Callable[..., None]:
    """Call a command that must be refused, with a message that holds all of ``parts``."""

    def check(arguments: list[str], *parts: str) -> None:
        before = everything(folder)
        ended = netdecouple(*arguments)
        assert ended.code == 2, ended
        *progress, error = ended.err.splitlines(keepends=True)  # of a slow machine there are signs of life
        assert error.startswith("error: ")
        assert error.endswith("\n")
        assert all(re.fullmatch(r"[^:]+: \d+ of \d+.*\n", line) for line in progress), ended.err
        assert [part for part in parts if part not in ended.err] == [], ended.err
        assert everything(folder) == before

    return check


def changed(base: list[str], **options: str | None) -> list[str]:
    """The command with some options replaced, added, or (None) left away; ``model`` is its argument."""
    arguments = list(base)
    if model := options.pop("model", None):
        arguments[1] = model
    for name, value in options.items():
        flag = "-o" if name == "output" else "--" + name.replace("_", "-")
        if flag in arguments:
            at = arguments.index(flag)
            del arguments[at : at + 2]
        if value is not None:
            arguments += [flag, value]
    return arguments


# --- the model


def test_not_an_onnx_file(refused, folder: Path):
    """A text file."""
    (folder / "net.onnx").write_text("hello")
    for command in (RUN, LOWER):
        refused(command, "net.onnx", "not an ONNX file")


def test_no_such_model(refused):
    """A path that is not there, for every command."""
    for command in (
        changed(RUN, model="gone.onnx"),
        ["inspect", "gone.onnx"],
        ["lower", "gone.onnx", "-o", "out.onnx"],
        ["eval", "gone.onnx", "--data", "data.npz:images,labels"],
        ["eval", "net.onnx", "gone.onnx", "--data", "data.npz:images,labels"],
        ["bench", "net.onnx", "gone.onnx"],
    ):
        refused(command, "gone.onnx", "no such file")
    refused(["bench", "gone:small"], "gone:small: no such file; give the path of an .onnx model")


def test_names_that_no_file_can_have(refused):
    """Longer than a file system takes."""
    long = 300 * "a"
    for command in (
        ["inspect", f"{long}.onnx"],
        ["bench", f"{long}.onnx"],
        ["bench", "net.onnx", "--report", f"{long}.json"],
        ["apply", "net.onnx", f"{long}.json", "-o", "out.onnx", "--calib", "data.npz:images"],
        ["sweep", "net.onnx", "--macs", "50%", "--calib", "data.npz:images", "-o", long],
        changed(RUN, calib=long),
        changed(RUN, calib=f"{long}.npy"),
        changed(RUN, output=f"{long}.onnx"),
        changed(RUN, report=f"{long}.json"),
        changed(RUN, plan_out=f"{long}.json"),
        changed(RUN, work=long),
    ):
        refused(command, long)


def test_external_data_under_a_name_that_no_file_can_have(refused, folder: Path):
    """The model says so, whatever is beside it."""
    model = onnx.load(folder / "net.onnx")
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, 300 * "a")
    tensor.ClearField("raw_data")
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    for command in (RUN, ["inspect", "net.onnx"], ["bench", "net.onnx"], LOWER):
        refused(command, "net.onnx", tensor.name, "there is no")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_model(refused, folder: Path, share: float):
    """A file that was not copied to its end."""
    whole = (folder / "net.onnx").read_bytes()
    (folder / "net.onnx").write_bytes(whole[: int(share * len(whole))])
    for command in (RUN, ["inspect", "net.onnx"], ["bench", "net.onnx"], LOWER):
        refused(command, "net.onnx", "copy it again")


def test_missing_external_data(refused, folder: Path):
    """The file with the weights did not come along."""
    onnx.save(
        networks.classifier(), folder / "net.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    (folder / "w").unlink()
    for command in (RUN, LOWER):
        refused(command, "net.onnx", "external data")


def test_no_convolutions(refused, folder: Path):
    """A perceptron."""
    b = Builder()
    b.node("Gemm", b.node("Flatten", "image"), b.weight("w", 192, 10), out="logits")
    onnx.save(b.model(), folder / "net.onnx")
    refused(RUN, "net.onnx", "no convolutions")


def test_nothing_to_decouple(refused, folder: Path):
    """Convolutions, but none that could be changed: the reasons are given."""
    b = Builder()
    b.classifier(b.conv(b.conv("image", 3, 3, 3, "one", group=3), 3, 6, 1, "two", group=3), 6, 1)
    onnx.save(b.model(), folder / "net.onnx")
    refused(RUN, "one and 1 more: depthwise convolution", "logits: too small")


def test_nothing_to_lower(refused):
    """A network of standard operators is not written again."""
    refused(LOWER, "net.onnx", "no fused operators")


def test_a_fused_operator_that_cannot_be_lowered(refused, folder: Path):
    """Its weights are computed: the layer is named."""
    model = chain("fused", [(3, 4, 2)])
    model.graph.node[0].input[1] = "x"
    onnx.save(model, folder / "net.onnx")
    refused(LOWER, "'layer0/fused'", "'x'", "not constant")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(refused, folder: Path, value: float):
    """The layer is named."""
    model = networks.classifier()
    tensor = next(t for t in model.graph.initializer if t.name == "conv3.weight")
    array = numpy_helper.to_array(tensor).copy()
    array[3, 1, 2, 0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, folder / "net.onnx")
    refused(RUN, "NaN or Inf", "'conv3'")


def test_activations_that_are_not_finite(refused, folder: Path):
    """A division by zero between two layers, mended afterwards: the layer that saw it is named."""
    b = Builder()
    x = b.node("Div", b.conv("image", 3, 8, 3, "first"), b.constant("zero", np.zeros((1, 8, 1, 1))))
    x = b.conv(x, 8, 8, 3, "second")
    x = b.node("Where", b.node("IsNaN", x), b.constant("nothing", 0), x)
    b.classifier(b.node("Clip", x, b.constant("low", -1), b.constant("high", 1)), 8)
    onnx.save(b.model(), folder / "net.onnx")
    refused(RUN, "NaN or Inf", "'second'")


def test_outputs_that_are_not_finite(refused, folder: Path):
    """Overflow between two layers that reaches the output: the layer that saw it first is named."""
    b = Builder()
    x = b.node("Exp", b.node("Mul", b.conv("image", 3, 8, 3, "first"), b.constant("large", 1e3)))
    b.classifier(b.conv(x, 8, 8, 3, "second"), 8)
    onnx.save(b.model(), folder / "net.onnx")
    refused(RUN, "NaN or Inf", "'second'")


def test_an_input_without_a_value(refused, folder: Path):
    """It is named, by every command that runs the network; so are values for no input, or for no network."""
    onnx.save(networks.side_inputs(), folder / "net.onnx")
    for command in (RUN, ["inspect", "net.onnx"], ["eval", "net.onnx", "--data", "data.npz:images,labels"]):
        refused(command, "net.onnx", "'scales'", "has no value", "--constant")
    refused([*RUN, "--constant", "scale=1"], "no input 'scale'", "scales, gain")
    refused([*RUN, "--constant", "scales"], "--constant scales", "NAME=1.5")
    refused([*RUN, "--constant", "scales=a"], "write numbers")
    refused(["inspect", "torchvision:resnet18", "--constant", "a=1"], "--constant", "ONNX")


def test_operators_that_are_not_known(refused, folder: Path, custom_ops: Path):
    """The message names the option; a library that is missing, or none, is named."""
    (folder / "text.so").write_text("no library")
    for command in (RUN, ["inspect", "net.onnx"], ["bench", "net.onnx"]):
        refused(command, "other.maker:DecoupledConv", "--custom-ops")
        refused([*command, "--custom-ops", "gone.so"], "--custom-ops gone.so", "no such file")
        refused([*command, "--custom-ops", "text.so"], "--custom-ops text.so", "cannot be loaded")
    refused(["inspect", "torchvision:resnet18", "--custom-ops", "text.so"], "--custom-ops", "ONNX")


def test_an_open_size_without_images(refused, folder: Path):
    """Without inputs nobody knows how large a fully convolutional network's are."""
    onnx.save(networks.restorer(), folder / "net.onnx")
    refused(["inspect", "net.onnx"], "any size", "--input-size")
    refused([*changed(RUN, calib=None), "--data-free"], "any size", "--input-size")


def test_inputs_that_are_no_images(refused, netdecouple, folder: Path):
    """Only inputs tell how large they are where the model leaves it open; pictures are refused."""
    onnx.save(networks.of_rows(networks.classifier(), "L"), folder / "net.onnx")
    refused(["inspect", "net.onnx"], "?×?", "any size", "--calib")
    refused([*changed(RUN, calib=None), "--data-free"], "any size", "--calib")
    refused(changed(RUN, calib="images"), "takes no pictures", "floats (N, …)")
    np.save(folder / "rows.npy", np.random.default_rng(0).standard_normal((20, 192)).astype(np.float32))
    assert netdecouple("inspect", "net.onnx", "--calib", "rows.npy").code == 0
    refused(["inspect", "net.onnx", "--calib", "rows.npy", "--html", "rows.npy"], "rows.npy")


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("operator", ["RandomNormalLike", "Dropout", "Multinomial", "Bernoulli"])
def test_a_random_operator(refused, netdecouple, folder: Path, operator: str, is_read: bool):
    """It is named, unless nothing depends on its numbers."""
    b = Builder()
    x = b.node("Relu", b.conv("image", 3, 8, 3, "first"))
    rows = b.node("Sigmoid", b.node("Flatten", x))
    half = b.constant("half", 0.5)
    # ONNX Runtime leaves it out where a constant says that it is training
    more = (
        [half, b.node("Less", half, b.node("ReduceMax", rows, keepdims=0))] if operator == "Dropout" else []
    )
    options = {"sample_size": 99} if operator == "Multinomial" else {}
    seed = 1 if operator == "Dropout" else 1.0
    noise = b.node(operator, rows, *more, out="noise", seed=seed, **options)
    noise = b.node("ReduceSum", b.node("Cast", noise, to=TensorProto.FLOAT), keepdims=0)
    y = b.conv(x, 8, 8, 3, "second")
    b.classifier(b.node("Add", y, noise) if is_read else y, 8)
    onnx.save(b.model(), folder / "net.onnx")
    if is_read:
        refused(RUN, f"net.onnx: {operator} 'noise' is random")
    else:
        assert netdecouple("inspect", "net.onnx").code == 0


# --- the budget


@pytest.mark.parametrize("option", ["macs", "params"])
@pytest.mark.parametrize(
    "budget", ["0%", "200%", "0", "-1", "0.5x", "nan%", "inf", "abc", "2y", "", "%", "0x", "1e999x"]
)
def test_budget_nonsense(refused, option: str, budget: str):
    """The message shows how to write one."""
    refused(
        changed(RUN, **{"macs": None, option: budget}),
        repr(budget) if budget in ("abc", "2y") else "",
        "50%",
        "2x",
    )


@pytest.mark.parametrize(("option", "unit"), [("macs", "MACs"), ("params", "parameters")])
def test_budget_out_of_reach(refused, option: str, unit: str):
    """The message says what is in reach."""
    for more in ([], ["--data-free"]):
        asked = changed(RUN, **{"macs": None, option: "1000x", "families": "nd"}) + more
        refused(asked, "0.1%", "out of reach", "the least", unit)


def test_budget_out_of_reach_of_one_rank(refused):
    """The published procedure reaches less."""
    refused([*changed(RUN, macs="30x"), "--data-free", "--uniform-rank"], "T = 1", "--uniform-rank")


def test_a_limit_and_few_inputs(refused):
    """That 99% of the classes stay cannot be shown with a few inputs."""
    refused(changed(RUN, macs=None, within="99%"), "--within 99%", "give 495 or more")


def test_budget_and_drop(refused):
    """Both at once."""
    refused(
        changed(RUN, max_drop="1", labels="data.npz:images,labels"), "give one goal", "--macs", "--max-drop"
    )


def test_budget_and_method(refused):
    """A rule for every layer leaves no choice that could meet a budget, or a drop."""
    refused([*RUN, "--method", "nd-dp:T=2"], "give one goal", "--macs", "--method")
    drop = changed(RUN, macs=None, max_drop="1", labels="data.npz:images,labels")
    refused([*drop, "--method", "nd-dp:T=2"], "give one goal", "--max-drop", "--method")


@pytest.mark.parametrize(
    "method", ["nd:T=x", "nd:T=0", "nd:T=1.5", "nd", "", "nope:T=2", "sd:0x", "cd+nd:T=4"]
)
def test_method_nonsense(refused, method: str):
    """It is quoted."""
    refused(changed(RUN, macs=None, method=method), f"--method {method}".strip())


def test_a_method_that_makes_no_layer_cheaper(refused):
    """All terms there are cost more than the layers themselves."""
    refused(changed(RUN, macs=None, method="nd-dp:T=9"), "--method", "no layer becomes cheaper")


@pytest.mark.parametrize("families", ["nope", "nd,nope", "", "nd,", "nd-dp+sd", "sd+sd"])
def test_families_nonsense(refused, families: str):
    """The message shows how to write them."""
    refused(changed(RUN, families=families), f"--families {families}".strip(), "cd,sd,cp,nd")


def test_drop_without_labels(refused):
    """There is nothing to measure it on."""
    refused(changed(RUN, macs=None, max_drop="1"), "--labels (FILE.npz:IMAGES,LABELS)")


def test_drop_of_what_is_no_classifier(refused, folder: Path):
    """A network with maps for outputs has no accuracy."""
    onnx.save(networks.restorer(), folder / "net.onnx")
    refused(changed(RUN, macs=None, max_drop="1", labels="data.npz:images,labels"), "accuracy")


# --- calibration


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (np.zeros((20, 3, 9, 8), np.float32), ["(20, 3, 9, 8)", "(N, 3, 8, 8)"]),
        (np.zeros((20, 1, 8, 8), np.float32), ["(20, 1, 8, 8)", "(N, 3, 8, 8)"]),
        (np.zeros((20, 8, 8, 3), np.float32), ["(20, 8, 8, 3)", "(N, 3, 8, 8)"]),
        (np.zeros((20, 8, 8, 4), np.uint8), ["(20, 8, 8, 4)", "(N, H, W, 3)"]),
        (np.zeros((20, 3, 8, 8), np.int64), ["int64", "uint8"]),
        (np.array(["a"] * 20), ["<U1", "uint8"]),
        (np.zeros((0, 3, 8, 8), np.float32), ["(0, 3, 8, 8)", "not empty"]),
        (np.zeros((9, 3, 8, 8), np.float32), ["9 calibration images are too few", "at least 10"]),
        (np.full((20, 3, 8, 8), np.nan, np.float32), ["sample 0", "NaN"]),
    ],
)
def test_arrays_that_do_not_fit(refused, folder: Path, array: np.ndarray, parts: list[str]):
    """What was found and what is expected."""
    np.save(folder / "bad.npy", array)
    refused(changed(RUN, calib="bad.npy"), *parts)


def test_no_calibration(refused):
    """It may be left out with --data-free only."""
    refused(changed(RUN, calib=None), "--calib", "--data-free")


def test_calibration_that_is_not_there(refused):
    """A missing file, a missing key, a file of another kind."""
    refused(changed(RUN, calib="gone.npz:images"), "gone.npz", "not found")
    refused(changed(RUN, calib="data.npz:pictures"), "data.npz", "images, labels")
    refused(changed(RUN, calib="net.onnx"), "net.onnx", "not supported")


def test_an_empty_folder(refused, folder: Path):
    """Or one without images."""
    (folder / "empty").mkdir()
    refused(changed(RUN, calib="empty"), "empty", "no images")
    (folder / "empty" / "notes.txt").write_text("none")
    refused(changed(RUN, calib="empty"), "empty", "no images")


def test_a_folder_without_one_readable_image(refused, folder: Path):
    """One is named, with what is wrong."""
    for path in (folder / "images").iterdir():
        path.write_bytes(b"not a picture")
    refused(changed(RUN, calib="images"), "images", "none of 16 can be read", "00.png")


@pytest.mark.parametrize("text", ["a,b,c", "0.5,0.5", "", "nan,0,0", "0.5;0.5;0.5"])
@pytest.mark.parametrize("option", ["mean", "std"])
def test_bad_mean_and_std(refused, option: str, text: str):
    """Words, the wrong number of them, or what is no number."""
    refused(changed(RUN, calib="images", **{option: text}), option)


def test_mean_and_std_of_values_up_to_255(refused):
    """As other tools want them; what they are here is in the message."""
    refused(
        changed(RUN, calib="images", mean="123.675,116.28,103.53", std="58.395,57.12,57.375"), "0.485,0.456"
    )


def test_a_std_of_zero(refused):
    """Would divide by zero."""
    refused(changed(RUN, calib="images", std="0,1,1"), "std", "positive")


@pytest.mark.parametrize("text", ["big", "0", "-8", "8x", "8x8x8", "x"])
def test_bad_input_size(refused, text: str):
    """The message shows how to write one."""
    refused(changed(RUN, input_size=text), f"--input-size {text}", "480x640")


def test_an_unknown_preset(refused):
    """Those there are are listed."""
    refused(changed(RUN, calib="images", preset="imagenett"), "'imagenett'", "imagenet, cifar10, none")


@pytest.mark.parametrize("data", ["data.npz", "data.npz:images", "data.npz:images,nothing", "gone.npz:a,b"])
def test_missing_labels(refused, data: str):
    """For eval and for --max-drop alike."""
    refused(["eval", "net.onnx", "--data", data], data.split(":")[0])
    refused(changed(RUN, macs=None, max_drop="1", labels=data), data.split(":")[0])


def test_labels_that_do_not_fit(refused, folder: Path):
    """Fewer labels than images, or labels that are no integers."""
    images = np.zeros((20, 3, 8, 8), np.float32)
    np.savez(folder / "bad.npz", images=images, few=np.zeros(19, int), floats=np.zeros(20))
    for name in ("few", "floats"):
        refused(
            ["eval", "net.onnx", "--data", f"bad.npz:images,{name}"], "labels are", "expected 20 integers"
        )


def test_an_exclude_that_matches_nothing(refused):
    """A misspelt layer is not passed over in silence."""
    refused(changed(RUN, exclude="conv9*"), "--exclude conv9*", "matches no layer", "netdecouple inspect")


def test_an_exclude_that_matches_everything(refused):
    """Nothing is left to decouple."""
    refused(changed(RUN, exclude="*"), "none of the 4 layers", "excluded")


# --- results


def test_the_output_is_a_folder(refused, folder: Path):
    """Of every kind of output."""
    (folder / "images.json").mkdir()
    for options in ({"output": "images"}, {"plan_out": "images"}, {"report": "images.json"}):
        refused(changed(RUN, **options), "images", "is a folder")


@pytest.mark.parametrize("name", ["faster/", "faster", "faster.tflite", "faster.pt"])
def test_an_output_that_is_no_onnx_file_by_its_name(refused, name: str):
    """It would be one, which nothing opens under that name; found out before the work."""
    for command in (RUN, LOWER, ["apply", "net.onnx", "plan.json", *RUN[2:4]]):
        refused(changed(command, output=name), "write faster.onnx")


def test_the_output_is_in_no_folder(refused):
    """Found out before the work."""
    for options in ({"output": "no/out.onnx"}, {"plan_out": "no/plan.json"}, {"report": "no/report.json"}):
        refused(changed(RUN, **options), "no/", "cannot write there")
    refused(changed(LOWER, output="no/out.onnx"), "no/", "cannot write there")


def test_the_output_is_a_pipe(refused, folder: Path):
    """As /dev/null is a device: replacing it by a file would do harm."""
    os.mkfifo(folder / "pipe")
    refused(changed(RUN, output="pipe"), "pipe", "give the name of a file")
    assert (folder / "pipe").is_fifo()


def test_the_output_is_the_input(refused, folder: Path):
    """Also under another name, and for every kind of output."""
    (folder / "link.onnx").symlink_to("net.onnx")
    (folder / "hard.onnx").hardlink_to(folder / "net.onnx")
    for name in ("net.onnx", "./net.onnx", "link.onnx", "hard.onnx"):
        refused(changed(RUN, output=name), "is an input")
        refused(changed(LOWER, output=name), "is an input")
    for command in (["inspect", "net.onnx", "--html"], ["bench", "other.onnx", "net.onnx", "--report"]):
        refused([*command, "net.onnx"], "is an input")
    for name in ("net.xml", "net.bin"):
        (folder / name).touch()
    refused(["bench", "net.xml", "--runtime", "openvino", "--report", "net.bin"], "net.bin: is an input")


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "data.npz"),
        ({"labels": "labelled.npz:images,labels"}, "labelled.npz"),
        ({"calib": "images"}, "images/03.png"),
        ({"calib": "package.inputs:batches"}, "package/inputs.py"),
        ({"calib": "package.inputs:batches"}, "package/__init__.py"),
        ({"model": "parts.onnx"}, "weights/all"),
        ({"model": "package.inputs:batches"}, "package/inputs.py"),
        ({"model": "package.inputs:batches", "weights": "weights.pt"}, "weights.pt"),
    ],
)
def test_an_output_is_anything_that_is_read(refused, folder: Path, options: dict[str, str], path: str):
    """By its name, a symbolic link or a hard link, for every command that reads it."""
    (folder / "labelled.npz").write_bytes((folder / "data.npz").read_bytes())
    (folder / "weights.pt").touch()
    for name in ("package", "weights"):
        (folder / name).mkdir()
    for name in ("__init__", "inputs"):
        (folder / "package" / f"{name}.py").write_text("raise AssertionError")
    onnx.save(
        networks.classifier(),
        "parts.onnx",
        save_as_external_data=True,
        location="weights/all",
        size_threshold=0,
    )
    (folder / "link.html").symlink_to(path)
    (folder / "hard.html").hardlink_to(folder / path)
    sweep = ["sweep", "net.onnx", "--calib", "data.npz:images", "--macs", "50%"]
    for name in (path, "link.html", "hard.html"):
        refused(changed(RUN, plan_out=name, **options), f"error: {name}: is an input")
        refused(changed(sweep, csv=name, **options), f"error: {name}: is an input")
    apply = {"plan_out": None, "macs": None, "labels": None, "report": "link.html", **options}
    if "labels" not in options:
        refused(changed(["apply", "net.onnx", "plan.json", *RUN[2:]], **apply), "is an input")


def test_an_output_is_a_file_of_a_network_that_is_compared_with(refused, folder: Path):
    """Of a PyTorch model that is a folder."""
    (folder / "earlier").mkdir()
    for name in ("netdecouple.json", "model.safetensors"):
        (folder / "earlier" / name).touch()
    sweep = ["sweep", "net.onnx", "--calib", "data.npz:images", "--compare", "earlier", "other.onnx", "--csv"]
    refused([*sweep, "earlier/netdecouple.json"], "is an input")
    refused([*sweep, "other.onnx"], "is an input")


def test_the_weights_of_a_large_network_go_beside_it(refused, folder: Path):
    """To a file that may be an input, or another output."""
    (folder / "out.onnx.data").write_bytes((folder / "data.npz").read_bytes())
    refused(changed(RUN, plan_out="out.onnx.data"), "out.onnx.data", "asked for twice")
    (folder / "out.onnx.data").unlink()
    (folder / "out.onnx.data").symlink_to("data.npz")
    refused(RUN, "out.onnx.data: is an input")


def test_two_outputs_are_one(refused, folder: Path):
    """One would overwrite the other, through links as well."""
    refused(changed(RUN, plan_out="out.onnx"), "out.onnx", "asked for twice")
    refused(changed(RUN, plan_out="a.json", report="./a.json"), "a.json", "asked for twice")
    (folder / "link.json").symlink_to("a.json")
    refused(changed(RUN, plan_out="a.json", report="link.json"), "link.json", "asked for twice")
    (folder / "nets").mkdir()
    sweep = ["sweep", "net.onnx", "--calib", "data.npz:images", "--macs", "50%", "-o", "nets"]
    refused([*sweep, "--csv", "nets/net-macs50.onnx"], "nets/net-macs50.onnx", "asked for twice")


def test_nothing_else_is_in_the_work_folder(refused, folder: Path):
    """What is read could be replaced there, or removed, and what is written could be taken for its own."""
    (folder / "work").mkdir()
    (folder / "work" / "data.npz").write_bytes((folder / "data.npz").read_bytes())
    refused(changed(RUN, work="work", calib="work/data.npz:images"), "work/data.npz", "work folder")
    refused(changed(RUN, work="work", plan_out="work/plan.json"), "work/plan.json", "work folder")
    refused(changed(RUN, work="images", calib="images"), "images", "work folder")


# --- benchmarks


def test_shapes_that_do_not_fit(refused, folder: Path):
    """Nonsense, a shape that the network does not take, and one that is needed but missing."""
    onnx.save(networks.restorer(), folder / "any.onnx")
    refused(["bench", "net.onnx", "--shape", "big"], "--shape big", "1x3x224x224")
    refused(["bench", "net.onnx", "--shape", "1x3x9x9"], "net.onnx", "'image'", "?×3×8×8")
    refused(["bench", "any.onnx"], "any.onnx", "'image'", "--shape")


def test_networks_that_take_different_inputs(refused, folder: Path):
    """There would be nothing to compare."""
    onnx.save(networks.kinds(), folder / "larger.onnx")
    refused(["bench", "net.onnx", "larger.onnx"], "larger.onnx", "12×12", "net.onnx", "8×8")


def test_runtimes_that_are_not_there(refused, monkeypatch: pytest.MonkeyPatch):
    """A name nobody has, and a package that is not installed."""
    refused(["bench", "net.onnx", "--runtime", "tvm"], "'tvm'", "onnxruntime, openvino")
    monkeypatch.delitem(sys.modules, "netdecouple.runtimes.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    refused(["bench", "net.onnx", "--runtime", "openvino"], "pip install 'netdecouple[openvino]'")


def test_times_that_cannot_be_written(refused, folder: Path):
    """It is found out before anything is timed."""
    refused(["bench", "net.onnx", "--report", "missing/times.json"], "missing", "cannot write")
    refused(["bench", "net.onnx", "--report", "net.onnx"], "net.onnx", "is an input")


# --- plans

APPLY = ["apply", "net.onnx", "plan.json", "-o", "out.onnx", "--calib", "data.npz:images"]


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    """What was made for one test and serves others."""
    return {}


@pytest.fixture
def plan(netdecouple, folder: Path, known: dict[str, str]) -> dict:
    """A plan for net.onnx, as data; plan.json holds it."""
    if not known:
        ended = netdecouple(*changed(RUN, plan_out="plan.json", families="nd-dp"))
        assert ended.code == 0, ended
        (folder / "out.onnx").unlink()
        known["plan"] = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(known["plan"])
    return json.loads(known["plan"])


def test_a_plan_that_is_not_there(refused):
    """The message says how to make one."""
    refused(APPLY, "plan.json", "--plan-out")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"plan"', "\x00", "[" * 100_000])
def test_a_file_that_is_no_plan(refused, folder: Path, text: str):
    """The message says how to make one."""
    (folder / "plan.json").write_text(text)
    refused(APPLY, "plan.json", "not a plan file", "--plan-out")


def test_a_plan_that_is_binary(refused, folder: Path):
    """A model given as plan."""
    arguments = list(APPLY)
    arguments[2] = "other.onnx"
    refused(arguments, "other.onnx", "plan", "--plan-out")


def test_a_plan_of_another_version(refused, folder: Path, plan: dict):
    """It is said which version this is."""
    for version in (0, 1, "1", None, 1.5):
        (folder / "plan.json").write_text(json.dumps(plan | {"version": version}))
        refused(APPLY, "plan.json", "version", repr(version))


def test_a_plan_of_another_model(refused, plan: dict):
    """Another network's weights."""
    arguments = list(APPLY)
    arguments[1] = "other.onnx"
    refused(arguments, "another model", "other.onnx")


def test_a_plan_of_other_images(refused, folder: Path, plan: dict):
    """Other calibration images, or fewer."""
    refused(changed(APPLY, calib="images"), "other calibration inputs")
    images = np.load(folder / "data.npz")["images"]
    np.save(folder / "fewer.npy", images[:20])
    refused(changed(APPLY, calib="fewer.npy"), "other calibration inputs")


def test_a_plan_over_itself(refused, plan: dict):
    """The output may not be the plan."""
    refused(changed(APPLY, output="plan.json"), "plan.json", "is an input")


@pytest.mark.parametrize(
    "field", ["model", "images", "samples", "seed", "loss", "data_free", "budget", "layers"]
)
@pytest.mark.parametrize("value", [None, {"a": 1}, "missing"])
def test_a_plan_with_wrong_types(refused, folder: Path, plan: dict, field: str, value: object):
    """Fields that are missing or hold something else."""
    if value == "missing":
        del plan[field]
    else:
        plan[field] = value
    (folder / "plan.json").write_text(json.dumps(plan))
    refused(APPLY, "plan.json")


def edit_layer(plan: dict, folder: Path, **changes: object) -> None:
    """Change the plan of its last decoupled layer."""
    row = [row for row in plan["layers"] if row["family"] != "kept"][-1]
    row |= changes
    (folder / "plan.json").write_text(json.dumps(plan))


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": "many"},
        {"sizes": [1.5]},
        {"channels": 3},
        {"channels": [0, 1]},
        {"channels": [[1, "two"]]},
        {"channels": [[-1, 1]]},
        {"ridge": None},
        {"ridge": float("nan")},
        {"macs": -1},
        {"name": "conv9"},
    ],
)
def test_a_plan_with_layers_of_wrong_types(refused, folder: Path, plan: dict, changes: dict):
    """Or of another network."""
    edit_layer(plan, folder, **changes)
    refused(APPLY, "plan")


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": [3], "channels": [[0, 1]]},  # not as many as the size says
        {"sizes": [3], "channels": [[0, 1, 16]]},  # one that is not there
        {"sizes": [1], "channels": [[10**30]]},
        {"sizes": [3], "channels": [[2, 1, 0]]},  # out of order
        {"sizes": [99], "channels": [[0] * 99]},  # more terms than a channel has
        {"sizes": [3], "channels": [[0, 1, 2], [0, 1, 2]]},  # of one application too many
        {"sizes": [3, 3], "channels": []},
        {"sizes": [], "channels": []},  # nothing at all
        {"sizes": [0], "channels": []},
        {"sizes": [10**9], "channels": []},
        {"family": "magic"},
        {"family": "nd-dp+sd"},
        {"family": "sd+nd-dp"},  # which has more sizes
    ],
)
def test_a_plan_that_makes_no_sense_for_the_layer(refused, folder: Path, plan: dict, changes: dict):
    """Well-formed, but not to be carried out: the layer is named."""
    edit_layer(plan, folder, **changes)
    refused(APPLY, "conv3")


def test_a_plan_that_changes_a_layer_that_cannot_be(refused, folder: Path, plan: dict):
    """A fully connected layer with terms."""
    plan["layers"][-1] |= {"family": "nd-dp", "sizes": [3], "reason": ""}
    (folder / "plan.json").write_text(json.dumps(plan))
    refused(APPLY, "logits", "only cd")


# --- usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "net.onnx"],
        [*RUN, "--bogus"],
        [*RUN, "--samples", "9"],
        [*RUN, "--samples", "some"],
        [*RUN, "--seed", "-1"],
        changed(RUN, macs=None, max_drop="-1", labels="data.npz:images,labels"),
        ["frobnicate"],
        ["apply", "net.onnx"],
        ["lower", "net.onnx"],
    ],
)
def test_usage_errors(netdecouple, folder: Path, arguments: list[str]):
    """Exit code 2 as well, with how to get help, and nothing written."""
    before = everything(folder)
    ended = netdecouple(*arguments)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert ended.err.endswith("--help\n")
    assert ended.err.count("\n") == 1
    assert everything(folder) == before


# --- what is nobody's fault but ours


def test_an_internal_error_is_one_line(netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Exit code 1, the kind of error, and how to see more; nothing written."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("one [bold]\ntwo")

    monkeypatch.setattr("netdecouple.api.decouple", fail)
    before = everything(folder)
    ended = netdecouple(*RUN)
    assert ended.code == 1
    assert ended.err.startswith("internal error: RuntimeError: one [bold] two;")
    assert "NETDECOUPLE_TRACEBACK=1" in ended.err
    assert ended.err.count("\n") == 1
    assert everything(folder) == before


LONG = f"[ONNXRuntimeError] : Name:'r' {'x' * 300}\n index: 2 Got: 9 Expected: 8\n\n Please fix the [model]"


@pytest.mark.parametrize(
    ("cause", "quoted"),
    [
        (RuntimeError(LONG), LONG),
        (RuntimeError("a" * 250 + "b" * 250), "a" * 250 + "b" * 250),
        (RuntimeError("one line"), ""),
        (OSError(28, "No space left"), ""),
        (None, ""),
    ],
)
def test_what_a_library_says_is_shown_whole(
    netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception | None, quoted: str
):
    """Below our line, which quotes the beginning; nothing is said twice where that is all."""
    line = first_line(cause) if cause else "nothing"

    def fail(*_: object, **__: object) -> None:
        try:
            raise ModelError(f"the network failed: {line}") from cause
        except ModelError as error:
            raise ModelError(f"net.onnx: {error}; try another") from error

    monkeypatch.setattr("netdecouple.api.decouple", fail)
    ours = f"error: net.onnx: the network failed: {line}; try another\n"
    assert netdecouple(*RUN).err == ours + (f"{quoted}\n" if quoted else "")
    told = json.loads(netdecouple(*RUN, "--json").out)
    assert told.get("details", "") == quoted
    assert f"error: {told['error']}\n" == ours


def test_out_of_memory_is_one_line(netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """With what helps."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("netdecouple.api.decouple", fail)
    ended = netdecouple(*RUN)
    assert (ended.code, ended.err) == (
        2,
        "error: out of memory; try fewer --samples or smaller images\n",
    )


def test_names_are_printed_as_they_are(refused, folder: Path):
    """File names are no markup: neither [tags] nor :key: change."""
    refused(changed(RUN, model="[bold]a[/x]:key:.onnx"), "[bold]a[/x]:key:.onnx: no such file")
