"""Options that several commands share: a dataclass per group, expanded into a command's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from netdecouple.data.preprocessing import PRESETS, Preprocessing
from netdecouple.errors import CalibrationError
from netdecouple.execution import executors
from netdecouple.execution.run import Resources
from netdecouple.families.base import groups
from netdecouple.families.chain import methods
from netdecouple.goal import FORMS
from netdecouple.planning.candidates import Rule, parse_families
from netdecouple.planning.divergence import Loss
from netdecouple.planning.settings import EffortName, Settings
from netdecouple.runtimes import NAMES


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's parameters that are option groups by the fields of their dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    option_groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in option_groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        kinds = get_type_hints(option_groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, parameter.kind, default=f.default, annotation=kinds[f.name])
            for f in fields(option_groups[name])
        ]

    @wraps(command)
    def run(**given: Any) -> None:
        for name, kind in option_groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def among(words: Sequence[str]) -> Callable[[str], list[str]]:
    """Complete one of some words for the shell."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def complete_families(incomplete: str) -> list[str]:
    """Complete the last of several families or methods with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    words = dict.fromkeys(("all", "paper", *groups(), *methods(["all"])))
    return [before + comma + word for word in words if word.startswith(last)]


def option(help: str, *names: str, **more: Any) -> Any:
    """An option whose default needs no mention in the help."""
    return typer.Option(*names, help=help, show_default=False, **more)


Model = Annotated[
    Path,
    typer.Argument(
        help="The network: an .onnx file, torchvision:NAME, timm:NAME, or MODULE:FUNCTION that makes a "
        "PyTorch module.",
        show_default=False,
    ),
]
OnnxModel = Annotated[Path, typer.Argument(help="The network, an .onnx file.", show_default=False)]
Weights = Annotated[
    str | None,
    option(
        "Of a PyTorch model: default (what its library downloads), random, or FILE.safetensors, .pt, .pth."
    ),
]
Output = Annotated[Path, option("Where to write the new .onnx file.", "-o", "--output")]
Outputs = Annotated[
    list[Path],
    option(
        "Where to write the new network: an .onnx file; of a PyTorch model also a folder, or both.",
        "-o",
        "--output",
    ),
]
Reports = Annotated[
    list[Path] | None,
    option(
        "Write the report here: as a page (.html; both networks are timed for it) or as data (.json). "
        "Repeatable."
    ),
]
Labels = Annotated[str | None, typer.Option(help="Labelled images, FILE.npz:IMAGES,LABELS.")]
Emit = Annotated[
    str,
    typer.Option(
        help="Operators to write: standard, or fused (faster; ONNX Runtime with netdecouple).",
        autocompletion=among(tuple(FORMS)),
    ),
]
BestEmit = Annotated[
    str | None,
    option(
        "Operators to write: standard, or fused (faster; ONNX Runtime with netdecouple). Default: standard; "
        "without a budget fused, where it can be had.",
        autocompletion=among(tuple(FORMS)),
    ),
]
Runtime = Annotated[
    str | None,
    option(
        "Choose by measuring in this runtime how layers are written: onnxruntime or openvino; of "
        "PyTorch models also torch or torch.compile.",
        autocompletion=among(NAMES),
    ),
]

Constants = Annotated[
    list[str] | None,
    option("Value of an input besides the images, the same for all: NAME=1.5 or NAME=480,640. Repeatable."),
]
CustomOps = Annotated[
    list[Path] | None, option("Library of operators that the model uses, for ONNX Runtime. Repeatable.")
]
InputSize = Annotated[str | None, option("Height and width: 224 or 480x640, where the model leaves it open.")]


@dataclass(frozen=True)
class Opening:
    """How a network is opened."""

    weights: Weights = None
    constant: Constants = None

    custom_ops: CustomOps = None

    def arguments(self) -> dict[str, Any]:
        """The same as `api.open_model` takes it."""
        constants, custom_ops = parse_constants(self.constant), self.custom_ops or ()
        return {"weights": self.weights, "constants": constants, "custom_ops": custom_ops}

    def only_for(self, is_torch: bool) -> Opening:
        """Leave out what is for the other kind of networks."""
        return Opening(self.weights) if is_torch else replace(self, weights=None)


def parse_constants(texts: Sequence[str] | None) -> dict[str, list[float]]:
    """Read values of inputs, NAME=1.5 or NAME=480,640."""
    return dict(map(_constant, texts or ()))


def _constant(text: str) -> tuple[str, list[float]]:
    name, _, numbers = text.rpartition("=")
    if not name:
        raise CalibrationError(f"constants={text!r}: write NAME=1.5 or NAME=480,640")
    return name, list(_floats(numbers, "constants"))


@dataclass(frozen=True)
class Pictures:
    """How pictures become network inputs."""

    preset: Annotated[
        str | None,
        option(
            "Preprocessing of images: imagenet, cifar10, or none (scale to 0..1); default what the "
            "weights of a PyTorch model say, else none.",
            autocompletion=among(list(PRESETS)),
        ),
    ] = None
    input_size: InputSize = None
    mean: Annotated[str | None, option("Mean per channel, of values in 0..1: 0.485,0.456,0.406.")] = None
    std: Annotated[str | None, option("Standard deviation per channel: 0.229,0.224,0.225.")] = None

    def preprocessing(self, default: Preprocessing = Preprocessing()) -> Preprocessing:
        """Combine the options; what they leave open is as in ``default``."""
        chosen = default if self.preset is None else Preprocessing.preset(self.preset)
        if self.mean is not None:
            chosen = replace(chosen, mean=_floats(self.mean, "mean"))
        if self.std is not None:
            chosen = replace(chosen, std=_floats(self.std, "std"))
        return chosen if self.input_size is None else chosen.resized_for(parse_size(self.input_size))


def parse_size(text: str) -> tuple[int, int]:
    """Read a height and width, 224 or 480x640."""
    try:
        numbers = [int(n) for n in text.lower().replace(",", "x").split("x")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2 or min(numbers) < 1:
        raise CalibrationError(f"input_size={text!r}: write 224 or 480x640")
    return numbers[0], numbers[-1]


def _floats(text: str, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(t) for t in text.replace(",", " ").split())
    except ValueError as error:
        raise CalibrationError(f"{name}={text!r}: write numbers separated by commas") from error


Calib = Annotated[
    str | None, option("Unlabelled inputs: a folder of images, FILE.npy, FILE.npz:KEY, or MODULE:FUNCTION.")
]
Samples = Annotated[int, typer.Option(min=10, help="Calibration images to take at most.")]


@dataclass(frozen=True)
class Fitting:
    """How a network is planned and fitted, whatever the goal."""

    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Layer to leave alone: a name as it is printed, or a glob. Repeatable."),
    ] = None
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Fit from the weights alone, as the paper does.")
    ] = False
    uniform_rank: Annotated[
        bool,
        typer.Option(
            "--uniform-rank", help="One rank per layer; with --data-free one for all, as the paper does."
        ),
    ] = False
    families: Annotated[
        str,
        typer.Option(
            help=f"What may be done to a layer: {', '.join(groups())} and all their combinations; paper; "
            "all; or methods in full, like nd-dp,sd+nd-dp.",
            autocompletion=complete_families,
        ),
    ] = "all"
    loss: Annotated[
        Loss | None,
        option(
            "How outputs are compared: kl (a classifier's scores), boxes (a detector's) or relative "
            "(numbers). Default: what fits the outputs."
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0
    effort: Annotated[
        EffortName, typer.Option(help="How many plans are tried: low (one), normal, or high (many).")
    ] = "normal"

    def settings(self, rule: Rule | None = None) -> Settings:
        """The same as the library takes it."""
        return Settings(
            exclude=tuple(self.exclude or ()),
            data_free=self.data_free,
            uniform_rank=self.uniform_rank,
            seed=self.seed,
            families=parse_families(self.families),
            rule=rule,
            loss=self.loss,
            effort=self.effort,
        )


@dataclass(frozen=True)
class Memory:
    """What a run may use, in this process."""

    work: Annotated[
        Path | None,
        option("Folder to keep intermediate results in: an ended run, started again with it, goes on."),
    ] = None
    memory: Annotated[
        str | None,
        option(
            "Memory to do with, like 4GB: layers are taken in smaller groups; those too wide for it are "
            "fitted from their weights alone."
        ),
    ] = None

    def resources(self) -> Resources:
        """The same as the library takes it."""
        return Resources(work=self.work, memory=self.memory)


@dataclass(frozen=True)
class Execution(Memory):
    """What a run may use, with workers."""

    workers: Annotated[int | None, option(min=1, help="Processes on this machine to share the work.")] = None
    scheduler: Annotated[str | None, option("Dask cluster to share the work: tcp://HOST:8786.")] = None
    shards: Annotated[
        int | None,
        option(
            min=1,
            help="Parts to cut the inputs into for workers; the same parts give the same result. Default 8.",
        ),
    ] = None

    @contextmanager
    def opened(self) -> Iterator[Resources]:
        """Start the workers, if there are any, and end them afterwards."""
        with executors.opened(self.workers, self.scheduler) as workers:
            yield replace(self.resources(), shards=self.shards, workers=workers)
