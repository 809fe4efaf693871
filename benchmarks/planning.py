"""What plans are made for, and what that is worth: predicted, tried and measured divergence. Prints a table.

For every network, plans for each objective are tried and then fitted as `netdecouple.decouple` does; one more
is fitted with all inputs counting alike, however unusual they are. At a smaller budget follows the network
that `netdecouple.decouple` returns, without and with some minutes of training (`refine=`). "fresh" inputs
took no part: test images.

Needs the folder of pretrained networks (NETDECOUPLE_SHARED, or ../shared beside the repository).

    python benchmarks/planning.py                       # everything, about an hour on one core
    python benchmarks/planning.py --network dncnn25
    python benchmarks/planning.py --keep docs/planning.jsonl
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
from netdecouple import Settings
from netdecouple.data.calibration import load
from netdecouple.fitting.apply import Applied, apply
from netdecouple.fitting.sampling import Inputs
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.network import Array
from netdecouple.pipeline import accuracy
from netdecouple.planning.analysis import Analysis, Objective, analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.divergence import divergence
from netdecouple.planning.planner import make_plan
from netdecouple.planning.tolerance import mean_psnr
from netdecouple.search import LEAST, OBJECTIVES, TRIAL
from rows import keep

RATIOS = {"dncnn25": 2.0, "resnet20": 3.3, "resnet56": 3.7}
TRAINED = {"dncnn25": 2.5, "resnet20": 4.0, "resnet56": 4.5}  # ratios for the training
MINUTES = 5.0


@dataclass(frozen=True)
class Row:
    network: str
    ratio: float
    objective: str
    summed: float  # the layers' predicted losses
    trial: float | None
    held_out: float
    fresh: float
    before: float  # top-1 in percent, or PSNR in dB
    after: float
    seconds: float  # of the trial and the fit


def words(objective: Objective) -> str:
    """Describe what is minimised."""
    terms = "√loss" if objective.exponent == 0.5 else "loss"
    late = f", the last layer counts {np.exp(objective.depth):.2g} times" if objective.depth else ""
    return f"sum of {terms}{late}"


def opened(folder: Path, name: str) -> tuple[OnnxNetwork, Inputs, Array, Array]:
    """A network, its calibration inputs, fresh inputs, and their labels or clean images."""
    model = read_model(folder / "models" / f"{name}.onnx")
    if name == "dncnn25":
        data = np.load(folder / "data" / "denoise.npz")
        images, fresh, right = data["calib"], data["test"], data["test_targets"] / np.float32(255)
    else:
        data = np.load(folder / "data" / "cifar10.npz")
        source = f"{folder / 'data' / 'cifar10.npz'}:calib"
        images = load(source, channels=3, size=model.size, preprocessing=CIFAR10, samples=1000, seed=0).images
        fresh, right = CIFAR10(data["test"]), data["test_labels"]
    return OnnxNetwork(model, images), Inputs.split(images, 0), fresh, right


def rows(folder: Path, names: Sequence[str], is_trained: bool) -> Iterator[Row]:
    """Fit every network's plans, and train one; the latter alone if ``is_trained``."""
    for name in names:
        network, inputs, fresh, right = opened(folder, name)
        if not is_trained:
            yield from of_objectives(name, network, inputs, fresh, right)
        yield from of_training(name, network, inputs, fresh, right)


def of_objectives(
    name: str, network: OnnxNetwork, inputs: Inputs, fresh: Array, right: Array
) -> Iterator[Row]:
    """Fit the plan for every objective, the one without weights for unusual inputs first."""
    settings = Settings()
    weighted = inputs.with_scales(network, settings.seed)
    yield fitted(name, analyze(network, inputs, settings), Objective(), fresh, right, "inputs count alike")
    analysis = analyze(network, weighted, settings)
    for objective in OBJECTIVES:
        yield fitted(name, analysis, objective, fresh, right)


