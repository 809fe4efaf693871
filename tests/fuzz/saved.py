"""Hostile plans, and hostile folders of saved PyTorch modules."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import netdecouple
from tests import networks
from tests.fuzz.case import Case
from tests.fuzz.mutations import INTEGERS, TEXTS, changed_json, choice, damaged
from tests.fuzz.samples import npy

DESCRIPTION, WEIGHTS, SHARDS = (
    "saved/netdecouple.json",
    "saved/model.safetensors",
    "saved/model.safetensors.index.json",
)


def case(rng: np.random.Generator) -> Case:
    """A hostile plan or folder, and what reads it."""
    return _plan(rng) if rng.random() < 0.5 else _folder(rng)


def _plan(rng: np.random.Generator) -> Case:
    files = dict(_planned()[choice(rng, _planned())])
    command = ["apply", "net.onnx", "plan.json", "-o", "out.onnx"]
    if "images.npy" in files:
        command += ["--calib", "images.npy"]
    files["plan.json"] = _changed(rng, files["plan.json"])
    if rng.random() < 0.05:
        del files["plan.json"]
        return Case(
            tuple(command), files, links={"plan.json": choice(rng, ("/dev/zero", "plan.json", "../secret"))}
        )
    return Case(tuple(command), files)


def _changed(rng: np.random.Generator, text: bytes) -> bytes:
    if rng.random() < 0.2:
        return damaged(rng, text)
    data = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        data = changed_json(rng, data)
    changed = json.dumps(data).encode()
    if rng.random() < 0.03:
        return choice(
            rng, (b"[" * 10**6, b'{"a":' * 10**5, b" " * 3 * 10**6, b"9" * 10**6, changed + changed)
        )
    return changed


@functools.cache
def _planned() -> dict[str, dict[str, bytes]]:
    """Plans that are as they should be, with the model and the inputs that they are for."""
    images = networks.images_for(networks.classifier(), 12)
    made = {}
    for name, options in {
        "nd": {"families": ("nd-dp",)},
        "all": {"families": ("sd+nd-pd", "cd", "cp+nd-dp")},
        "free": {"data_free": True},
    }.items():
        settings = netdecouple.Settings(**options)
        result = netdecouple.decouple(networks.classifier(), images, macs=0.5, settings=settings)
        made[name] = {
            "net.onnx": networks.classifier().SerializeToString(),
            "images.npy": npy(images),
            "plan.json": result.plan.to_json().encode(),
        }
    return made


def _folder(rng: np.random.Generator) -> Case:
    files = dict(_saved()[choice(rng, _saved())])
    links = {}
    match int(rng.integers(4)):
        case 0:
            files[DESCRIPTION] = _changed(rng, files[DESCRIPTION])
        case 1:
            files[WEIGHTS] = _changed_tensors(rng, files[WEIGHTS])
        case 2:
            content = files.pop(WEIGHTS)
            files["saved/one.safetensors"] = content
            names: Any = {
                "a": choice(rng, ("one.safetensors", "../../secret", "/etc/passwd", 3, None, "", ".", "gone"))
            }
            index: Any = {
                "weight_map": choice(
                    rng, (names, names, [], None, {"a": {}}, names | {"b": "netdecouple.json"})
                )
            }
            files[SHARDS] = json.dumps(choice(rng, (index, index, index["weight_map"]))).encode()
        case _:
            name = choice(rng, (DESCRIPTION, WEIGHTS))
            if rng.random() < 0.5:
                del files[name]
                links[name] = choice(rng, ("../../secret", "/dev/zero", "/etc/passwd", "saved", ".."))
            else:
                files[name] = damaged(rng, files[name])
    return Case(("load-folder",), files, links)


def _changed_tensors(rng: np.random.Generator, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(int(rng.integers(1, 4))):
        header = changed_json(rng, header)
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.8 else int(abs(choice(rng, INTEGERS)))
    weights = content[8 + len(text) :] if rng.random() < 0.9 else b""
    if rng.random() < 0.1:
        text = choice(rng, TEXTS).encode()
    return struct.pack("<Q", length) + text + weights


@functools.cache
def _saved() -> dict[str, dict[str, bytes]]:
    """Folders that are as they should be."""
    from tests.frontends.torch.modules import decoupled, net

    made = {}
    for method in ("nd-dp", "sd+cp"):
        with tempfile.TemporaryDirectory() as folder:
            netdecouple.save(decoupled(net(), method), Path(folder) / "saved")
            paths = sorted((Path(folder) / "saved").iterdir())
            made[method] = {f"saved/{path.name}": path.read_bytes() for path in paths}
    return made
