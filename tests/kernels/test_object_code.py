"""What compilers make of the inner loops: sums must stay in registers, on every level."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.test_fused import SOURCES, X86, levels

LEVELS = dict(levels("x86_64"))
OPTIONS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
COMPILERS = ("g++", "clang++")
TOO_FEW = ("clang++", "baseline")  # registers without FMA: it keeps one of twelve sums on the stack
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
MULTIPLY = re.compile(r"v?(fn?madd|mulps)")
VECTOR = re.compile(r"[xyz]mm\d")
STACK = re.compile(r"\(%r[sb]p\b")

Instruction = tuple[int, str, str]  # address, name, operands


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The functions of a disassembly by objdump, and their instructions."""
    name, found = "", []
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            yield name, found
            name, found = match[1], []
        elif match := LINE.match(line):
            found.append((int(match[1], 16), match[2], match[3]))
    yield name, found


def innermost_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a conditional jump backwards and its target, if there is no such jump in between.

    Code that is rarely needed stands behind the rest, and jumps back unconditionally.
    """
    spans = []
    for address, name, operands in instructions:
        target = re.match(r"([0-9a-f]+)\b", operands) if re.match("j(?!mp)", name) else None
        if target and instructions[0][0] <= int(target[1], 16) <= address:
            spans.append((int(target[1], 16), address))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[i for i in instructions if low <= i[0] <= high] for low, high in inner]


def spills(loop: list[Instruction]) -> list[str]:
    """The instructions that move vectors to or from the stack."""
    return [
        f"{name} {operands}"
        for _, name, operands in loop
        if VECTOR.search(operands) and STACK.search(operands)
    ]


def test_a_spill_is_found() -> None:
    """In the innermost loop, and nowhere else."""
    listing = """
0000000000000000 <product>:
   0:\tvmovaps %ymm0,(%rsp)
   4:\tvfmadd231ps %ymm1,%ymm2,%ymm3
   8:\tvmovaps 0x20(%rsp),%ymm4
   c:\tjne    4 <product+0x4>
  10:\tjne    0 <product>
"""
    (_, _), (name, instructions) = functions(listing)
    assert name == "product"
    (loop,) = innermost_loops(instructions)
    assert spills(loop) == ["vmovaps 0x20(%rsp),%ymm4"]


@pytest.mark.slow
@pytest.mark.skipif(not X86 or shutil.which("objdump") is None, reason="reads x86-64 code with objdump")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_sums_stay_in_registers(compiler: str, level: str, tmp_path: Path) -> None:
    """In the loops that multiply: a sum on the stack takes three times as long."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    target = tmp_path / "level.o"
    command = [compiler, *OPTIONS, *LEVELS[level], "-c", str(SOURCES / "level.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C"})
    dump = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", str(target)]
    listing = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    checked, found = 0, []
    for name, instructions in functions(listing):
        if not re.search(r"\b(product|filter)<", name):
            continue
        for loop in innermost_loops(instructions):
            if any(MULTIPLY.match(i[1]) for i in loop):
                checked += 1
                found += [f"{name}: {line}" for line in spills(loop)]
    assert checked >= 3 + 14 + 4  # every width of both
    assert all("product<3>" in line for line in found) if (compiler, level) == TOO_FEW else not found
