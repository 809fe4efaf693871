"""What the commands do when all is well, and what a killed one leaves behind."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from netdecouple import kernels
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.runtimes.onnxruntime import OVERLOADS, open_session, run
from netdecouple.version import __version__
from tests import networks
from tests.kernels.test_onnxruntime import chain
from tests.runtimes.base import installed

RUN = ["run", "net.onnx", "-o", "out.onnx", "--macs", "2x", "--families", "nd", "--calib", "data.npz:images"]


def total_macs(path: Path) -> int:
    """MACs of a file's network, counted from what is in the file."""
    opened = read_model(path)
    return sum(la.macs for la in OnnxNetwork(opened, np.zeros((2, 3, 8, 8), np.float32)).layers)


def outputs(path: Path, images: np.ndarray) -> np.ndarray:
    return run(open_session(path), None, {"image": images})[0]


def convolutions(path: Path) -> list[str]:
    return [n.name for n in onnx.load(path).graph.node if n.op_type == "Conv"]


# --- run


def test_run_halves_the_macs(netdecouple, folder: Path):
    """The file has half the MACs, a valid graph, the original's interface, and outputs that are close."""
    ended = netdecouple(*RUN)
    assert ended.code == 0
    assert ended.err == ""
    model = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert list(model.graph.input) == list(networks.classifier().graph.input)
    assert list(model.graph.output) == list(networks.classifier().graph.output)
    assert total_macs(folder / "out.onnx") <= total_macs(folder / "net.onnx") / 2
    images = np.load(folder / "data.npz")["images"]
    original, new = (outputs(folder / name, images) for name in ("net.onnx", "out.onnx"))
    error = np.square(new - original).sum() / np.square(original - original.mean(0)).sum()
    assert 1e-9 < error < 0.5


def test_run_prints_every_layer_and_what_was_written(netdecouple, folder: Path):
    """The budgets that can be met, the layers, the totals, the file."""
    out = netdecouple(*RUN).out
    for part in (
        "Budgets that can be met",
        "conv1",
        "conv2",
        "conv3",
        "logits",
        "MACs",
        "Agreement",
        "Time ",
        "Wrote",
    ):
        assert part in out
    assert re.search(r"Wrote +out\.onnx \(\d+\.\d\d MB\)", out)


