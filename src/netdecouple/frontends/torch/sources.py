"""PyTorch models by name: torchvision:NAME, timm:NAME, or MODULE:FUNCTION that builds one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from netdecouple.data import calibration
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.errors import CalibrationError, ModelError, UnavailableError, first_line
from netdecouple.frontends.torch.source import TorchSource

INSTEAD = "give weights= a .safetensors, .pt or .pth file, or weights='random' to try things"
CHANGED_INPUTS = ("googlenet", "inception_v3")  # whose weights need ``transform_input``


def build(source: str, weights: str | None = None, seed: int = 0, **options: Any) -> TorchSource:
    """Build a model, in evaluation mode; the last ``options`` are `TorchSource`'s.

    ``weights`` are "default", downloaded by the library; "random", drawn from ``seed``; or a file. None is
    "default" for a library's model, and what its function makes for any other.

    Raises:
        UnavailableError: the library is not installed, or cannot be imported.
        ModelError: there is no such model, or its weights cannot be read or are another network's.
    """
    library, _, name = source.partition(":")
    make = {"torchvision": _torchvision, "timm": _timm}.get(library)
    pretrained = make is not None and weights in (None, "default")
    if make is None and weights == "default":
        raise ModelError(f"{source} has no default weights; leave out weights=, or give a file")
    files = [] if weights in (None, "default", "random") else [Path(str(weights))]
    state = _read_weights(files[0]) if files else {}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module, preprocessing, origin = make(name, pretrained) if make else _function(source)
    if state:
        _fill(module, state, str(weights))
        origin = str(weights)
    elif make and not pretrained:
        origin = f"random (seed {seed})"
    options |= {"preprocessing": preprocessing, "files": [*calibration.files_of(source), *files]}
    return TorchSource(module.eval(), name=source, weights=origin, **options)


Built = tuple[nn.Module, Preprocessing, str]  # with the origin of the weights


def _torchvision(name: str, pretrained: bool) -> Built:
    models = _imported("torchvision").models
    _check_name("torchvision", name.lower(), models.list_models(), "models.list_models()")
    builder = models.get_model_builder(name)
    weights = models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {"weights": weights if pretrained else None}
    if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # they would be downloaded
    if not pretrained and name.lower() in CHANGED_INPUTS:
        options |= {"transform_input": True, "init_weights": False}
    module = _built(f"torchvision:{name}", pretrained, lambda: models.get_model(name, **options))
    transforms = weights.transforms()
    size, resize = (list(getattr(transforms, key, None) or ()) for key in ("crop_size", "resize_size"))
    preprocessing = Preprocessing(
        size=(size[0], size[-1]) if size else None,
        mean=tuple(getattr(transforms, "mean", None) or (0.0,)),
        std=tuple(getattr(transforms, "std", None) or (1.0,)),
        resize=resize[0] if size and len(resize) == 1 else None,
    )
    return module, preprocessing, f"{weights} from {weights.url}"


def _timm(name: str, pretrained: bool) -> Built:
    timm = _imported("timm")
    if ":" not in name and not timm.is_model(name):
        _check_name("timm", name, timm.list_models(), "list_models()")
    module = _built(f"timm:{name}", pretrained, lambda: timm.create_model(name, pretrained=pretrained))
    config = timm.data.resolve_model_data_config(module)
    size = tuple(config["input_size"][1:])
    # the shorter side before a centre crop; other ways to crop keep no ratio
    resize = math.floor(min(size) / config["crop_pct"]) if config["crop_mode"] == "center" else None
    cfg = module.pretrained_cfg
    origin = f"{cfg.get('architecture')}.{cfg.get('tag')} from {cfg.get('hf_hub_id') or cfg.get('url')}"
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return module, Preprocessing(size=size, mean=mean, std=std, resize=resize), origin


def _function(source: str) -> Built:
    try:
        module = calibration.call(source)
    except CalibrationError as error:
        close = difflib.get_close_matches(source.partition(":")[0], ("torchvision", "timm"), 1)
        hint = f"; did you mean {close[0]}:{source.partition(':')[2]}?" if close else ""
        raise ModelError(f"{source}: {error}{hint}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source}: returned a {type(module).__name__}; it must return a torch.nn.Module")
    return module, Preprocessing(), "as the function made them"


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UnavailableError(f"{library} cannot be imported ({error}); pip install {library}") from error
    except Exception as error:  # its compiled part asks for another PyTorch
        raise UnavailableError(
            f"{library} cannot be imported ({type(error).__name__}: {first_line(error)}); "
            f"install the torchvision that belongs to torch {torch.__version__}"
        ) from error


def _check_name(library: str, name: str, names: Iterable[str], listing: str) -> None:
    names = list(names)
    if name in names:
        return
    close = difflib.get_close_matches(name, names, 3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelError(
        f"{library} has no model {name!r}; {hint}"
        f'All: python -c "import {library}; print(*{library}.{listing})"'
    )


def _built(source: str, pretrained: bool, make: Callable[[], nn.Module]) -> nn.Module:
    """Build a library's model; downloads may raise errors of any type."""
    try:
        return make()
    except (Exception, SystemExit) as error:
        problem = "its pretrained weights cannot be downloaded" if pretrained else "cannot be built"
        hint = INSTEAD if pretrained else "choose another model"
        raise ModelError(
            f"{source}: {problem} ({type(error).__name__}: {first_line(error)}); {hint}"
        ) from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise ModelError(
            f"weights={path}: no such file; give a .safetensors, .pt or .pth file, 'default' or 'random'"
        )
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type, when a file is damaged
        raise ModelError(
            f"weights={path}: cannot read it ({first_line(error)}); save the module's state_dict() alone"
        ) from error
    while isinstance(state, Mapping):
        inner = [state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"weights={path}: holds no state_dict; save the module's state_dict() alone")
    wrapped = all(str(name).startswith("module.") for name in state)  # by DataParallel
    return {str(name).removeprefix("module.") if wrapped else str(name): v for name, v in state.items()}


def _fill(module: nn.Module, state: dict[str, Any], origin: str) -> None:
    expected = module.state_dict()
    differences = [
        f"{name} is {_shape(value)}, not {_shape(expected[name])}"
        for name, value in state.items()
        if name in expected and _shape(value) != _shape(expected[name])
    ]
    if not differences:
        try:
            keys = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ModelError(f"weights={origin}: {first_line(error)}") from error
        differences = [f"it has no {name}" for name in keys.missing_keys]
        differences += [f"it has {name} as well" for name in keys.unexpected_keys]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ModelError(
            f"weights={origin}: of another network: {', '.join(differences[:3])}{more}; "
            "name the one it is of, or give MODULE:FUNCTION that builds it"
        )


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
