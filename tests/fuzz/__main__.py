"""Run a fuzzer for a time: python -m tests.fuzz onnx --seconds 1800 --seed 1 --keep FOLDER."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz import FUZZERS, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("fuzzer", choices=FUZZERS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the processor's time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--keep", type=Path, help="write what fails into this folder")
    given = parser.parse_args()
    count, seconds, findings = fuzz(given.fuzzer, given.seconds, given.seed, given.first, given.keep)
    print(f"{given.fuzzer}, seed {given.seed}: {count} cases, {seconds:.0f} s, {len(findings)} found")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
