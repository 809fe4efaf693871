"""A saved module is loaded as it was, into a module that was only built; damaged folders are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file  # noqa: E402

import netdecouple  # noqa: E402
from netdecouple.errors import ModelError, OutputError, PlanError  # noqa: E402
from tests.frontends.torch.modules import decoupled, inputs, net  # noqa: E402

DESCRIPTION, WEIGHTS = "netdecouple.json", "model.safetensors"


@pytest.fixture(scope="module")
def module() -> Any:
    return decoupled(net())


@pytest.fixture
def folder(module: Any, tmp_path: Path) -> Path:
    netdecouple.save(module, tmp_path / "saved")
    return tmp_path / "saved"


def output(module: Any) -> Any:
    with torch.no_grad():
        return module(inputs())


@pytest.mark.parametrize("method", ["nd-dp", "nd-pd", "sd", "cd", "cp", "cd+sd+cp+nd-dp"])
def test_comes_back_equal(method: str, tmp_path: Path):
    """Into a module of other weights, whatever was done to its layers; that module stays as it is."""
    module, fresh = decoupled(net(), method), net(seed=7)
    before = copy.deepcopy(fresh.state_dict())
    netdecouple.save(module, tmp_path / "saved")
    found = netdecouple.load(fresh, tmp_path / "saved")
    assert torch.equal(output(found), output(module))
    assert repr(found) == repr(module)
    assert found.decoupling == module.decoupling
    assert all(torch.equal(before[name], value) for name, value in fresh.state_dict().items())


def test_a_single_layer_is_a_module_too(tmp_path: Path):
    """The layer's name is empty then."""
    module = decoupled(torch.nn.Conv2d(3, 16, 3, padding=1))
    netdecouple.save(module, tmp_path / "saved")
    found = netdecouple.load(torch.nn.Conv2d(3, 16, 3, padding=1).eval(), tmp_path / "saved")
    assert torch.equal(output(found), output(module))


def test_writes_every_tensor_once(folder: Path, module: Any):
    """Two files, no pickle; what is tied is named in the description."""
    assert {path.name for path in folder.iterdir()} == {DESCRIPTION, WEIGHTS}
    names = load_file(folder / WEIGHTS).keys()
    assert module.state_dict().keys() - names == {"tied.weight"}
    assert json.loads((folder / DESCRIPTION).read_text())["tied"] == [["tied.weight", "head.weight"]]
    found = netdecouple.load(net(seed=7), folder)
    assert found.head.weight is found.tied.weight


def test_modes_types_and_gradients_are_those_of_the_module_given(folder: Path):
    """As in decoupling itself."""
    fresh = net(seed=7).double().train()
    fresh.conv.requires_grad_(False)
    fresh.grouped.eval()
    found = netdecouple.load(fresh, folder)
    assert {p.dtype for p in found.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in found.conv.parameters())
    assert all(p.requires_grad for p in found.grouped.parameters())
    assert [found.training, found.grouped.training, found.conv[0].training] == [True, False, True]


def test_is_saved_after_training_in_any_type_and_layout(tmp_path: Path):
    """Half precision is kept; channels last is a matter of memory only."""
    module = decoupled(net()).to(memory_format=torch.channels_last).bfloat16()
    netdecouple.save(module, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS)["head.weight"].dtype == torch.bfloat16
    found = netdecouple.load(net(seed=7), tmp_path / "saved")
    assert all(torch.equal(v, module.state_dict()[k].to(v)) for k, v in found.state_dict().items())


def test_reads_shards(folder: Path, module: Any):
    """As the Hugging Face Hub has them."""
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    assert torch.equal(output(netdecouple.load(net(seed=7), folder)), output(module))


def test_the_report_of_another_version_is_left_out(folder: Path):
    """It is to be read by people, and changes; everything else comes back."""
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | {"netdecouple": "0.0.1", "report": {"x": 1}}))
    assert netdecouple.load(net(), folder).decoupling.report is None


def test_replaces_what_it_wrote_before(folder: Path, tmp_path: Path):
    """And leaves nothing else behind."""
    other = decoupled(net(), "cp")
    netdecouple.save(other, folder)
    assert torch.equal(output(netdecouple.load(net(), folder)), output(other))
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["notes.txt", WEIGHTS, "config.json"])
def test_other_files_are_not_touched(module: Any, tmp_path: Path, name: str):
    """Weights without a description were not written by `save`."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files"):
        netdecouple.save(module, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_the_current_folder_is_not_replaced(
    module: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Shells and programs work in it, whatever it holds."""
    (tmp_path / "empty").mkdir()
    for here in (folder, tmp_path / "empty"):
        monkeypatch.chdir(here)
        with pytest.raises(OutputError, match="is the current folder"):
            netdecouple.save(module, ".")


