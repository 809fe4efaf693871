"""Is what `--within` promises kept? Networks that were found within a limit, on inputs that took no part.

For every seed other inputs are drawn to calibrate with and to judge by, and the smallest network within the
limit is searched for. "Others" are of the same kind as the calibration inputs: training images of CIFAR-10,
noisy crops. "Test" are images that the network was not trained on, of which it is less sure. Prints a table.

Needs the folder of pretrained networks (NETDECOUPLE_SHARED, or ../shared beside the repository).

    python benchmarks/promise.py --network resnet20 --seeds 10
    python benchmarks/promise.py --keep docs/promise.jsonl          # everything: hours
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import netdecouple
from accuracy import CIFAR10, shared
from fastest import outputs
from netdecouple import Settings
from netdecouple.errors import QualityError
from netdecouple.network import Array
from netdecouple.planning.tolerance import Tolerance
from rows import keep

LIMITS = {"resnet20": "99%", "resnet56": "99%", "vgg16_cifar10": "99%", "dncnn25": "45dB"}
IMAGES = 1000  # to calibrate with, and of every kind to judge by, if there are as many


@dataclass(frozen=True)
class Row:
    network: str
    seed: int
    asked: str
    ratio: float  # times fewer MACs
    measured: float  # on held-out inputs; shares or dB
    expected: float
    others: float
    test: float
    seconds: float


def inputs(folder: Path, name: str, seed: int) -> tuple[Array, Array, Array]:
    """Inputs to calibrate with, others of their kind, and test inputs."""
    rng = np.random.default_rng(seed)
    if name == "dncnn25":
        data = np.load(folder / "data" / "denoise.npz")
        given, test = data["calib"], data["test"]
        tiles = test.reshape(-1, 1, 2, 64, 2, 64).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 1, 64, 64)
        order = rng.permutation(len(given))
        return given[order[:96]], given[order[96:]], tiles
    data = np.load(folder / "data" / "cifar10.npz")
    order = rng.permutation(len(data["calib"]))[: 2 * IMAGES]
    given = CIFAR10(data["calib"][order])
    return given[:IMAGES], given[IMAGES:], CIFAR10(data["test"])


def rows(folder: Path, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Row]:
    for name in names:
        path, limit = folder / "models" / f"{name}.onnx", Tolerance.parse(LIMITS[name])
        for seed in seeds:
            calibration, others, test = inputs(folder, name, seed)
            start = time.perf_counter()
            try:
                result = netdecouple.decouple(
                    path, calibration, macs="least", within=LIMITS[name], settings=Settings(seed=seed)
                )
            except QualityError as error:
                Console().log(f"{name}, seed {seed}: {error}")
                continue
            promise = result.report.promise
            kept = [
                limit.promise(before, outputs(result.model, fresh), lambda before=before: before).measured
                for fresh in (others, test)
                for before in [outputs(path, fresh)]
            ]
            yield Row(
                network=name,
                seed=seed,
                asked=LIMITS[name],
                ratio=result.report.macs_before / result.report.macs,
                measured=promise.measured,
                expected=promise.expected,
                others=kept[0],
                test=kept[1],
                seconds=time.perf_counter() - start,
            )


def table(known: Sequence[Row]) -> Table:
    """A line for every network: ranges over its seeds, and how often the limit was kept."""
    out = Table(title="Networks found within a limit, on inputs that took no part")
    for column in ("network", "limit", "seeds", "MACs", "held out", "others", "kept", "test", "kept", "s"):
        out.add_column(column)
    for name in dict.fromkeys(row.network for row in known):
        of = [row for row in known if row.network == name]
        limit = Tolerance.parse(of[0].asked).limit

        def spread(values: Sequence[float], form: str) -> str:
            return f"{min(values):{form}} – {max(values):{form}}"

        form = ".2%" if of[0].asked.endswith("%") else ".1f"
        columns = [[getattr(row, part) for row in of] for part in ("measured", "others", "test")]
        kept = [f"{sum(value >= limit for value in column)} of {len(of)}" for column in columns]
        out.add_row(
            name,
            of[0].asked,
            str(len(of)),
            spread([row.ratio for row in of], ".2f"),
            spread(columns[0], form),
            spread(columns[1], form),
            kept[1],
            spread(columns[2], form),
            kept[2],
            spread([row.seconds for row in of], ".0f"),
        )
    return out


def main(
    network: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(LIMITS)}")] = None,
    seeds: Annotated[int, typer.Option(help="How many.")] = 10,
    keep_in: Annotated[
        Path | None, typer.Option("--keep", help="Add the rows to this file, as JSON.")
    ] = None,
) -> None:
    """Print the table."""
    console, known = Console(), []
    for row in rows(shared(), network or list(LIMITS), range(seeds)):
        console.log(row)  # long runs are watched
        known.append(row)
        keep(keep_in, row)
    console.print(table(known))


if __name__ == "__main__":
    typer.run(main)
