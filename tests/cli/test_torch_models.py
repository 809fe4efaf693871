"""PyTorch models on the command line: built by name, decoupled, written as ONNX, as a folder, or both."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import netdecouple as package  # noqa: E402
from netdecouple import pipeline  # noqa: E402
from netdecouple.runtimes.onnxruntime import open_session, run  # noqa: E402
from netdecouple.version import __version__  # noqa: E402
from tests.conftest import import_torchvision  # noqa: E402

NETS = """
import numpy as np
import torch
from torch import nn


def make():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = make()

    def forward(self, x):
        return self.inside(x) + torch.as_tensor(np.sort(x.numpy()).mean()).float()


def maps():
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3))


def sound():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 12, 5), nn.ReLU(), nn.Conv1d(12, 12, 5), nn.ReLU(), nn.Conv1d(12, 4, 3))


class Pitch(nn.Module):  # rows of numbers, which it sees as one channel
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 9, (9, 1)), nn.ReLU(), nn.Conv2d(9, 9, (9, 1)), nn.ReLU(), nn.Conv2d(9, 4, (9, 1))
        )

    def forward(self, x):
        return self.layers(x.flatten(1)[:, None, :, None]).mean((2, 3))


def pitch():
    torch.manual_seed(0)
    return Pitch()


def broken():
    raise ValueError("no\\nluck")


def three():
    return 3


def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        yield torch.randn(6, 3, 8, 8, generator=generator), torch.zeros(6)


def waves():
    return torch.randn(24, 2, 40, generator=torch.Generator().manual_seed(0))
"""
RUN = ["run", "nets:make", "--macs", "2x", "--families", "nd", "--calib", "data.npz:images"]


@pytest.fixture(autouse=True)
def nets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module nets.py in the folder."""
    monkeypatch.syspath_prepend(folder)
    (folder / "nets.py").write_text(NETS)
    sys.modules.pop("nets", None)
    yield
    sys.modules.pop("nets", None)


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_run_writes_onnx_and_a_folder(netdecouple, folder: Path):
    """Both compute the same, with any batch; the plan is in both; the report names the model."""
    ended = netdecouple(
        *RUN, "-o", "out.onnx", "-o", "out", "--plan-out", "plan.json", "--report", "report.json"
    )
    assert (ended.code, ended.err) == (0, "")
    for part in ("Weights     as the function made them", "Budgets that can be met", "out.onnx (", "out ("):
        assert part in ended.out
    report = json.loads((folder / "report.json").read_text())
    assert report["model"] == "nets:make"
    assert report["macs"] <= report["macs_before"] / 2
    plan = json.loads((folder / "plan.json").read_text())
    assert json.loads(metadata(folder / "out.onnx")["netdecouple.plan"]) == plan
    assert metadata(folder / "out.onnx")["netdecouple.version"] == __version__
    onnx.checker.check_model(onnx.load(folder / "out.onnx"), full_check=True)
    import nets

    loaded = package.load(nets.make().eval(), folder / "out")
    images = np.load("data.npz")["images"]
    for count in (1, 7):
        found = run(open_session(folder / "out.onnx"), None, {"image": images[:count]})[0]
        with torch.no_grad():
            expected = loaded(torch.from_numpy(images[:count])).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_onnx_file_can_be_inspected(netdecouple, folder: Path):
    """What is written is an .onnx model like any other."""
    assert netdecouple(*RUN, "-o", "out.onnx").code == 0
    assert netdecouple("inspect", "out.onnx").code == 0


def test_apply_carries_a_plan_out_again(netdecouple, folder: Path):
    """The same file, byte for byte; other weights are another network."""
    assert netdecouple(*RUN, "-o", "out.onnx", "--plan-out", "plan.json", "--seed", "3").code == 0
    apply = ["apply", "nets:make", "plan.json", "-o", "again.onnx"]
    ended = netdecouple(*apply, "--calib", "data.npz:images")
    assert ended.code == 0, ended
    assert (folder / "again.onnx").read_bytes() == (folder / "out.onnx").read_bytes()
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"seed": 4}))
    assert netdecouple(*apply, "--calib", "data.npz:images").code == 2


