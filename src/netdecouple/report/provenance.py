"""Where a result comes from: what ran, on which machine, from which inputs."""

from __future__ import annotations

import hashlib
import importlib
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

from netdecouple.execution.machine import machine
from netdecouple.execution.threads import available
from netdecouple.fitting.sampling import Inputs
from netdecouple.network import Network
from netdecouple.planning.plan import Plan
from netdecouple.planning.settings import Settings
from netdecouple.report.report import Provenance
from netdecouple.version import __version__

ALWAYS = ("numpy", "scipy", "onnx", "onnxruntime")
IF_USED = ("torch", "torchvision", "timm", "openvino")


def provenance(plan: Plan, inputs: Inputs, calibration: str, settings: Settings | None = None) -> Provenance:
    """Put together what is known about a run; without ``settings`` a plan was carried out again."""
    return Provenance(
        "",
        platform.python_version(),
        (("netdecouple", __version__), *_versions()),
        machine(),
        available(),
        calibration,
        len(inputs.images),
        len(inputs.held_back),
        plan.seed,
        _method(plan, settings),
        plan.model,
        plan.images,
        hashlib.sha256(plan.to_json().encode()).hexdigest(),
    )


def identity(network: Network, inputs: Inputs, settings: Settings | None, door: str) -> dict[str, Any]:
    """All that the numbers a run finds depend on, as JSON, by names that people understand.

    Budgets are not among it: what is found for one is of use to another.
    """
    used = {"netdecouple": __version__} | {name: _version(name) for name in (*ALWAYS, door)}
    return {
        "model": network.fingerprint,
        "layers": hashlib.sha256(repr([(la.name, la.reason) for la in network.layers]).encode()).hexdigest(),
        "calibration images": inputs.fingerprint,
        "settings": None if settings is None else asdict(settings) | {"families": settings.methods},
        "versions": used,
        "processor": machine(),
        "threads": available(),
    }


def _versions() -> list[tuple[str, str]]:
    used = [*ALWAYS, *(name for name in IF_USED if name in sys.modules)]
    return [(name, _version(name)) for name in used]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # installed under another name, like onnxruntime-gpu
        return str(importlib.import_module(name).__version__)


def _method(plan: Plan, settings: Settings | None) -> str:
    parts = ["from the weights alone" if plan.data_free else "fitted to the inputs"]
    parts.append("one rank per layer" if plan.uniform_rank else "ranks per channel")
    if settings is None:
        parts.append("a saved plan")
    elif settings.rule is not None:
        parts.append(f"one rule: {settings.rule}")
    else:
        parts.append(f"families {', '.join(settings.families)}")
        if settings.exclude:
            parts.append(f"excluded {', '.join(settings.exclude)}")
    return "; ".join(parts)
