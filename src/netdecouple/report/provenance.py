"""The origin of a result: versions, machine, inputs and method."""

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
from netdecouple.report.model import Provenance
from netdecouple.version import __version__

ALWAYS = ("numpy", "scipy", "onnx", "onnxruntime")
IF_USED = ("torch", "torchvision", "timm", "openvino")


def provenance(plan: Plan, inputs: Inputs, calibration: str, settings: Settings | None = None) -> Provenance:
    """Record the origin of a run; ``settings`` is None if a saved plan was applied."""
    packages = (*ALWAYS, *(name for name in IF_USED if name in sys.modules))
    return Provenance(
        command="",
        python=platform.python_version(),
        versions=(("netdecouple", __version__), *((name, _version(name)) for name in packages)),
        machine=machine(),
        threads=available(),
        calibration=calibration,
        samples=len(inputs.images),
        held_back=len(inputs.held_out),
        seed=plan.seed,
        method=_method(plan, settings),
        model_hash=plan.model,
        calibration_hash=plan.images,
        plan_hash=hashlib.sha256(plan.to_json().encode()).hexdigest(),
    )


def identity(network: Network, inputs: Inputs, settings: Settings | None, runtime: str) -> dict[str, Any]:
    """Return everything that the intermediate results of a run depend on, as JSON with readable keys.

    Intermediate results can be used again only by a run with the same identity. The budget is not part of
    it, as evaluated candidates serve every budget.
    """
    used = {"netdecouple": __version__} | {name: _version(name) for name in (*ALWAYS, runtime)}
    return {
        "model": network.fingerprint,
        "layers": hashlib.sha256(repr([(la.name, la.reason) for la in network.layers]).encode()).hexdigest(),
        "calibration images": inputs.fingerprint,
        "settings": None if settings is None else asdict(settings) | {"families": settings.methods},
        "versions": used,
        "processor": machine(),
        "threads": available(),
    }


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
