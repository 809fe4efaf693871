"""Hostile and broken input, made from a seed: every case is refused in one line, or comes out right."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import numpy as np

from tests.fuzz.case import Case
from tests.fuzz.harness import Finding, Worker

FUZZERS = {"onnx": "models", "samples": "samples", "saved": "saved"}
CORPUS = Path(__file__).parent / "corpus"


def make(fuzzer: str, seed: int, number: int) -> Case:
    """The case of this number; the same every time."""
    case: Case = importlib.import_module(f"tests.fuzz.{FUZZERS[fuzzer]}").case(
        np.random.default_rng([seed, number])
    )
    return case


def fuzz(
    fuzzer: str, seconds: float, seed: int, first: int = 0, keep: Path | None = None
) -> tuple[int, float, list[Finding]]:
    """Run cases for a while; return how many, the processor's time they took, and what was found."""
    findings = []
    number = first
    with Worker() as worker:
        while worker.seconds < seconds:
            case = make(fuzzer, seed, number)
            problem = worker.run(case)
            if problem:
                findings.append(Finding(case, problem))
                print(f"--- {fuzzer} {seed} {number}: {' '.join(case.command)}\n{problem}", flush=True)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    name = hashlib.sha256(case.to_json().encode()).hexdigest()[:8]
                    (keep / f"{fuzzer}-{name}.json").write_text(case.to_json() + "\n")
            number += 1
        return number - first, worker.seconds, findings