def of_training(name: str, network: OnnxNetwork, inputs: Inputs, fresh: Array, right: Array) -> Iterator[Row]:
    """Decouple a network without and with training."""
    proto, before = network.model.proto, network.run(fresh)
    for minutes in (None, MINUTES):
        start = time.perf_counter()
        result = netdecouple.decouple(proto, inputs.images, macs=f"{TRAINED[name]}x", refine=minutes)
        seconds = time.perf_counter() - start
        after, quality_of = network.run_built(result.model, fresh), result.report.agreement
        yield Row(
            network=name,
            ratio=result.plan.before.macs / result.plan.after.macs,
            objective="the best in its trial" + (f", {minutes:g} min of training" if minutes else ""),
            summed=sum(row.predicted_loss for row in result.plan.layers),
            trial=result.plan.trial_loss,
            held_out=quality_of.divergence,
            fresh=divergence(before, after, quality_of.loss),
            before=quality(before[0], right),
            after=quality(after[0], right),
            seconds=seconds,
        )


def fitted(
    name: str, analysis: Analysis, objective: Objective, fresh: Array, right: Array, note: str = ""
) -> Row:
    """Try and fit the plan for one objective."""
    network, inputs, ratio = analysis.network, analysis.inputs, RATIOS[name]
    start = time.perf_counter()
    plan = make_plan(analysis.with_objective(objective), [Budget(Macs(), 1 / ratio)])
    trial = None if note else apply(network, inputs.part(TRIAL, LEAST), plan, is_trial=True)
    applied = apply(network, inputs, plan)
    seconds = time.perf_counter() - start
    original = network.run(inputs.held_out)

    def loss(of: Applied) -> float:
        return divergence(original, network.run(inputs.held_out, of.kernels), analysis.loss)

    before, after = network.run(fresh), network.run(fresh, applied.kernels)
    return Row(
        network=name,
        ratio=plan.before.macs / plan.after.macs,
        objective=", ".join(filter(None, [words(objective), note])),
        summed=plan.predicted_loss,
        trial=None if trial is None else loss(trial),
        held_out=loss(applied),
        fresh=divergence(before, after, analysis.loss),
        before=quality(before[0], right),
        after=quality(after[0], right),
        seconds=seconds,
    )


def quality(outputs: Array, right: Array) -> float:
    """Top-1 accuracy in percent, or the mean PSNR of images in dB."""
    return 100 * accuracy([outputs], right) if outputs.ndim == 2 else mean_psnr(right, outputs, 1.0)


def main(
    network: Annotated[list[str] | None, typer.Option(help=f"Among: {', '.join(RATIOS)}")] = None,
    is_trained: Annotated[
        bool, typer.Option("--trained", help="Only the rows without and with training.")
    ] = False,
    keep_in: Annotated[
        Path | None, typer.Option("--keep", help="Add the rows to this file, as JSON.")
    ] = None,
) -> None:
    """Print the table; a star marks the plan that the trials choose."""
    console, known = Console(), []
    for row in rows(shared(), network or list(RATIOS), is_trained):
        console.log(row)  # long runs are watched
        known.append(row)
        keep(keep_in, row)
    console.print(table(known))


def table(known: Sequence[Row]) -> Table:
    """A line for every row."""
    out = Table(title="Divergence of the outputs (KL, or squared error relative to the variance)")
    for column in ("network", "MACs", "plan for", "sum", "trial", "held out", "fresh", "quality", "s"):
        out.add_column(column)
    for row in known:
        others = [r for r in known if r.network == row.network and r.objective.startswith("sum")]
        trials = [r.trial for r in others if r.trial is not None]
        star = "*" if row in others and row.trial == min(trials, default=None) else ""
        out.add_row(
            row.network,
            f"{row.ratio:.2f}× fewer",
            row.objective + star,
            f"{row.summed:.3g}",
            "–" if row.trial is None else f"{row.trial:.3g}",
            f"{row.held_out:.3g}",
            f"{row.fresh:.3g}",
            f"{row.before:.2f} → {row.after:.2f}",
            f"{row.seconds:.0f}",
        )
    return out


if __name__ == "__main__":
    typer.run(main)
