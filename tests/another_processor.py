"""Run tests as a lesser processor would.

`python -m tests.another_processor PROCESSOR THREADS [ARGUMENTS OF PYTEST]`

NumPy, OpenBLAS, PyTorch and the fused operator choose their code by what the processor has; here they are
restricted to a processor without AVX-512 (avx2), or without AVX2 as well (baseline). ONNX Runtime chooses
alone, and nothing can restrict it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

OPENBLAS = {"avx2": "Haswell", "baseline": "Nehalem"}
PYTORCH = {"avx2": ("avx2", "AVX2"), "baseline": ("default", "SSE41")}
# first letters of what it does not have; NumPy 2.4 names groups, earlier versions single features
WITHOUT = {"avx2": ("AVX512", "X86_V4"), "baseline": ("AVX", "X86_V", "FMA", "F16C", "XOP")}


def environment(processor: str, threads: str) -> dict[str, str]:
    """Environment variables of a lesser processor; empty where this is none of Intel's kind."""
    simd = np.show_config(mode="dicts")["SIMD Extensions"]
    # NumPy refuses names it does not know and warns of those that the processor does not have
    disabled = [name for name in simd["found"] if name.startswith(WITHOUT[processor])]
    pytorch, onednn = PYTORCH[processor]
    restricted = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(disabled),
        "OPENBLAS_CORETYPE": OPENBLAS[processor],
        "ATEN_CPU_CAPABILITY": pytorch,
        "ONEDNN_MAX_CPU_ISA": onednn,
    }
    is_x86 = any(name.startswith(("SSE", "X86")) for name in simd["baseline"])
    return (restricted if is_x86 else {}) | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}


def main() -> int:
    processor, threads, *arguments = sys.argv[1:]
    command = [sys.executable, "-m", "pytest", "-q", f"--level={processor}", *arguments]
    return subprocess.run(command, env=os.environ | environment(processor, threads), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
