"""Draw the documentation's pictures from runs on the network that comes with the package.

    python docs/pictures.py docs/generated

Every curve is computed here, by the code that decouples networks. Each picture is written twice, in colours
for light pages and for dark ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import netdecouple
from netdecouple.convolution import Factorization
from netdecouple.data.calibration import load
from netdecouple.data.preprocessing import Preprocessing
from netdecouple.families import Problem
from netdecouple.families.chain import Step, method
from netdecouple.families.nd import full_rank
from netdecouple.fitting.apply import apply
from netdecouple.fitting.ridge import best_ridge, held_out_error
from netdecouple.fitting.sampling import Inputs, Split, SplitMoments, sample_positions
from netdecouple.frontends.onnx.model import read_model
from netdecouple.frontends.onnx.network import OnnxNetwork
from netdecouple.network import Layer
from netdecouple.planning.analysis import Analysis, analyze
from netdecouple.planning.cost import Budget, Macs
from netdecouple.planning.divergence import divergence
from netdecouple.planning.planner import budget_rows, make_plan
from netdecouple.planning.settings import Settings

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, Rectangle

DEMO = Path(netdecouple.__file__).parent / "demo"
INK, DARK_INK = "#333333", "#d0d4dc"  # text and lines
COLOURS = ("#1f5fa8", "#b34700", "#22703a", "#8a3d8f", "#7a6000", "#b0243c")
ON_DARK = dict(
    zip(COLOURS, ("#7db4f0", "#f0a05a", "#7cc98f", "#d79bdb", "#dcc45a", "#f28b9b"), strict=True)
) | {INK: DARK_INK}
STYLE = dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
) | {
    **{"axes.grid": True, "grid.alpha": 0.25, "grid.color": INK, "legend.framealpha": 0.0},
    **{"axes.titlesize": "medium", "font.size": 9.0},
    "svg.hashsalt": "netdecouple",  # the same numbers give the same file
}
PER_IMAGE = 12  # samples: enough for pictures, and quick
SHOWN = "/features/features.7/Conv"  # 64 → 64 channels at 16 × 16


@dataclass(frozen=True)
class Demo:
    """The network and its images, and what several pictures need of them."""

    network: OnnxNetwork
    inputs: Inputs

    @classmethod
    def open(cls) -> Demo:
        model = read_model(DEMO / "digits.onnx")
        source = f"{DEMO / 'digits.npz'}:calib"
        images = load(
            source, channels=1, size=model.size, preprocessing=Preprocessing(), samples=None, seed=0
        ).images
        return cls(OnnxNetwork(model, images), Inputs.split(images, 0))

    @cached_property
    def layers(self) -> list[Layer]:
        """The convolutions that can be decoupled."""
        return [la for la in self.network.layers if la.geometry and not la.reason and la.geometry.kh > 1]

    def layer(self, name: str) -> Layer:
        return next(la for la in self.layers if la.name == name)

    def problem(self, layer: Layer, images: int | None = None) -> tuple[Problem, Split]:
        """A layer's problem in the moments of so many of the images that are fitted on."""
        assert layer.geometry is not None
        count = self.inputs.fitted if images is None else images
        inputs = Inputs(np.concatenate([self.inputs.images[:count], self.inputs.held_out]), count, "")
        positions = sample_positions(layer, len(self.inputs.images), 0)
        positions = positions[: len(inputs.images), :: -(-positions.shape[1] // PER_IMAGE)]
        own = SplitMoments(layer, inputs)
        for seen in self.network.observe(inputs.images, {layer.name: positions}):
            own.add(seen.images, seen.patches, seen.outputs)
        return Problem.of(layer.geometry, layer.weight, own.both.fitted), own.both

    @cached_property
    def analysis(self) -> Analysis:
        return analyze(self.network, self.inputs, Settings(families=("nd-dp",)))


Figure = Any


def free(layer: Layer) -> Problem:
    assert layer.geometry is not None
    return Problem.data_free(layer.geometry, layer.weight, layer.bias)


def expanded(layer: Layer, form: str, terms: int) -> Factorization:
    """The first terms of every slice, from the weights alone."""
    assert layer.geometry is not None
    size = terms * layer.geometry.n_i if form == "nd-dp" else terms
    return method(form, True, rounds=0).fit(free(layer), [Step(size)])[0]


def panels(count: int, height: float = 3.2, width: float = 3.7) -> tuple[Figure, list[Any]]:
    figure, axes = pyplot.subplots(
        1, count, figsize=(width * count, height), squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def forms(demo: Demo) -> Figure:
    """DP and PD of the first four channels of a real layer, with its real filters."""
    layer = demo.layer(SHOWN)
    assert layer.geometry is not None
    terms, n = 2, 4
    depthwise = expanded(layer, "nd-dp", terms).stages[0].weight[:, 0]
    of_outputs = expanded(layer, "nd-pd", terms).stages[1].weight
    figure, (left, right) = panels(2, 3.6, 4.6)
    for axis, title in (
        (left, f"DP: depthwise, then 1×1 (T = {terms})"),
        (right, f"PD: 1×1, then depthwise (T = {terms})"),
    ):
        axis.set_title(title)
        axis.set(xlim=(-0.4, 8.6), ylim=(-0.6, 9.0))
        axis.set_aspect("equal")
        axis.axis("off")
    small = [2.0 * i + 0.75 for i in range(n)]
    many = [1.0 * i + 0.25 for i in range(n * terms)]
    for i, y in enumerate(small):
        channel(left, 0, y, COLOURS[i])
        channel(right, 8, y, COLOURS[i])
    for i, y in enumerate(many):
        own = small[i // terms]
        filter_image(left, 3.0, y, depthwise[i])
        arrow(left, 0.45, own, 2.55, y, COLOURS[i // terms])
        channel(left, 4.9, y, COLOURS[i // terms])
        arrow(left, 3.45, y, 4.45, y, COLOURS[i // terms])
        filter_image(right, 5.4, y, of_outputs[i // terms, i % terms])
        channel(right, 3.4, y, COLOURS[i // terms])
        arrow(right, 3.85, y, 4.95, y, COLOURS[i // terms])
        arrow(right, 5.85, y, 7.55, own, COLOURS[i // terms])
    grey = matplotlib.rcParams["text.color"]
    for y in small:
        channel(left, 8, y, grey)
        channel(right, 0, y, grey)
        for other in many:
            left.plot((5.35, 7.55), (other, y), color=grey, linewidth=0.35, alpha=0.6)
            right.plot((0.45, 2.95), (y, other), color=grey, linewidth=0.35, alpha=0.6)
    for axis, names in (
        (left, ((0, "input"), (3.0, "k×k filters"), (4.9, "T·nᵢ maps"), (8, "output"))),
        (right, ((0, "input"), (3.4, "T·nₒ maps"), (5.4, "k×k filters"), (8, "output"))),
    ):
        for x, name in names:
            axis.text(x, 8.3, name, ha="center", fontsize="small")
    return figure


def channel(axis: Any, x: float, y: float, colour: str) -> None:
    axis.add_patch(
        Rectangle((x - 0.38, y - 0.38), 0.76, 0.76, facecolor=colour, alpha=0.55, edgecolor=colour)
    )


def arrow(axis: Any, x: float, y: float, to_x: float, to_y: float, colour: str) -> None:
    axis.add_patch(
        FancyArrowPatch((x, y), (to_x, to_y), arrowstyle="-|>", mutation_scale=6, color=colour, linewidth=0.8)
    )


def filter_image(axis: Any, x: float, y: float, values: np.ndarray) -> None:
    """A k × k filter in grey, as squares: an image in it would not be a drawing any more."""
    strength = np.abs(values).max() or 1.0
    k = len(values)
    side = 0.8 / k
    for (row, column), value in np.ndenumerate(values / strength):
        shade = f"{0.5 + 0.5 * float(value):.3f}"
        corner = (x - 0.4 + side * column, y + 0.4 - side * (row + 1))
        axis.add_patch(Rectangle(corner, side, side, facecolor=shade, edgecolor="0.5", linewidth=0.3))


def lossless(demo: Demo) -> Figure:
    """Relative error of the kernel by T, in both forms: nothing is left at full rank."""
    figure, axes = panels(2)
    for axis, name in zip(axes, ("nd-dp", "nd-pd"), strict=True):
        for layer, colour in zip(demo.layers[:3], COLOURS, strict=False):
            assert layer.geometry is not None
            errors = [
                np.linalg.norm(expanded(layer, name, terms).dense() - layer.weight)
                / np.linalg.norm(layer.weight)
                for terms in range(1, full_rank(layer.geometry) + 1)
            ]
            label = f"{layer.geometry.n_i} → {layer.geometry.n_o}, {layer.size[0]} × {layer.size[1]}"
            axis.semilogy(
                range(1, len(errors) + 1), errors, marker="o", markersize=3, color=colour, label=label
            )
        axis.set(title=f"{'DP' if name == 'nd-dp' else 'PD'} form", xlabel="T", ylabel="‖Ŵ − W‖ / ‖W‖")
        axis.set_xticks(range(1, 10))
    axes[0].legend(fontsize="small")
    return figure


def spectra(demo: Demo) -> Figure:
    """Share of a slice's energy in its first T terms: of the weights, and as the layer's inputs see it."""
    figure, axes = panels(2)
    (family,) = method("nd-dp").families
    for layer, colour in zip(demo.layers, COLOURS, strict=False):
        assert layer.geometry is not None
        label = f"{layer.geometry.n_i} → {layer.geometry.n_o}, {layer.size[0]} × {layer.size[1]}"
        for axis, problem in zip(axes, (free(layer), demo.problem(layer)[0].regularized(1e-3)), strict=True):
            shares = 100 * family.energies(problem)
            axis.plot(range(1, len(shares) + 1), shares, marker="o", markersize=3, color=colour, label=label)
    for axis, title in zip(axes, ("of the weights alone", "in the metric of the inputs"), strict=True):
        axis.set(title=title, xlabel="T", ylabel="% of the energy", ylim=(0, 104))
        axis.set_xticks(range(1, 10))
    axes[0].legend(fontsize="small", loc="lower right")
    return figure


def moments(demo: Demo) -> Figure:
    """The covariance of a layer's patches: what the fit knows of its inputs."""
    layer = demo.layer(SHOWN)
    _, own = demo.problem(layer)
    gram = own.fitted.gram[0]
    k = 9
    spread = np.sqrt(np.diag(gram)) + np.finfo(float).tiny
    strongest = np.argsort(-np.diag(gram).reshape(-1, k).sum(axis=1), kind="stable")[:6]
    taps = (strongest[:, None] * k + np.arange(k)).ravel()
    shown = (gram / np.outer(spread, spread))[np.ix_(taps, taps)]
    figure, (left, right) = panels(2, 3.5, 4.0)
    left.grid(False)
    picture = left.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    left.set(title="correlation of 6 channels' taps", xticks=[], yticks=[])
    figure.colorbar(picture, ax=left, shrink=0.8)
    values = np.linalg.eigvalsh(gram)[::-1]
    right.semilogy(np.arange(1, len(values) + 1), values / values.sum(), color=COLOURS[0])
    right.set(
        title=f"eigenvalues of G, {own.fitted.count:,} samples",
        xlabel="number",
        ylabel="share of the variance",
    )
    return figure


def samples(demo: Demo) -> Figure:
    """Held-back error of one layer by the number of images, with and without a ridge."""
    layer = demo.layer(SHOWN)
    assert layer.geometry is not None
    counts = [c for c in (4, 8, 16, 32, 64, 128, 256) if c < demo.inputs.fitted] + [demo.inputs.fitted]
    chain = method("nd-dp", True, rounds=1)
    steps = [Step(3 * layer.geometry.n_i)]

    def fit(problem: Problem) -> Factorization:
        return chain.fit(problem, steps)[0]

    rows = []
    alone = fit(free(layer))
    for count in counts:
        problem, own = demo.problem(layer, count)
        variance = own.held_out.variance
        _, regular = best_ridge(problem, own.held_out, fit)
        biased = Problem.data_free(layer.geometry, layer.weight, layer.bias)
        rows.append(
            [
                held_out_error(p, own.held_out, f) / variance
                for p, f in (
                    (problem, fit(problem.regularized(1e-9))),
                    (regular, fit(regular)),
                    (biased, alone),
                )
            ]
            + [own.fitted.count]
        )
    bare, ridged, weights, seen = np.array(rows).T
    figure, (axis,) = panels(1, 3.4, 5.6)
    axis.loglog(seen, bare, marker="o", markersize=3, color=COLOURS[1], label="fitted, no ridge")
    axis.loglog(
        seen,
        ridged,
        marker="o",
        markersize=3,
        color=COLOURS[0],
        label="fitted, ridge chosen on held-out inputs",
    )
    axis.loglog(seen, weights, color=COLOURS[2], linestyle="--", label="from the weights alone")
    unknowns = layer.weight[0].size
    for number, name in ((unknowns, "as many samples\nas unknowns"), (10 * unknowns, "ten per\nunknown")):
        if number < seen[-1]:
            axis.axvline(number, color=matplotlib.rcParams["text.color"], linewidth=0.8, linestyle=":")
            axis.text(number * 1.05, axis.get_ylim()[1] * 0.5, name, fontsize="small", va="top")
    g = layer.geometry
    axis.set(
        title=f"{g.n_i} → {g.n_o}, T = 3 of {full_rank(g)}",
        xlabel="samples",
        ylabel="error on held-out inputs",
    )
    axis.legend(fontsize="small")
    return figure


def budgets(demo: Demo) -> Figure:
    """What plans for a ladder of budgets foresee, and what came of some of them."""
    analysis = demo.analysis
    total = sum(layer.macs for layer in demo.network.layers)
    rows = budget_rows(analysis)[:-1]  # without the least that can be reached, which is far off
    shown = demo.inputs.held_out
    original = demo.network.run(shown)
    points = []
    for ratio in (1.5, 2.0, 3.0):
        applied = apply(demo.network, demo.inputs, make_plan(analysis, [Budget(Macs(), 1 / ratio)]))
        found = divergence(
            original, demo.network.run_built(demo.network.build(applied.factorizations), shown), "kl"
        )
        points.append((total / applied.plan.after.macs, found))
    figure, axes = panels(2)
    left, right = axes
    left.semilogy(
        [total / row.macs for row in rows],
        [row.predicted_loss for row in rows],
        marker="o",
        markersize=3,
        color=COLOURS[0],
        label="predicted",
    )
    left.semilogy(
        *zip(*points, strict=True), marker="s", linestyle="", color=COLOURS[1], label="measured, held-out"
    )
    left.set(title="the whole network", xlabel="times fewer MACs", ylabel="KL divergence, nats")
    left.legend(fontsize="small")
    for layer, colour in zip(demo.layers, COLOURS, strict=False):
        known = analysis.candidates.get(layer.name)
        if known is None:
            continue
        pairs = sorted(
            zip(
                [c.structure.macs(*layer.size) / layer.macs for c in known.candidates],
                [c.loss for c in known.candidates],
                strict=True,
            )
        )
        assert layer.geometry is not None
        right.semilogy(
            *zip(*pairs, strict=True),
            color=colour,
            marker=".",
            markersize=3,
            linewidth=0.8,
            label=f"{layer.geometry.n_i} → {layer.geometry.n_o}, {layer.size[0]} × {layer.size[1]}",
        )
    right.set(title="the layers' candidates", xlabel="share of the layer's MACs", ylabel="predicted loss")
    right.legend(fontsize="small")
    return figure


PICTURES: dict[str, Callable[[Demo], Figure]] = {
    draw.__name__: draw for draw in (forms, lossless, spectra, moments, samples, budgets)
}


def on_dark(drawing: str) -> str:
    """The same drawing in the colours for dark pages."""
    for colour, other in ON_DARK.items():
        drawing = drawing.replace(colour, other)
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the documentation's pictures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=PICTURES, action="append")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams.update(STYLE)
    demo = Demo.open()
    for name in arguments.only or PICTURES:
        figure = PICTURES[name](demo)
        path = arguments.folder / f"{name}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
        path.with_stem(f"{name}-dark").write_text(on_dark(path.read_text()))


if __name__ == "__main__":
    main()