def test_inspect_lists_layers(netdecouple):
    """Without calibration images, of the size that is asked for."""
    ended = netdecouple("inspect", "nets:make", "--input-size", "8")
    assert ended.code == 0, ended
    assert "3→12 3×3 @8" in ended.out


@pytest.mark.parametrize("calib", ["images", "nets:batches", "data.npz:images"])
def test_calib_takes_what_it_takes_for_onnx(netdecouple, folder: Path, calib: str):
    """A folder with --input-size, arrays; also a function that makes what a DataLoader makes."""
    ended = netdecouple(*RUN[:-1], calib, "--input-size", "8", "-o", "out")
    assert ended.code == 0, ended
    assert (folder / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(("module", "shape"), [("sound", (2, 40)), ("pitch", (64,)), ("pitch", (8, 8))])
def test_modules_that_take_no_pictures(netdecouple, folder: Path, module: str, shape: tuple[int, ...]):
    """Sounds, in rows or in frames: from a file as from a function, and as from Python, to every command."""
    waves = np.random.default_rng(0).standard_normal((24, *shape)).astype(np.float32)
    np.savez(folder / "data.npz", waves=waves, labels=np.arange(24) % 4)
    np.save(folder / "waves.npy", waves)
    code = "\n\ndef loaded():\n    return np.load('waves.npy')\n"
    (folder / "nets.py").write_text(NETS + code)
    quick = ["--families", "nd", "--macs", "70%"]
    written = []
    for calib in ("data.npz:waves", "waves.npy", "nets:loaded"):
        command = [
            "run",
            f"nets:{module}",
            *quick,
            "-o",
            "out.onnx",
            "--plan-out",
            "p.json",
            "--calib",
            calib,
        ]
        ended = netdecouple(*command)
        assert ended.code == 0, ended
        written.append(onnx.load(folder / "out.onnx"))
    assert written[0] == written[1] == written[2]
    import nets

    settings = package.Settings(families=("nd",))
    found = package.decouple(getattr(nets, module)(), torch.tensor(waves), macs="70%", settings=settings)
    assert found.decoupling.plan.layers == package.Plan.load(folder / "p.json").layers
    if module == "pitch":
        ended = netdecouple("eval", "nets:pitch", "--data", "data.npz:waves,labels")
        assert ended.code == 0, ended
    ended = netdecouple("inspect", f"nets:{module}", "--calib", "waves.npy")
    assert (ended.code, "at most" in ended.out) == (0, True), ended


def test_a_module_of_sounds_takes_no_pictures(netdecouple, folder: Path):
    """The message says what may be given."""
    sound = ["run", "nets:sound", "--macs", "70%", "--families", "nd", "-o", "out.onnx"]
    np.save(folder / "pictures.npy", np.zeros((24, 8, 8, 3), np.uint8))
    ended = netdecouple(*sound, "--calib", "pictures.npy")
    assert (ended.code, "takes no pictures: give floats (N, …)" in ended.err) == (2, True), ended
    for more in (["--calib", "images"], ["--data-free"]):
        ended = netdecouple(*sound, *more)
        assert ended.code == 2
        assert "takes no images; give --calib as FILE.npz:KEY, MODULE:FUNCTION" in ended.err
    ended = netdecouple(*sound, "--calib", "data.npz:images")
    assert (ended.code, "calibration sample" in ended.err) == (2, True), ended


def test_labels_and_data_free(netdecouple):
    """Accuracy before and after; without images, nothing is said of agreement."""
    ended = netdecouple(*RUN, "-o", "out", "--labels", "data.npz:images,labels")
    assert "top-1 on the labelled images" in ended.out
    ended = netdecouple(
        "run", "nets:make", "--data-free", "--input-size", "8", "--method", "nd-dp:T=3", "-o", "out"
    )
    assert ended.code == 0, ended
    assert "Agreement" not in ended.out


def test_weights_from_a_file(netdecouple, folder: Path):
    """Strictly: what is missing is named."""
    import nets

    state = nets.make().state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, "weights.pth")
    ended = netdecouple(*RUN, "-o", "out", "--weights", "weights.pth")
    assert ended.code == 0, ended
    assert "Weights     weights.pth" in ended.out
    torch.save({name: value for name, value in state.items() if name != "3.bias"}, "weights.pth")
    ended = netdecouple(*RUN, "-o", "out", "--weights", "weights.pth")
    assert ended.code == 2
    assert "it has no 3.bias" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nets:broken"], "no luck"),
        (["run", "nets:three"], "must return a torch.nn.Module"),
        (["run", "nets:nothing"], "no such function"),
        (["run", "torchvison:vgg16"], "did you mean torchvision:vgg16?"),
        (["run", "weights.pth"], "holds weights and no network"),
        (["run", "net.onnx", "--weights", "random"], "--weights is for PyTorch models"),
        (["run", "net.onnx", "-o", "two.onnx"], "give -o once"),
        (["run", "nets:make", "--latency", "1000x", "--families", "nd"], "out of reach"),
        (["run", "nets:make", "--runtime", "abacus", "--families", "nd"], "no runtime 'abacus'"),
        (["run", "nets:make", "--emit", "magic"], "--emit magic: give standard or fused"),
        (["run", "nets:make", "--max-drop", "1"], "give one goal"),
        (["run", "nets:make", "--weights", "default"], "no default weights"),
        (["run", "nets:make", "--weights", "none.pth"], "none.pth: no such file"),
        (["run", "nets:make", "-o", "out.pt"], "as .onnx or as a folder"),
        (["run", "nets:make", "-o", "nets.py"], "nets.py: is a file"),
        (["run", "nets:make", "-o", "no/where"], "no/where: cannot write there"),
        (["run", "nets:make", "-o", "images"], "holds other files"),
        (["run", "nets:make", "--method", "nd-dp:T=2"], "or --method"),
        (["run", "nets:make", "--calib", "images"], "give --input-size"),
        (["run", "nets:make", "--calib", "nets:broken"], "no luck"),
        (["run", "nets:Branching"], "differs in ONNX Runtime"),
    ],
)
def test_what_cannot_be_done_takes_one_line(netdecouple, folder: Path, arguments: list[str], message: str):
    """Exit code 2, nothing written."""
    before = set(folder.iterdir())
    budget = (
        [] if "--latency" in arguments else ["--macs", "2x"]
    )  # with both, measured times decide the message
    rest = [*budget, "-o", "out.onnx"]
    calib = [] if "--calib" in arguments else ["--calib", "data.npz:images"]
    ended = netdecouple(*arguments, *rest, *calib)
    assert ended.code == 2, ended
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert {path for path in folder.iterdir() if path.name != "__pycache__"} <= before


