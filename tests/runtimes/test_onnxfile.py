"""A model brings its own weights along, and no other file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from netdecouple.errors import ModelError
from netdecouple.frontends.onnx.model import load, read_model
from netdecouple.runtimes.onnxruntime import OnnxRuntime
from tests import networks

OPENERS: dict[str, Callable[[Path], object]] = {
    "read": load,
    "run": lambda path: OnnxRuntime().open(path, 1),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A model whose weights lie beside it, in a folder with a secret above it."""
    path = tmp_path / "model" / "net.onnx"
    path.parent.mkdir()
    onnx.save(networks.classifier(), path, save_as_external_data=True, location="w", size_threshold=0)
    shutil.copy(path.parent / "w", tmp_path / "secret")
    return path


def edit(path: Path, **entries: str) -> None:
    """Say something else about where the first weights are."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("opener", OPENERS)
def test_weights_beside_the_model_are_read(path: Path, opener: str):
    OPENERS[opener](path)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("location", ["../secret", "{above}/secret", "x/../../secret", "", "w\0", ".."])
def test_weights_elsewhere_are_refused(path: Path, opener: str, location: str):
    """Absolute paths, and those that lead out of the folder; the message names the tensor."""
    edit(path, location=location.format(above=path.parents[1]))
    with pytest.raises(ModelError, match=r"external data of 'conv1\.weight'.* not beside the model"):
        OPENERS[opener](path)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_to_another_place_are_refused(path: Path, opener: str, kind: str):
    """Also by way of a folder."""
    location = {"file": "link", "folder": "linked/secret"}[kind]
    (path.parent / "link").symlink_to("../secret")
    (path.parent / "linked").symlink_to("..")
    edit(path, location=location)
    with pytest.raises(ModelError, match=f"are a link to another place, '{location}'"):
        OPENERS[opener](path)


@pytest.mark.parametrize("opener", OPENERS)
def test_links_within_the_folder_are_followed(path: Path, opener: str):
    """They lead to nothing that the model could not name itself."""
    (path.parent / "link").symlink_to("w")
    edit(path, location="link")
    OPENERS[opener](path)
    if opener == "read":
        assert load(path)[0] == networks.classifier()


@pytest.mark.parametrize("opener", OPENERS)
def test_a_cache_of_links_to_blobs_is_one_place(path: Path, opener: str):
    """As the Hugging Face Hub's is: models and weights are links to files that are named by their hash."""
    repository = path.parents[1] / "repository"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "1a" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("net.onnx", "w"):
        (path.parent / name).rename(blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(f"../../../blobs/hash-of-{name}")
    OPENERS[opener](snapshot / "net.onnx")
    (snapshot / "w").unlink()
    (snapshot / "w").symlink_to(path.parents[1] / "secret")
    with pytest.raises(ModelError, match="are a link to another place, 'w'"):
        OPENERS[opener](snapshot / "net.onnx")


@pytest.mark.parametrize("opener", OPENERS)
def test_a_link_to_a_model_is_not_where_its_weights_are(path: Path, opener: str):
    """The message says what the link leads to."""
    (path.parents[1] / "link.onnx").symlink_to("model/net.onnx")
    with pytest.raises(ModelError, match=rf"there is no 'w'; give {path}"):
        OPENERS[opener](path.parents[1] / "link.onnx")


@pytest.mark.parametrize("opener", OPENERS)
def test_a_folder_of_models_may_be_a_link(path: Path, opener: str):
    """That is the user's own doing."""
    (path.parents[1] / "models").symlink_to("model")
    OPENERS[opener](path.parents[1] / "models" / "net.onnx")


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"offset": "1000000000"}, "beyond the end of 'w'"),
        ({"offset": "-1"}, "beyond the end of 'w'"),
        ({"length": "1000000"}, "beyond the end of 'w'"),
        ({"length": "99999999999999"}, "set NETDECOUPLE_MAX_MODEL_BYTES"),
        ({"offset": "x"}, "described in no way known"),
        ({"location": "gone"}, "there is no 'gone'"),
    ],
)
def test_weights_that_are_not_there_are_refused(path: Path, opener: str, entries: dict, problem: str):
    """Before anything is read."""
    edit(path, **entries)
    with pytest.raises(ModelError, match=problem):
        OPENERS[opener](path)


def test_a_model_in_memory_has_no_folder_to_read_from(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even where its weights would be found."""
    monkeypatch.chdir(path.parent)
    with pytest.raises(ModelError, match="lie in 'w' and are not loaded"):
        read_model(onnx.load(path, load_external_data=False))


def test_names_are_text(path: Path):
    """Bytes that are none would travel as bytes, into every message."""
    content = onnx.load(path).SerializeToString()
    path.write_bytes(content.replace(b"conv1", b"conv\xff"))
    with pytest.raises(ModelError, match="names are no text"):
        load(path)


@pytest.mark.parametrize("opener", OPENERS)
def test_what_its_shapes_say_is_too_large_is_not_begun(tmp_path: Path, opener: str):
    """A few bytes that ask for 40 GB; the layer is named."""
    b = networks.Builder()
    x = b.conv("image", 3, 8, 3, "conv")
    b.node(
        "Add", x, b.node("ConstantOfShape", b.constant("shape", [1, 1, 10**5, 10**5], np.int64), name="large")
    )
    onnx.save(b.model([("conv", None)]), tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"of layer 'large' takes 40,000,000,000 bytes, .*MAX_TENSOR_BYTES"):
        OPENERS[opener](tmp_path / "net.onnx")