def test_a_failure_leaves_the_old_folder(folder: Path, module: Any, monkeypatch: pytest.MonkeyPatch):
    """Complete, and with no other file next to it."""
    before = (folder / WEIGHTS).read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("netdecouple.frontends.torch.folder.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        netdecouple.save(module, folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert list(folder.parent.iterdir()) == [folder]


def test_places_that_cannot_be_written(module: Any, tmp_path: Path):
    """One line each."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "saved", tmp_path / "missing" / "saved"):
        with pytest.raises(OutputError) as caught:
            netdecouple.save(module, place)
        assert "\n" not in str(caught.value)


def test_a_name_of_another_kind_of_file(module: Any, tmp_path: Path):
    """Whoever writes it expects a file."""
    for name in ("saved.pt", "saved.tflite", "saved.ONNX"):
        with pytest.raises(OutputError, match=rf"leave out \.{name.partition('.')[2]}"):
            netdecouple.save(module, tmp_path / name)


def test_what_was_not_decoupled_is_not_saved(module: Any, tmp_path: Path):
    """Nor what was changed since, nor state that would have to be pickled."""
    with pytest.raises(ModelError, match="not made by netdecouple"):
        netdecouple.save(net(), tmp_path / "saved")
    changed = copy.deepcopy(module)
    changed.conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    with pytest.raises(ModelError, match="'conv' is not what decoupling made"):
        netdecouple.save(changed, tmp_path / "saved")
    more = copy.deepcopy(module)
    more.register_buffer("elsewhere", torch.zeros(2, device="meta"))
    with pytest.raises(ModelError, match="'elsewhere'"):
        netdecouple.save(more, tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / DESCRIPTION).read_text())
        change(data)
        (folder / DESCRIPTION).write_text(json.dumps(data))

    return edit


def with_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no description": (lambda f: (f / DESCRIPTION).unlink(), PlanError, "cannot read"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ModelError, "cannot read the weights"),
    "cut description": (cut(DESCRIPTION), PlanError, "cannot read"),
    "cut weights": (cut(WEIGHTS), ModelError, "cannot read the weights"),
    "not JSON": (lambda f: (f / DESCRIPTION).write_bytes(b"\xff\x00"), PlanError, "cannot read"),
    "deep JSON": (lambda f: (f / DESCRIPTION).write_text("[" * 100_000), PlanError, "cannot read"),
    "other JSON": (lambda f: (f / DESCRIPTION).write_text("[1]"), PlanError, "does not describe"),
    "other weights": (lambda f: (f / WEIGHTS).write_bytes(b"PK" * 99), ModelError, "cannot read the weights"),
    "version": (edited(lambda d: d.update(version=2)), PlanError, "version 2, this netdecouple reads 1"),
    "plan version": (edited(lambda d: d["plan"].update(version=99)), PlanError, "plan version 99"),
    "field": (edited(lambda d: d.update(more=1)), PlanError, "unknown fields"),
    "type": (edited(lambda d: d["changes"][0].update(norm=1)), PlanError, "'norm' must be str"),
    "report": (edited(lambda d: d["report"].update(model=1)), PlanError, "'model' must be str"),
    "changes": (edited(lambda d: d["changes"].pop()), PlanError, "differ"),
    "size": (edited(lambda d: d["plan"]["layers"][0].update(sizes=[10**9])), PlanError, "it can have 1 to"),
    "mode": (edited(lambda d: d["changes"][0]["convolution"].update(mode="x")), PlanError, "not a valid"),
    "kernel": (edited(lambda d: d["changes"][0]["convolution"].update(kernel=[3])), PlanError, "not a valid"),
    "groups": (edited(lambda d: d["changes"][0]["convolution"].update(groups=0)), PlanError, "positive"),
    "norm": (edited(lambda d: d["changes"][0].update(norm="stem.2")), ModelError, "not the BatchNorm"),
    "no tensor": (with_weights(lambda s: s.pop("conv.0.channels")), ModelError, "has no 'conv.0.channels'"),
    "one more": (with_weights(lambda s: s.update(x=torch.ones(1))), ModelError, "has 'x' as well"),
    "channels": (with_weights(lambda s: s["conv.0.channels"].add_(99)), ModelError, "are not there"),
    "whole": (with_weights(lambda s: s.update({"head.bias": torch.ones(5).int()})), ModelError, "whole"),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(folder: Path, damage: Callable[[Path], Any], error: type[Exception], message: str):
    """In one line that says where."""
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        netdecouple.load(net(), folder)
    assert "\n" not in str(caught.value)


def without_layer(module: Any) -> None:
    module.conv = torch.nn.Identity()


def with_other_stride(module: Any) -> None:
    module.conv.stride = (2, 2)


def with_other_padding(module: Any) -> None:
    module.conv.padding = (0, 0)


def with_other_head(module: Any) -> None:
    module.head = torch.nn.Linear(16, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_layer, "'conv' is Identity, not the Conv2d 8→8 3×3"),
        (with_other_stride, "'conv' is Conv2d 8→8 3×3"),
        (with_other_padding, "'conv' is Conv2d 8→8 3×3"),
        (with_other_head, "is of another module"),
        (lambda module: delattr(module, "same"), "has no 'same'"),
    ],
)
def test_another_architecture_is_refused(folder: Path, change: Callable[[Any], None], message: str):
    """By the first layer that differs."""
    other = net()
    change(other)
    with pytest.raises(ModelError, match=message) as caught:
        netdecouple.load(other, folder)
    assert "\n" not in str(caught.value)


def test_other_widths_and_decoupled_modules_are_refused(folder: Path, module: Any):
    """Only the original module can be decoupled again."""
    for other in (net(channels=16), module, torch.nn.ReLU()):
        with pytest.raises(ModelError, match="give the original module"):
            netdecouple.load(other, folder)


class Versioned(torch.nn.Sequential):
    """Asks, as some modules do, which version of it was saved."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        assert metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_may_ask_for_the_version_that_was_saved(tmp_path: Path):
    module = decoupled(Versioned(torch.nn.Conv2d(3, 16, 3, padding=1)))
    netdecouple.save(module, tmp_path / "saved")
    found = netdecouple.load(Versioned(torch.nn.Conv2d(3, 16, 3, padding=1)).eval(), tmp_path / "saved")
    assert torch.equal(output(found), output(module))