def test_what_the_result_could_not_be_is_found_out_before_the_work(
    netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """An .onnx file of what cannot be exported, the accuracy of what is no classifier."""
    planned = [
        "--macs",
        "2x",
        "--families",
        "nd",
        "--data-free",
        "--input-size",
        "8",
        "--plan-out",
        "plan.json",
    ]
    assert netdecouple("run", "nets:Branching", "-o", "out", *planned).code == 0
    for work in ("analyze", "apply"):
        monkeypatch.setattr(pipeline, work, lambda *_, **__: pytest.fail("it worked"))
    data = ["--calib", "data.npz:images", "-o", "out.onnx"]
    ended = netdecouple("apply", "nets:Branching", "plan.json", *data)
    assert (ended.code, "differs in ONNX Runtime" in ended.err) == (2, True), ended
    ended = netdecouple("run", "nets:maps", "--macs", "2x", "--labels", "data.npz:images,labels", *data)
    assert (ended.code, "accuracy needs outputs" in ended.err) == (2, True), ended


def test_folders_of_other_files_are_refused_before_the_work(netdecouple, folder: Path):
    """Also where a network lies among them."""
    (folder / "out").mkdir()
    for name in ("netdecouple.json", "notes.txt"):
        (folder / "out" / name).write_text("mine")
    ended = netdecouple(*RUN, "-o", "out")
    assert (ended.code, ended.out) == (2, "")
    assert "out: holds other files (notes.txt)" in ended.err


def test_a_folder_with_the_weights_is_not_replaced(netdecouple, folder: Path):
    """Though it is one that an earlier run wrote."""
    (folder / "out").mkdir()
    (folder / "out" / "netdecouple.json").touch()
    (folder / "out" / "model.safetensors").touch()
    ended = netdecouple(*RUN, "-o", "out", "--weights", "out/model.safetensors")
    assert ended.code == 2
    assert "error: out/model.safetensors: is an input" in ended.err


def test_the_current_folder_is_no_place_for_a_network(
    netdecouple, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is named as it was given."""
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    ended = netdecouple(*RUN, "-o", ".")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: .: is the current folder; give the name of a new folder\n"


@pytest.fixture
def torchvision() -> SimpleNamespace:
    return import_torchvision()


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_a_library_s_model(netdecouple, folder: Path, torchvision, name: str):
    """Built by name, with any batch."""
    pytest.importorskip(name.partition(":")[0])
    command = ["run", name, "--method", "nd-dp:T=2", "--data-free", "--input-size", "64"]
    ended = netdecouple(*command, "-o", "out.onnx", "--weights", "random")
    assert ended.code == 0, ended
    assert "Weights     random (seed 0)" in ended.out
    assert onnx.load(folder / "out.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_sweep_writes_a_file_per_budget(netdecouple, folder: Path):
    """The same as runs of their own; with accuracy."""
    calib = ["nets:make", "--calib", "data.npz:images", "--families", "nd"]
    labels = ["--labels", "data.npz:images,labels"]
    ended = netdecouple("sweep", *calib, *labels, "--macs", "80%,50%", "-o", "swept", "--json")
    assert ended.code == 0, ended
    points = json.loads(ended.out)["points"]
    assert [point["file"] for point in points] == ["swept/make-macs80.onnx", "swept/make-macs50.onnx"]
    assert all(point["accuracy"] for point in points)
    assert netdecouple("run", *calib, "--macs", "50%", "-o", "one.onnx", "-q").code == 0
    assert (folder / "one.onnx").read_bytes() == (folder / points[1]["file"]).read_bytes()


def test_sweep_compares_folders(netdecouple, folder: Path):
    """The results of earlier runs, on the same inputs."""
    calib = ["nets:make", "--calib", "data.npz:images", "--families", "nd"]
    for share, name in (("80%", "large"), ("50%", "small")):
        assert netdecouple("run", *calib, "--macs", share, "-o", name, "-q").code == 0
    ended = netdecouple("sweep", *calib, "--compare", "large", "small", "--json")
    assert ended.code == 0, ended
    points = [compared["point"] for compared in json.loads(ended.out)["compared"]]
    assert points[1]["macs"] < points[0]["macs"] < points[0]["macs_before"]


def test_budgets_in_time_and_accuracy(netdecouple, folder: Path):
    """As for .onnx files; whether so small a network is any faster by the clock is left to chance."""
    calib = ["run", "nets:make", "--calib", "data.npz:images", "--families", "nd", "-o", "faster"]
    ended = netdecouple(*calib, "--latency", "95%", "--runtime", "torch", "--force")
    assert ended.code == 0 or "out of reach in torch" in ended.err, ended
    labels = ["--labels", "data.npz:images,labels"]
    ended = netdecouple(*calib, "--max-drop", "50", *labels, "--json")
    assert ended.code == 0, ended
    before, after = json.loads(ended.out)["accuracy"]
    assert after >= before - 0.5


def test_models_by_name_are_evaluated(netdecouple, folder: Path):
    ended = netdecouple("eval", "nets:make", "nets:make", "--data", "data.npz:images,labels", "--json")
    assert ended.code == 0, ended
    assert [score["same_class"] for score in json.loads(ended.out)["scores"]] == [None, 1.0]
