"""Errors of the library name Python arguments; the command line shows its own options instead."""

from __future__ import annotations

import re

_SAME = (
    "calib samples preset input_size mean std labels weights shape trust macs latency max_drop exclude "
    "data_free uniform_rank families loss seed emit runtime threads work memory workers scheduler shards "
    "compare within force custom_ops"
)
FLAGS = {name: f"--{name.replace('_', '-')}" for name in _SAME.split()} | {
    "parameters": "--params",
    "rule": "--method",
    "output": "-o",
    "constants": "--constant",
}
"""The option of each Python argument."""

_ARGUMENT = re.compile(rf"\b({'|'.join(FLAGS)})=(\([^()]*\)|'[^']*'|\"[^\"]*\"|[^\s,;:()]*)")


def with_flags(message: str) -> str:
    """Replace Python arguments by options: macs=0.5 by --macs 0.5, data_free=True by --data-free."""

    def flag(match: re.Match[str]) -> str:
        value = match[2].strip("()'\"").replace(", ", ",").replace("'", "")
        return FLAGS[match[1]] if value in ("", "True") else f"{FLAGS[match[1]]} {value}"

    return _ARGUMENT.sub(flag, message).replace("Plan.to_json", "--plan-out")