def test_run_writes_plan_and_report(netdecouple, folder: Path):
    """Both are JSON, agree with each other, and the model holds its plan."""
    ended = netdecouple(*RUN, "--plan-out", "plan.json", "--report", "report.json")
    assert ended.code == 0
    plan = json.loads((folder / "plan.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    assert [row["name"] for row in plan["layers"]] == ["conv1", "conv2", "conv3", "logits"]
    for planned, written in zip(plan["layers"], report["layers"], strict=True):
        for field in ("name", "family", "reason", "sizes", "macs_before", "parameters_before"):
            assert planned[field] == written[field]
        # filters that nobody reads are not written
        assert 0 < written["macs"] <= planned["macs"]
        assert 0 < written["parameters"] <= planned["parameters"]
    assert report["macs"] == total_macs(folder / "out.onnx")
    assert report["macs_before"] == total_macs(folder / "net.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(folder / "out.onnx").metadata_props}
    assert json.loads(metadata["netdecouple.plan"]) == plan
    assert metadata["netdecouple.version"] == __version__
    assert metadata["classes"] == "ten"


def test_run_leaves_nothing_else(netdecouple, folder: Path):
    """The files that were asked for, readable by all, and the inputs as they were."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert netdecouple(*RUN, "--plan-out", "plan.json", "--report", "report.json").code == 0
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"out.onnx", "plan.json", "report.json"}
    assert {path: after[path] for path in before} == before
    modes = {(folder / name).stat().st_mode & 0o777 for name in ("out.onnx", "plan.json", "report.json")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_run_is_reproducible(netdecouple, folder: Path):
    """The same command gives the same bytes; another seed does not."""
    found = []
    for seed in ("0", "0", "1"):
        assert netdecouple(*RUN, "--seed", seed, "--report", "report.json").code == 0
        found.append(((folder / "out.onnx").read_bytes(), (folder / "report.json").read_text()))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]


@pytest.mark.parametrize("maker", ["residual", "kinds", "additions", "with_if", "shared_weight", "old_style"])
def test_run_takes_every_network(netdecouple, folder: Path, maker: str):
    """Shortcuts, groups, dilations, subgraphs, shared and old-style weights, from pictures."""
    onnx.save(networks.ALL[maker](), folder / "net.onnx")
    ended = netdecouple("run", "net.onnx", "-o", "out.onnx", "--macs", "70%", "--calib", "images")
    assert ended.code == 0, ended
    onnx.checker.check_model(onnx.load(folder / "out.onnx"), full_check=True)


def test_run_takes_fixed_batches(netdecouple, folder: Path):
    """A batch that the images do not fill, nor those held out; also without any images."""
    onnx.save(networks.classifier(batch=16), folder / "net.onnx")
    assert netdecouple(*RUN).code == 0
    shape = onnx.load(folder / "out.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [16, 3, 8, 8]
    ended = netdecouple(*RUN[:-2], "--data-free")
    assert ended.code == 0, ended


def test_run_takes_networks_of_any_size(netdecouple, folder: Path):
    """A fully convolutional network with two outputs; the pictures' size counts."""
    onnx.save(networks.restorer(), folder / "net.onnx")
    ended = netdecouple(
        *("run", "net.onnx", "-o", "out.onnx", "--macs", "60%", "--families", "nd", "--calib", "images"),
        *("--report", "report.json"),
    )
    assert ended.code == 0, ended
    report = json.loads((folder / "report.json").read_text())
    # 9 × 11 pictures: two layers of 8 × 8 or 8 × 3 channels, the first, and the transposed one
    assert report["macs_before"] == 99 * (9 * (3 * 8 + 8 * 8 + 8 * 3) + 8 * 4)
    assert report["agreement"]["loss"] == "relative"


@pytest.mark.parametrize("size", [8, "H"])
def test_networks_with_the_channels_last_take_what_others_take(netdecouple, folder: Path, size):
    """Grey pictures in a folder, uint8 and float arrays, with fixed and open sizes; inspect, run and eval."""
    onnx.save(networks.channels_last(networks.classifier()), folder / "net.onnx")
    model = onnx.load(folder / "net.onnx")
    for dim in model.graph.input[0].type.tensor_type.shape.dim[1:3]:
        dim.CopyFrom(onnx.TensorShapeProto.Dimension(**{"dim_param" if size == "H" else "dim_value": size}))
    onnx.save(model, folder / "net.onnx")
    for path in (folder / "images").iterdir():
        Image.open(path).convert("L").save(path)
    grey = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    colour = np.repeat(grey[..., None] / np.float32(255), 3, axis=3)
    np.savez(folder / "data.npz", grey=grey, colour=colour, labels=np.arange(24) % 10)
    more = ["--input-size", "8"] if size == "H" else []
    ended = netdecouple("inspect", "net.onnx", *more)
    assert ended.code == 0, ended
    for calib in ("images", "data.npz:grey", "data.npz:colour"):
        asked = ["--macs", "2x", "--families", "nd-dp", "--calib", calib, *more]
        ended = netdecouple("run", "net.onnx", "-o", "out.onnx", *asked)
        assert ended.code == 0, ended
    tables = [
        netdecouple("eval", "net.onnx", "out.onnx", "--data", f"data.npz:{key},labels")
        for key in ("grey", "colour")
    ]
    assert tables[0] == tables[1]
    assert tables[0].code == 0


def test_inputs_beside_a_folder_of_pictures(netdecouple, folder: Path):
    """They are given as options, to every command that runs the network; the result takes them, too."""
    onnx.save(networks.side_inputs(), folder / "net.onnx")
    more = ["--constant", "scales=1,1,.5,.5", "--constant", "gain=2"]
    quick = ["--macs", "2x", "--families", "nd-dp", "--calib", "images"]
    for command in (
        ["inspect", "net.onnx"],
        ["run", "net.onnx", "-o", "out.onnx", "--plan-out", "plan.json", "--report", "page.html", *quick],
        ["apply", "net.onnx", "plan.json", "-o", "again.onnx", "--calib", "images"],
        ["eval", "net.onnx", "out.onnx", "--data", "data.npz:images,labels"],
        ["sweep", "net.onnx", *quick, "--compare", "out.onnx", "again.onnx"],
        ["bench", "net.onnx", "out.onnx", "--layers", "--report", "times.json"],
    ):
        ended = netdecouple(*command, *more)
        assert ended.code == 0, ended
    assert all(row["macs"] for row in json.loads((folder / "times.json").read_text())["models"])
    assert (folder / "out.onnx").read_bytes() == (folder / "again.onnx").read_bytes()
    assert [i.name for i in onnx.load(folder / "out.onnx").graph.input] == ["scales", "image", "gain"]


def test_a_library_of_operators_is_used_wherever_the_network_runs(
    netdecouple, folder: Path, custom_ops: Path
):
    """Also where it is folded, cut between layers, timed, and compared."""
    more, quick = ["--custom-ops", str(custom_ops)], ["--families", "nd-dp", "--calib", "images"]
    for command in (
        ["inspect", "net.onnx"],
        ["run", "net.onnx", "-o", "out.onnx", "--macs", "70%", "--plan-out", "p.json", *quick],
        ["run", "net.onnx", "-o", "o.onnx", "--latency", "100%", "--force", "--report", "page.html", *quick],
        ["run", "net.onnx", "-o", "o.onnx", "--macs", "70%", "--memory", "1GB", "--workers", "1", *quick],
        ["apply", "net.onnx", "p.json", "-o", "again.onnx", "--calib", "images"],
        ["eval", "net.onnx", "out.onnx", "--data", "data.npz:images,labels"],
        ["sweep", "net.onnx", "--macs", "70%", "--compare", "out.onnx", "again.onnx", *quick],
        ["bench", "net.onnx", "out.onnx", "--layers"],
    ):
        ended = netdecouple(*command, *more)
        assert ended.code == 0, (command, ended)
    assert (folder / "out.onnx").read_bytes() == (folder / "again.onnx").read_bytes()
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "not a registered" not in page


def test_texts_of_a_reader_are_compared(netdecouple, folder: Path):
    """In the report, on the page, and by eval, for which labels are none of them."""
    onnx.save(networks.reader(), folder / "net.onnx")
    images = networks.images_for(networks.reader(), 60)
    np.savez(folder / "data.npz", images=images, labels=np.zeros(60, int))
    reports = ["--report", "report.json", "--report", "page.html"]
    quick = ["--macs", "60%", "--families", "nd-dp", "--calib", "data.npz:images"]
    ended = netdecouple("run", "net.onnx", "-o", "out.onnx", *quick, *reports)
    assert ended.code == 0, ended
    found = json.loads((folder / "report.json").read_text())["agreement"]["same_text"]
    assert 0 <= found <= 1
    assert f"same text in {100 * found:.1f}%" in ended.out
    assert "are read as another text" in (folder / "page.html").read_text(encoding="utf-8")
    ended = netdecouple("eval", "net.onnx", "out.onnx", "--data", "data.npz:images,labels", "--json")
    assert ended.code == 0, ended
    first, second = json.loads(ended.out)["scores"]
    assert first["same_text"] is None
    assert 0 <= second["same_text"] <= 1
    ended = netdecouple("eval", "net.onnx", "net.onnx", "--data", "data.npz:images,labels")
    assert "same text" in ended.out
    assert "100.0%" in ended.out


def test_run_takes_external_data(netdecouple, folder: Path):
    """Weights in a file of their own."""
    onnx.save(
        networks.classifier(), folder / "net.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    assert netdecouple(*RUN).code == 0
    with_weights = (folder / "out.onnx").read_bytes()
    onnx.save(networks.classifier(), folder / "net.onnx")
    assert netdecouple(*RUN).code == 0
    assert (folder / "out.onnx").read_bytes() == with_weights


def test_run_counts_unreadable_images(netdecouple, folder: Path):
    """They are skipped, counted and named."""
    for name in ("03.png", "07.png"):
        (folder / "images" / name).write_bytes(b"not a picture")
    ended = netdecouple(*RUN[:-1], "images", "--report", "r.json")
    assert ended.code == 0
    assert "2 unreadable images: 03.png, 07.png" in ended.out
    assert json.loads((folder / "r.json").read_text())["skipped"] == ["03.png", "07.png"]


def test_run_excludes_layers(netdecouple, folder: Path):
    """By name and by glob, more than once."""
    arguments = [*RUN[:4], "--macs", "80%", *RUN[6:]]
    assert netdecouple(*arguments, "--exclude", "conv1", "--exclude", "*2", "--report", "r.json").code == 0
    rows = {row["name"]: row for row in json.loads((folder / "r.json").read_text())["layers"]}
    assert [rows[name]["reason"] for name in ("conv1", "conv2")] == ["excluded", "excluded"]
    assert rows["conv3"]["family"] != "kept"
    assert convolutions(folder / "out.onnx")[:2] == ["conv1", "conv2"]


def test_run_keeps_a_parameter_budget(netdecouple, folder: Path):
    """Counted in the file; together with MACs, both are kept."""
    assert netdecouple(*RUN, "--params", "40%").code == 0
    sizes = []
    for name in ("net.onnx", "out.onnx"):
        graph = read_model(folder / name).proto.graph
        sizes.append(sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type == 1))
    assert sizes[1] <= 0.4 * sizes[0]
    assert total_macs(folder / "out.onnx") <= total_macs(folder / "net.onnx") / 2


def test_run_without_data(netdecouple, folder: Path):
    """From the weights alone, no images asked for; the report claims no agreement."""
    ended = netdecouple(
        "run",
        "net.onnx",
        "-o",
        "out.onnx",
        "--macs",
        "60%",
        "--families",
        "nd",
        "--data-free",
        "--report",
        "r.json",
    )
    assert ended.code == 0, ended
    assert json.loads((folder / "r.json").read_text())["agreement"] is None
    assert total_macs(folder / "out.onnx") <= 0.6 * total_macs(folder / "net.onnx")


def test_run_as_published(netdecouple, folder: Path):
    """One rank for the whole network, the largest that fits, and the first layer kept."""
    arguments = ["run", "net.onnx", "-o", "out.onnx", "--macs", "60%", "--data-free", "--uniform-rank"]
    assert netdecouple(*arguments, "--report", "r.json").code == 0
    rows = {row["name"]: row for row in json.loads((folder / "r.json").read_text())["layers"]}
    assert rows["conv1"]["reason"] == "first convolution"
    ranks = {tuple(rows[name]["terms_per_channel"]) for name in ("conv2", "conv3")}
    assert len(ranks) == 1
    ((fewest, most),) = ranks
    assert fewest == most
    # one term more of 12 → 16 (4 × 4) and 16 → 16 (4 × 4) channels would be too much
    more = 16 * (12 * (9 + 16) + 16 * (9 + 16)) + total_macs(folder / "out.onnx")
    assert more > 0.6 * total_macs(folder / "net.onnx") >= total_macs(folder / "out.onnx")


def test_run_keeps_to_the_families_it_may_use(netdecouple, folder: Path):
    """No layer is changed in any other way, and the budget holds."""
    assert netdecouple(*RUN, "--families", "sd", "--plan-out", "plan.json").code == 0
    rows = json.loads((folder / "plan.json").read_text())["layers"]
    assert {row["family"] for row in rows} == {"sd", "kept"}
    assert total_macs(folder / "out.onnx") <= total_macs(folder / "net.onnx") / 2


def test_run_compares_outputs_as_told(netdecouple, folder: Path):
    """Numbers that are no scores: a report of relative errors, and of no classes."""
    ended = netdecouple(*RUN, "--loss", "relative", "--report", "report.json")
    assert ended.code == 0
    found = json.loads((folder / "report.json").read_text())["agreement"]
    assert found["loss"] == "relative"
    assert found["same_class"] is None


def test_run_follows_a_method(netdecouple, folder: Path):
    """T = 2 means two terms for every channel of every layer but the first convolution, which is kept."""
    arguments = ["run", "net.onnx", "-o", "out.onnx", "--method", "nd-dp:T=2", "--data-free"]
    ended = netdecouple(*arguments, "--plan-out", "plan.json")
    assert (ended.code, ended.err) == (0, "")
    rows = {row["name"]: row for row in json.loads((folder / "plan.json").read_text())["layers"]}
    assert [rows[name]["reason"] for name in ("conv1", "logits")] == [
        "first convolution",
        "fully connected; published methods are for convolutions",
    ]
    for name, n_i in (("conv2", 12), ("conv3", 16)):
        assert (rows[name]["family"], rows[name]["sizes"]) == ("nd-dp", [2 * n_i])
        assert rows[name]["channels"] == [sorted([*range(n_i)] * 2)]
    kept = 20736 + 160  # conv1 and logits
    # 12 → 16 and 16 → 16 channels, both of 4 × 4
    assert total_macs(folder / "out.onnx") == kept + 16 * 2 * (12 * (9 + 16) + 16 * (9 + 16))


def test_run_keeps_to_an_allowed_drop(netdecouple, folder: Path):
    """Accuracy measured on the labels falls by no more than allowed, and the network gets smaller."""
    images = np.load(folder / "data.npz")["images"]
    labels = outputs(folder / "net.onnx", images).argmax(1)  # so the original is right always
    np.savez(folder / "right.npz", images=images, labels=labels)
    arguments = [*RUN[:4], *RUN[6:]]  # without a budget
    ended = netdecouple(
        *arguments, "--max-drop", "10", "--labels", "right.npz:images,labels", "--report", "r.json"
    )
    assert ended.code == 0, ended
    before, after = json.loads((folder / "r.json").read_text())["accuracy"]
    found = np.mean(outputs(folder / "out.onnx", images).argmax(1) == labels)
    assert before == 1
    assert after == pytest.approx(found)
    assert found >= 0.9
    assert total_macs(folder / "out.onnx") < 0.8 * total_macs(folder / "net.onnx")


def test_run_writes_nothing_that_is_not_within_the_limit(netdecouple, folder: Path):
    """Exit code 3, the limit and the figures in one line; --force writes it."""
    ended = netdecouple(*RUN, "--within", "kl=0.000001", "--report", "r.json")
    assert ended.code == 3
    assert "not written: the network is not within kl=1e-06: a KL divergence of" in ended.err
    assert "--force" in ended.err
    assert not (folder / "out.onnx").exists()
    assert not (folder / "r.json").exists()
    ended = netdecouple(*RUN, "--within", "kl=0.000001", "--report", "r.json", "--force")
    assert ended.code == 0
    assert "kl=1e-06 is NOT kept" in ended.out
    assert json.loads((folder / "r.json").read_text())["promise"]["kept"] is False
    assert (folder / "out.onnx").exists()


def test_run_trains_for_some_minutes(netdecouple, folder: Path):
    """However few: nothing is worse than before."""
    pytest.importorskip("torch")
    ended = netdecouple(*RUN, "--refine", "0.01", "--report", "r.json")
    assert ended.code == 0, ended
    assert "Refined" in ended.out
    refined = json.loads((folder / "r.json").read_text())["refinement"]
    assert refined["loss"] <= refined["loss_before"]


def test_eval_warns_where_the_network_is_no_better_than_one_answer(netdecouple, folder: Path):
    """Labels of another order, or a wrong preprocessing."""
    images = np.load(folder / "data.npz")["images"]
    labels = (outputs(folder / "net.onnx", images).argmax(1) + 1) % 4  # never right
    np.savez(folder / "wrong.npz", images=images, labels=labels)
    ended = netdecouple("eval", "net.onnx", "--data", "wrong.npz:images,labels")
    assert ended.code == 0
    assert "Warning" in ended.out
    assert "check the labels and the preprocessing" in ended.out


def test_eval_measures_images_by_their_psnr(netdecouple, folder: Path):
    """Of a network that returns images: to the targets, as uint8 or in 0 to 1, and to the first network."""
    onnx.save(networks.restorer(), folder / "restorer.onnx")
    images = networks.images_for(networks.restorer(), 30)
    original = run(open_session(folder / "restorer.onnx"), None, {"image": images})[0]
    targets = np.clip(original + 0.01, 0, 1).astype(np.float32)
    np.savez(
        folder / "pairs.npz", inputs=images, targets=targets, bytes=np.round(255 * targets).astype(np.uint8)
    )
    expected = np.mean(-10 * np.log10(np.square(original - targets).mean(axis=(1, 2, 3))))
    for key in ("targets", "bytes"):
        ended = netdecouple(
            "eval", "restorer.onnx", "restorer.onnx", "--data", f"pairs.npz:inputs,{key}", "--json"
        )
        assert ended.code == 0, ended
        first, second = json.loads(ended.out)["scores"]
        assert first["psnr"] == pytest.approx(expected, abs=0.05)
        assert (first["psnr_to_first"], second["psnr_to_first"], first["top1"]) == (None, 200, None)
    assert f"{expected:.2f}" in netdecouple("eval", "restorer.onnx", "--data", "pairs.npz:inputs,targets").out
    np.savez(folder / "pairs.npz", inputs=images, targets=targets[:, :, :4])
    ended = netdecouple("eval", "restorer.onnx", "--data", "pairs.npz:inputs,targets")
    assert ended.code == 2
    assert "the images to compare with" in ended.err


def test_run_takes_fewer_samples_when_told(netdecouple, folder: Path):
    """--samples bounds them."""
    assert netdecouple(*RUN, "--samples", "12", "--plan-out", "plan.json").code == 0
    assert json.loads((folder / "plan.json").read_text())["samples"] == 12


def test_preprocessing_reaches_the_network(netdecouple, folder: Path):
    """Another mean and deviation give other moments, hence another network."""
    found = []
    for more in ([], ["--mean", "0.5,0.5,0.5", "--std", "0.25"], ["--preset", "cifar10"]):
        ended = netdecouple(*RUN[:-1], "images", *more)
        assert ended.code == 0, ended
        found.append((folder / "out.onnx").read_bytes())
    assert len(set(found)) == 3


# --- apply


@pytest.mark.parametrize("more", [[], ["--seed", "3"], ["--uniform-rank"], ["--data-free"]])
def test_apply_reproduces_the_file(netdecouple, folder: Path, more: list[str]):
    """Byte for byte, from the plan, the model and the images."""
    assert netdecouple(*RUN, "--plan-out", "plan.json", *more).code == 0
    arguments = ["apply", "net.onnx", "plan.json", "-o", "again.onnx", "--calib", "data.npz:images"]
    ended = netdecouple(*arguments, "--report", "r.json")
    assert ended.code == 0, ended
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()
    assert json.loads((folder / "r.json").read_text())["model"] == "net.onnx"


@pytest.mark.parametrize(
    ("more", "families"),
    [
        (["--macs", "4x", "--families", "cd,sd,cp,nd"], None),
        (["--macs", "60%", "--families", "cd,sd,cp,nd", "--data-free"], None),
        (["--macs", "3x", "--families", "cd+nd-dp"], {"cd+nd-dp"}),
        (["--macs", "2x", "--families", "cp+nd-dp"], {"cp+nd-dp"}),
        (["--method", "cd+sd:50%"], {"cd+sd"}),
        (["--method", "nd-pd:T=2"], {"nd-pd"}),
    ],
)
def test_apply_reproduces_every_family(netdecouple, folder: Path, more: list[str], families: set[str] | None):
    """Byte for byte, whatever was done to the layers."""
    arguments = ["run", "net.onnx", "-o", "out.onnx", "--calib", "data.npz:images", *more]
    ended = netdecouple(*arguments, "--plan-out", "plan.json")
    assert ended.code == 0, ended
    found = {row["family"] for row in json.loads((folder / "plan.json").read_text())["layers"]} - {"kept"}
    assert found
    assert families is None or found == families
    ended = netdecouple("apply", "net.onnx", "plan.json", "-o", "again.onnx", "--calib", "data.npz:images")
    assert ended.code == 0, ended
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


def test_apply_without_data(netdecouple, folder: Path):
    """A data-free plan needs no images."""
    arguments = [*RUN[:-2], "--data-free", "--plan-out", "plan.json"]
    assert netdecouple(*arguments).code == 0
    ended = netdecouple("apply", "net.onnx", "plan.json", "-o", "again.onnx")
    assert ended.code == 0, ended
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()


# --- lower


@pytest.mark.parametrize(("layers", "told"), [(3, "3 fused operators"), (1, "1 fused operator")])
def test_lower_writes_standard_operators(
    netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch, layers: int, told: str
):
    """They compute the same; nothing of ours is needed to make them or to run them."""
    monkeypatch.setattr(kernels, "__path__", [str(folder)])
    assert not kernels.available()
    sizes = [(8, 24, 2), (24, 9, 4), (9, 5, 3)][:layers]
    fused, parallel = chain("fused", sizes), chain("parallel", sizes)
    onnx.save(fused, folder / "fused.onnx")
    before = set(folder.iterdir())
    ended = netdecouple("lower", "fused.onnx", "-o", "standard.onnx")
    assert (ended.code, ended.err) == (0, "")
    assert re.fullmatch(rf"Lowered +{told}\nWrote +standard\.onnx \(\d\.\d\d MB\)\n", ended.out)
    assert set(folder.iterdir()) - before == {folder / "standard.onnx"}
    assert onnx.load(folder / "fused.onnx") == fused
    images = np.random.default_rng(0).standard_normal((2, 8, 6, 7), np.float32)
    found, expected = (
        run(open_session(model), None, {"x": images})[0] for model in (folder / "standard.onnx", parallel)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(not kernels.available(), reason="the fused operator was not built")
@pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < OVERLOADS,
    reason="this ONNX Runtime does not tell functions of one name apart",
)
def test_a_fused_network_is_used_without_the_library(
    netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Written with it; evaluated, timed and decoupled again without, which is said, and still fused then."""
    budget = ["--macs", "60%", "--data-free", "--families", "nd"]
    assert netdecouple("run", "net.onnx", "-o", "fused.onnx", "--emit", "fused", *budget).code == 0
    images = np.load(folder / "data.npz")["images"]
    expected, told = outputs(folder / "fused.onnx", images), netdecouple("inspect", "fused.onnx").out
    monkeypatch.setattr(kernels, "library_path", lambda: None)
    note = f"note: {kernels.MISSING}; without it networks are slower\n"
    np.testing.assert_allclose(outputs(folder / "fused.onnx", images), expected, rtol=0, atol=1e-5)
    ended = netdecouple("eval", "fused.onnx", "--data", "data.npz:images,labels")
    assert (ended.code, ended.err) == (0, note)
    assert netdecouple("inspect", "fused.onnx").out == told
    ended = netdecouple("bench", "net.onnx", "fused.onnx", "--layers", "--seconds", "0.05")
    assert (ended.code, ended.err) == (0, note)
    ended = netdecouple("run", "fused.onnx", "-o", "again.onnx", "--macs", "90%", *budget[2:])
    assert (ended.code, ended.err) == (0, note)
    fused, again = (onnx.load(folder / name) for name in ("fused.onnx", "again.onnx"))
    assert list(again.functions) == list(fused.functions)


# --- inspect, eval, and the rest


def test_inspect_lists_layers_and_reach(netdecouple, folder: Path):
    """Every layer with its MACs, and which budgets can be met."""
    ended = netdecouple("inspect", "net.onnx")
    assert (ended.code, ended.err) == (0, "")
    for part in ("conv1", "3→12 3×3", "20.7 k", "conv2", "conv3", "logits", "fewer"):
        assert part in ended.out


def test_inspect_says_what_no_output_needs(netdecouple, folder: Path):
    """And does not list it."""
    model = networks.classifier()
    model.graph.node.append(onnx.helper.make_node("Conv", ["image", "conv1.weight"], ["unread"], "dead"))
    onnx.save(model, folder / "net.onnx")
    shown = netdecouple("inspect", "net.onnx").out
    assert "Left out    dead: no output needs this" in shown
    assert shown.count("dead") == 1


def test_inspect_takes_a_size(netdecouple, folder: Path):
    """Where the model leaves it open."""
    onnx.save(networks.restorer(), folder / "net.onnx")
    small, large = (netdecouple("inspect", "net.onnx", "--input-size", s).out for s in ("10", "20x20"))
    assert "21.6 k" in small  # 3 · 8 · 9 · 100
    assert "86.4 k" in large


def test_eval_measures_accuracy(netdecouple, folder: Path):
    """Top-1 and top-5 of one network, by NumPy; agreement of a second one with the first."""
    data = np.load(folder / "data.npz")
    scores = outputs(folder / "net.onnx", data["images"])
    top1 = np.mean(scores.argmax(1) == data["labels"])
    best = (-scores).argsort(axis=1, kind="stable")[:, :5]
    top5 = np.mean((best == data["labels"][:, None]).any(axis=1))
    ended = netdecouple("eval", "net.onnx", "--data", "data.npz:images,labels")
    assert ended.code == 0
    assert f"{100 * top1:.1f}%" in ended.out
    assert f"{100 * top5:.1f}%" in ended.out
    same = np.mean(outputs(folder / "other.onnx", data["images"]).argmax(1) == scores.argmax(1))
    ended = netdecouple("eval", "net.onnx", "other.onnx", "--data", "data.npz:images,labels")
    assert ended.code == 0
    assert f"{100 * same:.1f}%" in ended.out
    assert "other.onnx" in ended.out


def test_version_and_help(netdecouple):
    """The version; every command, with an example each."""
    assert netdecouple("--version").out == f"{__version__}\n"
    shown = netdecouple("--help").out
    for command in ("run", "inspect", "apply", "lower", "eval", "bench", "demo"):
        assert command in shown
        assert f"netdecouple {command}" in netdecouple(command, "-h").out


# --- bench


def test_bench_times_and_tells_of_layers(netdecouple, folder: Path):
    """Tables for the reader, the same as JSON, and MACs beside the times."""
    ended = netdecouple(
        *("bench", "net.onnx", "other.onnx", "--threads", "1", "--threads", "2", "--seconds", "0"),
        *("--layers", "--report", "times.json"),
    )
    assert (ended.code, ended.err) == (0, "")
    for part in ("1 thread, input 1×3×8×8", "2 threads", "net.onnx", "MACs", "faster", "conv2", "all nodes"):
        assert part in ended.out
    read = json.loads((folder / "times.json").read_text())
    rows = [(row["model"], row["threads"], row["macs"]) for row in read["models"]]
    macs = total_macs(folder / "net.onnx")
    assert rows == [(name, threads, macs) for threads in (1, 2) for name in ("net.onnx", "other.onnx")]
    assert [times["threads"] for times in read["layers"]] == [1, 2]


def test_bench_says_that_there_is_no_difference(netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Times that go up and down are told; a ratio they do not bear out is not."""
    noise = np.array([[1.0, 2.0], [2.0, 1.0], [1.5, 1.4], [1.4, 1.5]])
    monkeypatch.setattr(
        "netdecouple.runtimes.benchmark.measure", lambda calls, *_, **__: noise[:, : len(calls)]
    )
    out = netdecouple("bench", "net.onnx", "other.onnx").out
    assert "no measurable difference (0.82–1.30)" in out
    monkeypatch.setattr(
        "netdecouple.runtimes.benchmark.measure", lambda calls, *_, **__: np.array([[3.0, 1.5]] * 4)
    )
    assert "2.00× (2.00–2.00)" in netdecouple("bench", "net.onnx", "other.onnx").out


def test_bench_in_another_runtime(netdecouple, folder: Path):
    """Each has a table of its own."""
    installed("openvino")
    out = netdecouple(
        "bench", "net.onnx", "--runtime", "openvino", "--runtime", "onnxruntime", "--seconds", "0"
    ).out
    assert re.search(r"openvino \d+\..*1 thread(.|\n)*onnxruntime \d+\..*1 thread", out)


# --- killed


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run in a process of its own, of a network that takes a while."""
    return subprocess.Popen(
        [sys.executable, "-c", "from netdecouple.cli import main; main()", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def long_run(folder: Path) -> list[str]:
    """Arguments of a run that takes many seconds on any machine, so that a signal finds it at work."""
    b = networks.Builder()
    x = b.conv("image", 3, 64, 3, "first")
    for index in range(40):
        x = b.node("Relu", b.conv(x, 64, 64, 3, f"conv{index}"))
    b.classifier(x, 64)
    onnx.save(b.model(), folder / "net.onnx")
    return RUN


def test_a_killed_run_leaves_no_output(folder: Path, long_run: list[str]):
    """SIGKILL at random moments: neither half a file at the output path nor a changed input."""
    before = (folder / "net.onnx").read_bytes()
    moments = random.Random(0)
    for _ in range(3):
        process = started(folder, *long_run)
        time.sleep(moments.uniform(0.5, 2.0))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "out.onnx").exists()
    assert (folder / "net.onnx").read_bytes() == before
